"""Draw figures/ from results/ (bench.py, block_sparse.py): measures nothing, computes nothing anew.

    python experiments/plots.py

Of each case the last line of the device that was measured last counts. speedup.png needs `bench.py --grid`.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from eventrnn import plots

HERE = Path(__file__).parent
# Of bench.py's grid; every other case is repeated more often.
GRID_REPEATS = 7
# A layer of which only what the grid varies was varied: activity, sparsity and batch.
PLAIN = {"against": "torch", "hidden": 1350, "layers": 1, "variant": "evnn", "threads": 1, "dtype": "float32"}


def latest(lines: list[dict]) -> list[dict]:
    """The lines measured on the device of the last one; of each case the last."""
    return list({case_of(line): line for line in lines if line["device"] == lines[-1]["device"]}.values())


def case_of(line: dict) -> str:
    """What was asked, as a name that no other case has."""
    keys = (
        "measures", "hidden", "layers", "batch", "activity_asked", "sparsity_asked", "format", "block", "nm", "dtype",
        "variant", "threads", "against", "steps", "repeats",
    )  # fmt: skip
    return json.dumps([line[key] for key in keys])


def is_plain(line: dict) -> bool:
    """Whether the case has its place on the map: a plain layer, dense or in blocks of 1x64."""
    weights = (line["format"], line["block"], line["sparsity_asked"] > 0)
    return all(line[k] == v for k, v in PLAIN.items()) and weights in (("dense", None, False), ("block", "1x64", True))


def map_cells(lines: list[dict]) -> dict[str, dict[tuple[float, float], float]]:
    """Speed-ups by batch, activity and sparsity, of plain layers."""
    panels: dict[str, dict[tuple[float, float], float]] = {}
    for line in sorted(filter(is_plain, lines), key=lambda line: line["batch"]):
        panel = panels.setdefault(f"batch {line['batch']}", {})
        panel[line["activity_asked"], line["sparsity_asked"]] = line["speedup"]
    return {name: panel for name, panel in panels.items() if len(panel) > 3}


def points(lines: list[dict]) -> list[dict]:
    """Every line as the roofline wants it; the cases of the grid have no name and so no bar."""
    found = []
    for line in lines:
        weights = line["block"] or (line["nm"] and line["nm"].removesuffix(":post")) or line["format"]
        narrow = "" if line["dtype"] == "float32" else f" {line['dtype']}"
        words = [
            f"{line['measures']} {line['hidden']}",
            f"{weights}{narrow}" + (f" {line['sparsity_asked']:.0%} pruned" if line["sparsity_asked"] else ""),
            f"{line['activity_asked']:.0%} active",
            f"batch {line['batch']}" if line["batch"] > 1 else "",
            f"{line['threads']} threads" if line["threads"] > 1 else "",
            line["variant"] if line["variant"] != "evnn" else "",
        ]
        found.append(
            line
            | {
                "group": f"{line['format']}{narrow}{', batch > 1' if line['batch'] > 1 else ''}",
                "name": ", ".join(word for word in words if word) if line["repeats"] > GRID_REPEATS else "",
            }
        )
    # Against another rival the same case was measured again: one bar is enough.
    seen: dict[str, dict] = {}
    for line in found:
        seen.setdefault(line["name"] or case_of(line), line)
    return list(seen.values())


def draw_blocks(lines: list[dict], path: Path) -> None:
    """Perplexity over sparsity, by way and block, of the job and device of the last line."""
    keys = ("job", "steps", "tuning", "strength", "device")
    same = [line for line in lines if all(line[key] == lines[-1][key] for key in keys)]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"pruning": {}, "lasso": {}}
    pruned = [line for line in same if line["way"] != "dense" and line["larger"] == 1]
    for line in sorted(pruned, key=lambda line: [int(size) for size in line["block"].split("x")]):
        panels[line["way"]].setdefault(line["block"], []).append((line["share"], line["perplexity"]))
    dense = [line["perplexity"] for line in same if line["way"] == "dense"]
    if not dense:
        print(f"{path.name}: not drawn, the dense model's line is missing")
        return
    titles = {"pruning": "block pruning", "lasso": "group lasso and block pruning"}
    plots.pruning_curves({titles[way]: panel for way, panel in panels.items()}, dense[-1], path=path)
    print(f"wrote {path}: {len(same)} points")


def main(
    results: Annotated[Path, typer.Option(help="Lines of bench.py.")] = HERE / "results" / "cpu_inference.jsonl",
    figures: Annotated[Path, typer.Option(help="Folder to draw into.")] = HERE / "figures",
) -> None:
    """Draw what the lines suffice for, and name the rest."""
    every = [json.loads(line) for line in results.read_text().splitlines()]
    lines = [line for line in every if "measures" in line]
    if not lines:
        raise SystemExit(f"results: {results} has no lines of this version of bench.py; run it first")
    lines = latest(lines)
    figures.mkdir(parents=True, exist_ok=True)
    panels = map_cells(lines)
    if panels:
        plots.speedup_map(
            panels, title="Times faster than torch.nn.GRU: 1350 units, 1 thread", path=figures / "speedup.png"
        )
        print(f"wrote {figures / 'speedup.png'}: {', '.join(f'{k}, {len(v)} cells' for k, v in panels.items())}")
    else:
        print("speedup.png: not drawn, it needs the lines of bench.py --grid")
    blocks = results.parent / "block_sparse.jsonl"
    if blocks.exists():
        draw_blocks([json.loads(line) for line in blocks.read_text().splitlines()], figures / "blocks.png")
    plots.roofline(points(lines), title="How close to the limits of the machine", path=figures / "roofline.png")
    print(f"wrote {figures / 'roofline.png'}: {len(points(lines))} cases")


if __name__ == "__main__":
    typer.run(main)
