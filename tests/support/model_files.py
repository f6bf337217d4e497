"""Small networks, and model files whose content is invalid although their checksum is right."""

import hashlib
import json

import numpy as np

from eventrnn.io import model_file as io
from eventrnn.network import Network
from eventrnn.weights import convert


def converted(weights, to, rng, storage="float32"):
    pruned = weights.to_dense() * (rng.random(weights.shape) < 0.5)
    block = tuple(int(rng.integers(1, size + 1)) for size in weights.shape) if to == "block" else None
    m = int(rng.integers(2, 33))
    nm = (m, m, str(rng.choice(["post", "pre"]))) if to == "nm" else None
    return convert(pruned.astype(np.float32), to, block=block, nm=nm, storage=storage)


def small_network(seed=0):
    rng = np.random.default_rng(seed)
    network = Network.random([4, 3], rng=rng, symbols=5, embedding=3, tied=True, metadata={"text": "ab\n\x1f\u00e9"})
    return network.with_matrices(
        {
            "layers.0.w_in": converted(network.layers[0].w_in, "csr", rng),
            "layers.1.w_rec": convert(network.layers[1].w_rec, "block", block=(2, 4)),
        }
    )


def narrow_network():
    network = small_network()
    first, second = network.layers
    return network.with_matrices(
        {
            "layers.0.w_in": convert(first.w_in.to_dense(), "nm", nm=(4, 4, "pre"), storage="bfloat16"),
            "layers.0.w_rec": first.w_rec.stored_as("int8"),
            "layers.1.w_rec": second.w_rec.stored_as("int8"),
        }
    )


def crafted(path, change, version=io.VERSION, network=None):
    """A file with a correct checksum and invalid content."""
    tensors, description = io._to_tensors(network or small_network())
    tensors = {name: array.copy() for name, array in tensors.items()}
    change(tensors, description)
    path.write_bytes(io._encode(tensors, description, version=version))


def signed(path, change=lambda header: None, network=None):
    """A file whose header was changed before it was signed."""
    raw = io.encoded(network or narrow_network())
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    unsigned = len(text).to_bytes(8, "little") + text + raw[end:]
    digest = hashlib.sha256(unsigned).hexdigest()
    path.write_bytes(unsigned.replace(io._signature("0" * 64), io._signature(digest), 1))


def edit(name, change):
    """Replace a tensor by `change(tensor)`, or with no change remove it."""

    def apply(tensors, description):
        array = tensors.pop(name, None)
        if change is not None:
            tensors[name] = change(array)

    return apply


def describe(change):
    return lambda tensors, description: change(description)
