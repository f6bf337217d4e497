"""A crossover map that no machine measured."""

from eventrnn.cpu import crossover
from eventrnn.cpu.crossover import Crossover


def invented_map() -> Crossover:
    """A crossover map of round numbers, in which every way is the fastest somewhere. Nothing is measured for it."""
    times = {}
    for units in crossover.UNITS:
        weight = 1e-10 * 3 * units * units
        shared = {
            "panels": [[weight * (0.5 + 0.3 * rows * a) for a in crossover.ACTIVITY] for rows in crossover.ROWS],
            "every": [[weight * (0.6 + 0.05 * rows)] * len(crossover.ACTIVITY) for rows in crossover.ROWS],
            "blas": [[weight * (0.5 + 0.06 * rows)] * len(crossover.ACTIVITY) for rows in crossover.ROWS],
        }
        rows = [[weight * rows * a for a in crossover.ACTIVITY] for rows in crossover.EACH_ROWS]
        times |= {f"{way}/{units}": table for way, table in (shared | {"rows": rows}).items()}
        for density in crossover.DENSITY:
            for way, price in (("single", 3.0), ("block4", 2.0), ("block16", 1.2), ("block64", 1.0)):
                times[f"{way}/{units}/{density}"] = [[price * density * x for x in line] for line in rows]
            times[f"single tiles/{units}/{density}"] = [
                [weight * 2 * density + x for x in line] for line in shared["panels"]
            ]
    return Crossover(times)
