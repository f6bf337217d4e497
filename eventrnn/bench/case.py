"""The case of an inference benchmark: sizes and options, and which of them fit together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from eventrnn._checks import need_choice, need_flag, need_number, need_pair, need_text, need_whole
from eventrnn.cells import CELLS
from eventrnn.weights import FORMATS, INTEGER_COLUMNS, STORAGES, check_nm

#: baselines of a whole layer or a stack of layers
LAYER_BASELINES = ("torch", "torch-step", "blas")

#: baselines of one product of a weight matrix with the events of a step
PRODUCT_BASELINES = ("scipy", "torch-csr", "mkl", "numpy", "torch-mm", "c-blocks", "float32")

BASELINES = (*LAYER_BASELINES, *PRODUCT_BASELINES, "none")

#: baselines of a whole layer or a stack of layers on a GPU
GPU_BASELINES = ("cudnn-persistent", "cudnn", "evnn-style", "cusparse", "none")


@dataclass(frozen=True)
class Case:
    """One case to measure. Raises ValueError for options that do not fit together, before any work.

    Attributes
    ----------
    hidden   : units, and inputs, of a layer
    layers   : layers
    batch    : samples
    activity : share of units that send an event in a step, in (0, 1]
    sparsity : share of blocks or weights left out; None is 0.9, or the value that the format implies (dense, nm)
    format   : weight format
    block    : block of the format "block"; None is 1x64
    nm       : (n, m, "post" or "pre") of the format "nm"
    dtype    : storage of the weights
    variant  : equations of the cell
    backend  : "cpu" or "cuda"
    exact    : False lets "cuda" use tensor cores where it measures them to be faster, and "cpu" multiply int8 blocks in
               integers
    threads  : threads of ours and of every baseline that can use them
    against  : baselines, separated by commas, of which the fastest counts. All of them from `LAYER_BASELINES`, which
               are timed beside a whole layer, or all from `PRODUCT_BASELINES`, which are timed beside one product with
               a (hidden, 3 hidden) matrix
    steps    : time steps per run
    repeats  : interleaved rounds
    seed     : seed of everything random
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
            need_whole(name, getattr(self, name), at_least=1)
        need_whole("seed", self.seed, at_least=0)
        need_whole("repeats", self.repeats)
        need_flag("exact", self.exact)
        need_text("against", self.against)
        need_choice("variant", self.variant, CELLS["egru"])
        if self.sparsity is not None:
            need_number("sparsity", self.sparsity, at_least=0, below=1, what="share")
        if self.repeats < 3:
            raise ValueError(f"repeats: got {self.repeats}, need at least 3 for a median")
        need_number("activity", self.activity, above=0, at_most=1, what="share")
        self._check_format()
        self._check_baselines()

    def _check_format(self) -> None:
        need_choice("format", self.format, FORMATS)
        need_choice("dtype", self.dtype, STORAGES)
        if self.block is not None:
            need_pair("block", self.block, "two sizes >= 1 (presynaptic x postsynaptic)")
        if self.format == "block" and self.block is None:
            object.__setattr__(self, "block", (1, 64))
        if self.block is not None and self.format != "block":
            raise ValueError(f"block: got {self.block} for format {self.format!r}, which takes none")
        if (self.nm is None) == (self.format == "nm"):
            raise ValueError(f"nm: got {self.nm} for format {self.format!r}; the nm format needs one, others take none")
        if self.nm is not None:
            check_nm(*self.nm)
        if self.nm is not None and self.sparsity is not None:
            raise ValueError(f"sparsity: got {self.sparsity}, but nm={self.nm[0]}:{self.nm[1]} fixes it; leave it out")

    def _check_baselines(self) -> None:
        if not isinstance(self.backend, str) or self.backend not in ("cpu", "cuda"):
            raise ValueError(f"backend: got {self.backend!r}, need cpu or cuda; for BLAS give against='blas'")
        if self.backend == "cuda":
            for baseline in self.baselines:
                if baseline not in GPU_BASELINES[:-1]:
                    raise ValueError(f"against: got {baseline!r} on a GPU, need one of {', '.join(GPU_BASELINES)}")
            if self.threads != 1:
                raise ValueError(f"threads: got {self.threads}, but it is an option of the cpu backend; leave it out")
            return
        if not self.exact and (self.dtype != "int8" or self.block is None or self.block[1] % INTEGER_COLUMNS):
            raise ValueError(
                f"exact: got False, but a CPU multiplies only int8 weights in blocks of {INTEGER_COLUMNS} columns, or "
                f"a multiple of them, in integers; got {self.dtype} in format {self.format!r}"
                + (f" of {self.block[0]}x{self.block[1]}" if self.block else "")
                + "; give --dtype int8 and such blocks, or leave it out"
            )
        if self.against == "none":
            return
        for baseline in self.baselines:
            if baseline not in BASELINES[:-1]:
                raise ValueError(f"against: got {baseline!r}, need one of {', '.join(BASELINES)}")
        if len({baseline in LAYER_BASELINES for baseline in self.baselines}) > 1:
            raise ValueError(
                f"against: got {self.against}, but {', '.join(LAYER_BASELINES)} run a whole layer and the others one "
                "product; give one kind at a time"
            )
        if "float32" in self.baselines and self.dtype == "float32":
            raise ValueError("against: float32 is our own engine, a baseline for narrower weights; give --dtype")
        if "c-blocks" in self.baselines:
            if self.threads != 1:
                raise ValueError(f"threads: got {self.threads}, but the baseline c-blocks has one thread; leave it out")
            if self.hidden < 4:
                raise ValueError(f"hidden: got {self.hidden}, but a block of the baseline c-blocks has 4 inputs")
        if self.measures == "product":
            for name, asked, only in (("layers", self.layers, 1), ("variant", self.variant, "evnn")):
                if asked != only:
                    raise ValueError(
                        f"{name}: got {asked!r}, but {self.against} is a baseline of one product; need {only}"
                    )

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names in `against`; empty for "none"."""
        return () if self.against == "none" else tuple(self.against.split(","))

    @property
    def measures(self) -> str:
        """What is timed: "product" where the baselines compute one product, else "layer"."""
        return "product" if set(self.baselines) & set(PRODUCT_BASELINES) else "layer"

    @property
    def left_out(self) -> float:
        """Share of the blocks or weights that are left out of random weights."""
        if self.nm is not None:
            return 1 - self.nm[0] / self.nm[1]
        if self.sparsity is None:
            return 0.0 if self.format == "dense" else 0.9
        return self.sparsity

    def record(self) -> dict:
        """The case as JSON values. Equal records describe the same measurement."""
        asked = asdict(self)
        asked["activity_asked"], asked["sparsity_asked"] = asked.pop("activity"), self.left_out
        del asked["sparsity"]
        if self.backend == "cpu":  # recorded lines that are older than this option have no backend
            del asked["backend"]
        if self.exact:
            del asked["exact"]
        return asked | {
            "block": f"{self.block[0]}x{self.block[1]}" if self.block else None,
            "nm": ":".join(map(str, self.nm)) if self.nm else None,
            "measures": self.measures,
        }
