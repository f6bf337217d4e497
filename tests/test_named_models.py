"""Models by name, path and address: found, downloaded once, held against a checksum, or refused in one line."""

import hashlib
import importlib
import json
import lzma
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from eventrnn import Network, save
from eventrnn.cli import demo
from eventrnn.data import download
from eventrnn.io import ModelFileError, NamedModel, located_model, named
from eventrnn.pruning import prune
from support.texts import TEXT, reader_of_text


@pytest.fixture
def model(tmp_path):
    """A model file that reads characters, and its checksum."""
    network = reader_of_text()
    path = tmp_path / "fox.safetensors"
    save(network, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def served(model, tmp_path, monkeypatch):
    """The address of the model on a server of this machine, its checksum, and what the server was asked for."""
    path, sha256 = model
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            raw = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "cache"))
    yield f"http://127.0.0.1:{server.server_port}/fox.safetensors", sha256, asked
    server.shutdown()
    server.server_close()


def registered(monkeypatch, *locations, sha256, size=0):
    monkeypatch.setitem(named.MODELS, "fox", NamedModel(size, sha256, locations, "a test"))


def needs_pooch():
    pytest.importorskip("pooch", reason="downloads need pooch, the data extra")


def test_every_named_model_has_a_file_of_its_size_and_checksum_or_an_address():
    for name, entry in named.MODELS.items():
        assert entry.locations and len(entry.sha256) == 64 and 0 < entry.size <= 16 << 20, name
        inside = [named.ROOT / each for each in entry.locations if "://" not in each]
        for path in inside:
            assert path.stat().st_size == entry.size, name
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256, name


def test_a_path_is_taken_as_it_is(tmp_path, monkeypatch):
    assert located_model(tmp_path / "no.safetensors") == tmp_path / "no.safetensors"
    monkeypatch.chdir(tmp_path)
    registered(monkeypatch, "nowhere", sha256="0" * 64)
    (tmp_path / "fox").write_text("what lies here comes first")
    assert located_model("fox").read_text() == "what lies here comes first"


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "MODELS", {})
    with pytest.raises(ModelFileError, match=r"hare: no such file, .* \(this version has no named models\)"):
        located_model("hare")
    registered(monkeypatch, "nowhere", sha256="0" * 64)
    with pytest.raises(ModelFileError, match=r"hare: no such file, .* \(named models: fox\)"):
        located_model("hare")


def test_a_name_is_downloaded_once_with_progress(served, monkeypatch):
    needs_pooch()
    address, sha256, asked = served
    registered(monkeypatch, "not/in/this/checkout", address, sha256=sha256)
    told = []
    found = {located_model("fox", lambda *each: told.append(each)) for _ in range(2)}
    assert len(found) == 1 and len(asked) == 1
    (path,) = found
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    size = path.stat().st_size
    assert told[-1] == ("downloading", size, size, "fox") and all(0 <= done <= total for _, done, total, _ in told)


def test_a_file_in_the_repository_needs_no_download(model, monkeypatch):
    path, sha256 = model
    monkeypatch.setattr(named, "ROOT", path.parent)
    registered(monkeypatch, path.name, sha256=sha256)
    assert located_model("fox") == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="it is another file"):
        located_model("fox")


def test_an_address_needs_the_checksum_of_its_content(served, model, tmp_path):
    needs_pooch()
    address, sha256, asked = served
    for wrong in (address, f"{address}#md5=1", f"{address}#sha256=12"):
        with pytest.raises(ModelFileError, match="add #sha256="):
            located_model(wrong)
    assert asked == []
    assert located_model(f"{address}#sha256={sha256.upper()}").read_bytes() == model[0].read_bytes()
    with pytest.raises(ModelFileError, match="cannot be downloaded .*hash"):
        located_model(f"{address}#sha256={'0' * 64}")
    kept = {file.name for file in (tmp_path / "cache" / "models").iterdir()}
    assert kept == {f"{sha256[:16]}.safetensors"}, "a wrong content is not kept"


def test_file_addresses_are_read_in_place(model):
    path, sha256 = model
    assert located_model(f"{path.as_uri()}#sha256={sha256}") == path
    with pytest.raises(ModelFileError, match="it is another file"):
        located_model(f"{path.as_uri()}#sha256={'0' * 64}")
    with pytest.raises(ModelFileError, match="gone: cannot be read"):
        located_model(f"{path.with_name('gone').as_uri()}#sha256={sha256}")
    with pytest.raises(ModelFileError, match="need an address that begins with http"):
        located_model(f"gopher://x/y#sha256={sha256}")


def test_a_compressed_file_is_unpacked_once(model, tmp_path, monkeypatch):
    path, _ = model
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "fox.safetensors.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    sha256 = hashlib.sha256(packed.read_bytes()).hexdigest()
    monkeypatch.setattr(named, "ROOT", tmp_path)
    registered(monkeypatch, packed.name, sha256=sha256)
    found = {located_model(each) for each in (packed, "fox", f"{packed.as_uri()}#sha256={sha256}")}
    assert len(found) == 1 and found.pop().read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_a_packed_model_of_several_streams_is_unpacked_like_any_compressed_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
    pack = importlib.import_module("pack_model")
    network = prune(Network.random([200], inputs=200, rng=np.random.default_rng(0)), 0.7, scope="matrix")
    path, out = tmp_path / "small.safetensors", tmp_path / "small.safetensors.xz"
    save(network.with_matrices({name: w.stored_as("int8") for name, w in network.matrices().items()}), path)

    def refusal(target):
        return str(CliRunner().invoke(pack.app, [str(path), str(target)]).exception)

    assert "out: got" in refusal(tmp_path / "small") and "ends in .xz" in refusal(tmp_path / "small")
    assert CliRunner().invoke(pack.app, [str(path), str(out)]).exit_code == 0
    assert located_model(out).read_bytes() == path.read_bytes()
    assert out.stat().st_size < len(lzma.compress(path.read_bytes(), preset=9))
    assert "use --force" in refusal(out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not compressed at all", "cannot be unpacked"),
        (lzma.compress(b"cut off")[:-9], "cannot be unpacked"),
        (lzma.compress(bytes(1 << 20)), "which is no model file"),
    ],
)
def test_what_cannot_be_unpacked_is_refused_and_leaves_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "fox.safetensors.xz"
    packed.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        located_model(packed)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_without_a_connection_the_message_says_what_to_do(monkeypatch, tmp_path):
    def offline(*arguments, **options):
        raise download.DownloadError("no route to host")

    monkeypatch.setattr(named, "retrieve", offline)
    registered(monkeypatch, "not/here", "https://example.org/fox", sha256="0" * 64)
    with pytest.raises(ModelFileError, match=r"no route to host\); try again, or give the path of a file"):
        located_model("fox")
    with pytest.raises(ModelFileError, match=r"no route to host\); try again, or give the path of a file"):
        located_model(f"https://example.org/fox#sha256={'0' * 64}")


def test_without_pooch_a_download_is_refused(served, monkeypatch):
    address, sha256, asked = served
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ModelFileError, match=r"pip install 'eventrnn\[data\]'"):
        located_model(f"{address}#sha256={sha256}")
    assert asked == []


# --- commands -----------------------------------------------------------------------------------------------


def test_run_count_and_info_take_a_model_by_name_or_as_an_argument(cli, model, monkeypatch, text):
    path, sha256 = model
    monkeypatch.setattr(named, "ROOT", path.parent)
    registered(monkeypatch, path.name, sha256=sha256)
    for command in (("run", "--text", text), ("count", "--text", text, "--symbols", 50), ("info",)):
        answers = [cli(*command, *how, "--json") for how in ((path,), ("--model", path), ("--model", "fox"))]
        assert [code for code, _, _ in answers] == [0, 0, 0], answers
        assert len({out for _, out, _ in answers}) == 1
    assert json.loads(cli("info", path, "--json")[1])["sha256"] == sha256
    for wrong in ((), (path, "--model", "fox")):
        code, out, err = cli("run", *wrong, "--text", text)
        assert code == 2 and not out and err.count("\n") == 1 and "give a model file, or --model" in err
    code, out, err = cli("run", "--model", "hare", "--text", text)
    assert code == 2 and not out and "no model of that name" in err


def test_run_reports_layers_and_matrices(cli, model, text):
    found = json.loads(cli("run", model[0], "--text", text, "--json")[1])
    assert list(found["activity_by_layer"]) == ["layers.0"]
    assert list(found["activity_by_layer"].values()) == [found["activity"]]
    for kind in ("effective", "executed"):
        assert list(found[f"{kind}_ops_by_matrix"]) == ["layers.0.w_in", "layers.0.w_rec", "readout"]
        assert sum(found[f"{kind}_ops_by_matrix"].values()) == found[f"{kind}_ops_per_step"]
    assert found["dense_ops_per_step"] == 72 * (8 + 24) + 24 * 28


def test_demo_of_a_trained_model_writes_a_text_and_compares(cli, model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "interleaved", lambda runs, repeats: {name: [run() and 1.0] for name, run in runs.items()}
    )
    out = tmp_path / "demo"
    code, printed, err = cli("demo", "--model", model[0], "--out", out, "--seed", 3, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert result["events_identical"] and result["events_compared"] == demo.WRITTEN * 24
    assert len(result["text"]) == demo.WRITTEN and set(result["text"]) <= set(TEXT)
    assert not (out / "model.safetensors").exists() and (out / "counts.json").exists()
    again = json.loads(cli("demo", "--model", model[0], "--out", out, "--seed", 3, "--force", "--json")[1])
    assert again["text"] == result["text"]
    code, printed, err = cli("demo", "--model", model[0], "--out", out, "--hidden", 8, "--force")
    assert code == 2 and not printed and "leave out the sizes" in err
