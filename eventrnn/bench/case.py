"""What a benchmark measures: the sizes, the options, and which of them go together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from eventrnn.weights import FORMATS, STORAGES, check_nm

#: rivals of a whole layer (or a stack), and of one product of a sparse matrix with the events of a step
LAYER_RIVALS = ("torch", "torch-step", "blas")

PRODUCT_RIVALS = ("scipy", "torch-csr", "mkl", "numpy", "torch-mm", "float32")

RIVALS = (*LAYER_RIVALS, *PRODUCT_RIVALS, "none")

#: rivals of a whole layer (or a stack) on a GPU: torch.nn.GRU there, in float32 with and without TF32, and in float16
GPU_RIVALS = ("cudnn", "evnn-style", "cusparse", "none")


@dataclass(frozen=True)
class Case:
    """One thing to measure. Raises ValueError for what does not go together, before any work.

    Attributes
    ----------
    hidden, layers, batch : units (and inputs) of a layer, layers, samples side by side
    activity : share of units that send an event in a step, in (0, 1]
    sparsity : share of blocks or weights left out; None is 0.9, or what the format says (dense, nm)
    format   : of the weights; block, for "block" (None is 1x64); nm, for "nm": (n, m, "post" or "pre")
    dtype    : what weights are stored in
    variant  : equations of the cell
    backend  : "cpu" or "cuda"
    exact    : False lets "cuda" use tensor cores where it measures them to be faster
    threads  : of every contestant that can use them
    against  : rivals, separated by commas; the fastest counts. All of `LAYER_RIVALS`, which are timed beside a
               whole layer, or all of `PRODUCT_RIVALS`, beside one product with a (hidden, 3 hidden) matrix
    steps, repeats, seed : steps a run, interleaved rounds, of everything random
    """

    hidden: int = 1350
    layers: int = 1
    batch: int = 1
    activity: float = 0.1
    sparsity: float | None = None
    format: str = "block"
    block: tuple[int, int] | None = None
    nm: tuple[int, int, str] | None = None
    dtype: str = "float32"
    variant: str = "evnn"
    backend: str = "cpu"
    exact: bool = True
    threads: int = 1
    against: str = "torch"
    steps: int = 200
    repeats: int = 15
    seed: int = 0

    def __post_init__(self):
        for name in ("hidden", "layers", "batch", "threads", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a whole number >= 1")
        if self.repeats < 3:
            raise ValueError(f"repeats: got {self.repeats}, need at least 3 for a median")
        if not 0 < self.activity <= 1:
            raise ValueError(f"activity: got {self.activity}, need a share in (0, 1]")
        self._check_format()
        self._check_rivals()

    def _check_format(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: got {self.format!r}, need one of {', '.join(FORMATS)}")
        if self.dtype not in STORAGES:
            raise ValueError(f"dtype: got {self.dtype!r}, need one of {', '.join(STORAGES)}")
        if self.format == "block" and self.block is None:
            object.__setattr__(self, "block", (1, 64))
        if self.block is not None and self.format != "block":
            raise ValueError(f"block: got {self.block} for format {self.format!r}, which takes none")
        if (self.nm is None) == (self.format == "nm"):
            raise ValueError(f"nm: got {self.nm} for format {self.format!r}; the nm format needs one, others take none")
        if self.nm is not None:
            check_nm(*self.nm)
        if self.nm is not None and self.sparsity is not None:
            raise ValueError(f"sparsity: got {self.sparsity}, but {self.nm[0]} of {self.nm[1]} says it; leave it out")

    def _check_rivals(self) -> None:
        if self.backend not in ("cpu", "cuda"):
            raise ValueError(f"backend: got {self.backend!r}, need cpu or cuda; for BLAS give against='blas'")
        if self.backend == "cuda":
            if self.against not in GPU_RIVALS:
                raise ValueError(f"against: got {self.against!r} on a GPU, need one of {', '.join(GPU_RIVALS)}")
            if self.threads != 1:
                raise ValueError(f"threads: got {self.threads}, but the cuda backend brings its own; leave it out")
            return
        if not self.exact:
            raise ValueError("exact: got False, but only --backend cuda has another way here; see bench crossover")
        if self.against == "none":
            return
        for rival in self.rivals:
            if rival not in RIVALS[:-1]:
                raise ValueError(f"against: got {rival!r}, need one of {', '.join(RIVALS)}")
        if len({rival in LAYER_RIVALS for rival in self.rivals}) > 1:
            raise ValueError(
                f"against: got {self.against}, but {', '.join(LAYER_RIVALS)} run a whole layer and the others one "
                "product; ask for one kind at a time"
            )
        if "float32" in self.rivals and self.dtype == "float32":
            raise ValueError("against: float32 is our own engine, a rival for narrower weights; give --dtype")
        if self.measures == "product":
            for name, asked, only in (("layers", self.layers, 1), ("variant", self.variant, "evnn")):
                if asked != only:
                    raise ValueError(
                        f"{name}: got {asked!r}, but {self.against} is a rival of one product; need {only}"
                    )

    @property
    def rivals(self) -> tuple[str, ...]:
        """Names in `against`, none for "none"."""
        return () if self.against == "none" else tuple(self.against.split(","))

    @property
    def measures(self) -> str:
        """What is timed: "layer", or "product" where the rivals do just that."""
        return "product" if set(self.rivals) & set(PRODUCT_RIVALS) else "layer"

    @property
    def left_out(self) -> float:
        """Share of blocks or weights that random weights leave out."""
        if self.nm is not None:
            return 1 - self.nm[0] / self.nm[1]
        if self.sparsity is None:
            return 0.0 if self.format == "dense" else 0.9
        return self.sparsity

    def record(self) -> dict:
        """The case in JSON's terms: two equal records are the same measurement."""
        asked = asdict(self)
        asked["activity_asked"], asked["sparsity_asked"] = asked.pop("activity"), self.left_out
        del asked["sparsity"]
        if self.backend == "cpu":  # as it was before there was a choice
            del asked["backend"]
        if self.exact:
            del asked["exact"]
        return asked | {
            "block": f"{self.block[0]}x{self.block[1]}" if self.block else None,
            "nm": ":".join(map(str, self.nm)) if self.nm else None,
            "measures": self.measures,
        }
