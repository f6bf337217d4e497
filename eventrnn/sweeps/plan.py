"""What a sweep is: the recipe that all runs share, and the settings in which they differ.

A point is one run. Its settings are those of the preset, of the recipe file, of `settings`, and of the point, in this
order. Points are numbered from 0, and the number says where the point lies in the folder of the sweep.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import need_choice, need_flag, need_kind, need_number, need_text, need_whole, said
from eventrnn._files import is_endless, printable
from eventrnn.data.text import located, read_stream
from eventrnn.io.named import located_model
from eventrnn.network import Network
from eventrnn.training.recipes.pruning import PruningRecipe
from eventrnn.training.recipes.recipe import FIGURES, DataSettings, ModelSettings, Recipe, load_recipe
from eventrnn.training.recipes.toml_config import nested, read_toml
from eventrnn.training.tasks import LanguageModelling
from eventrnn.training.trainer import updates

# The key that names the preset of a point. All other keys are those of the recipe.
PRESET = "preset"

# The model file in the folder of a point.
MODEL = "model.safetensors"

# Settings that the sweep itself chooses.
OWN_KEYS = {"run.out": "every point writes its own model file"}

# Keys whose values are paths.
PATHS = ("data.text", "distillation.teacher")

SAMPLERS = ("tpe", "random")

# Most combinations of the ends of a study that are all checked; each takes milliseconds.
MOST_CORNERS = 1000

# What a range of a study is made of.
RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Study:
    """A search by optuna, whose proposals follow from earlier results.

    Attributes
    ----------
    space    : key of the recipe -> values to choose from, or a range `{"low": 1e-4, "high": 1e-2, "log": True}`, with
               whole numbers for a setting that is one, and "step" for evenly spaced values
    trials   : number of points
    ahead    : trial k is proposed once the results of all trials up to k - ahead are known. So many points at most are
               trained at a time, and the proposals depend on this number, but not on the workers
    goal     : figure of a result that is minimised
    maximise : maximise it instead
    sampler  : "tpe" or "random", of optuna
    seed     : seed of the sampler

    Raises ValueError for a value outside its range.
    """

    space: Mapping[str, Any]
    trials: int = 20
    ahead: int = 4
    goal: str = "bits_per_symbol_best"
    maximise: bool = False
    sampler: str = "tpe"
    seed: int = 0

    def __post_init__(self):
        need_kind("study space", self.space, Mapping, "a mapping of keys to values or ranges")
        need_whole("study trials", self.trials, at_least=1)
        need_whole("study ahead", self.ahead, at_least=1)
        need_choice("study goal", self.goal, FIGURES)
        need_flag("study maximise", self.maximise)
        need_choice("study sampler", self.sampler, SAMPLERS)
        need_whole("study seed", self.seed, at_least=0, at_most=2**32 - 1)
        if not self.space:
            raise ValueError("study: its space is empty; give it at least one key of the recipe")
        for key, values in self.space.items():
            _check_space(key, values)

    def corners(self) -> Iterator[dict[str, Any]]:
        """Points in which every key has one of its values or an end of its range, to be checked before any work.

        They are all combinations, up to `MOST_CORNERS`. Of more, they are the one of the first values and low ends, and
        those that differ from it in one key.
        """
        ends = {key: _ends(values) for key, values in self.space.items()}
        if math.prod(map(len, ends.values())) <= MOST_CORNERS:
            yield from (dict(zip(ends, row, strict=True)) for row in itertools.product(*ends.values()))
            return
        first = {key: values[0] for key, values in ends.items()}
        yield first
        for key, values in ends.items():
            yield from (first | {key: value} for value in values[1:])


@dataclass(frozen=True)
class Sweep:
    """Many runs of one recipe.

    Attributes
    ----------
    preset   : recipe to start from, as of `load_recipe`
    config   : tables of a recipe that replace those of the preset; `load_sweep` reads them from a file
    settings : key of the recipe -> value, the same in all points
    grid     : key of the recipe, or "preset" -> values; every combination is a point, the last key changes fastest
    points   : settings of single points, each a mapping like `settings`; with a grid, each is combined with all of it
    study    : a search in place of a grid and of points

    Raises ValueError for an empty grid, for a key that is given twice, and for one that a sweep chooses itself.
    """

    preset: str = "characters"
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()
    study: Study | None = None

    def __post_init__(self):
        need_text("preset", self.preset)
        for name in ("config", "settings", "grid"):
            need_kind(name, getattr(self, name), Mapping, "a mapping of keys of the recipe")
        for key, values in self.grid.items():
            if isinstance(values, str | Mapping) or not isinstance(values, Sequence | np.ndarray):
                raise ValueError(f"grid: {key}: got {said(values)}, need a list of values such as [0, 1, 2]")
            if not len(values):
                raise ValueError(f"grid: {key}: has no value, so there is no point; give it at least one")
        need_kind("points", self.points, Sequence, "a list of mappings of keys of the recipe")
        for each in self.points:
            need_kind("points", each, Mapping, "a mapping of keys of the recipe for each point")
        if self.study is not None and (self.grid or self.points):
            raise ValueError("study: got a grid or points besides; give a study or a grid")
        if self.study is None and not self.grid and not self.points:
            raise ValueError("grid: got no key; name at least one key of the recipe and its values, or give a study")
        self._check_keys()

    def _check_keys(self) -> None:
        if PRESET in self.settings:
            raise ValueError("settings: preset is no key of the recipe; give it beside the settings")
        where, axes = ("grid", self.grid) if self.study is None else ("study", self.study.space)
        taken = _taken({}, "settings", {key: [value] for key, value in self.settings.items()})
        taken = _taken(taken, where, {key: [None] if isinstance(each, Mapping) else each for key, each in axes.items()})
        for each in self.points:
            _taken(taken, "points", {key: [value] for key, value in each.items()})

    @property
    def axes(self) -> tuple[str, ...]:
        """The keys in which points can differ, in the order in which they are given."""
        keys = self.study.space if self.study is not None else [*itertools.chain(*self.points), *self.grid]
        return tuple(dict.fromkeys(keys))

    def combinations(self) -> list[dict[str, Any]]:
        """Settings of every point of a grid, in the order of their numbers."""
        listed = [dict(each) for each in self.points] or [{}]
        values = [list(each) for each in self.grid.values()]
        return [each | dict(zip(self.grid, row, strict=True)) for each in listed for row in itertools.product(*values)]

    def anchored(self) -> Sweep:
        """The sweep with absolute paths, so that it can go on when another folder is the current one."""

        def anchor(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {key: _absolute(value) if key in PATHS else value for key, value in settings.items()}

        return replace(
            self,
            config=nested(anchor(flat(self.config)).items()),
            settings=anchor(self.settings),
            grid=anchor(self.grid),
            points=tuple(map(anchor, self.points)),
            study=None if self.study is None else replace(self.study, space=anchor(self.study.space)),
        )

    def recipe(self, chosen: Mapping[str, Any], folder: Path) -> Recipe:
        """The recipe of the point with these settings, whose files lie in the folder.

        Paths become absolute. Raises ValueError for an unknown key and for a value that is not allowed.
        """
        single = {key: value for key, value in chosen.items() if key != PRESET}
        recipe = load_recipe(
            self.config or None,
            preset=chosen.get(PRESET, self.preset),
            settings=[(key, plain(value)) for key, value in {**self.settings, **single}.items()],
        )
        text = recipe.data.text
        return replace(
            recipe,
            data=replace(recipe.data, text=text if text == "builtin" else str(located(text).absolute())),
            distillation=replace(recipe.distillation, teacher=_absolute(recipe.distillation.teacher)),
            run=replace(recipe.run, out=str(folder.absolute() / MODEL)),
        )


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes
    ----------
    number : from 0
    chosen : its own settings
    recipe : all of its settings
    folder : where it lies
    """

    number: int
    chosen: Mapping[str, Any]
    recipe: Recipe
    folder: Path


def point_folder(folder: Path, number: int) -> Path:
    """The folder of a point in that of the sweep."""
    return folder / "points" / f"{number:04d}"


def point(sweep: Sweep, folder: Path, number: int, chosen: Mapping[str, Any]) -> Point:
    """A point of the sweep in the folder. Raises ValueError, which names it, where its settings are not allowed."""
    own = point_folder(folder, number)
    try:
        return Point(number, chosen, sweep.recipe(chosen, own), own)
    except ValueError as error:
        raise ValueError(f"point {number} ({described(chosen)}): {error}") from None


def known_points(sweep: Sweep, folder: Path) -> list[Point]:
    """The points of the sweep in the folder, checked before any work; of a study its corners, which are no trials.

    Every text is read once. Raises ValueError, which names the point, for settings that are not allowed, for points
    that are the same run, and for texts and teachers that cannot be read.
    """
    chosen = sweep.combinations() if sweep.study is None else sweep.study.corners()
    points = [point(sweep, folder, number, each) for number, each in enumerate(chosen)]
    if sweep.study is not None:
        _check_ranges(sweep.study, points[0].recipe)
    _check_points(points, distinct=sweep.study is None)
    return points


def _check_points(points: Sequence[Point], distinct: bool) -> None:
    seen: dict[Recipe, int] = {}
    known = _Known()
    for each in points:
        alone = replace(each.recipe, run=replace(each.recipe.run, out=""))
        if distinct and alone in seen:
            raise ValueError(
                f"points {seen[alone]} and {each.number} are the same run ({described(each.chosen)}); "
                "give every value of the grid once"
            )
        seen[alone] = each.number
        try:
            _check_inputs(each.recipe, known)
        except ValueError as error:
            raise ValueError(f"point {each.number} ({described(each.chosen)}): {error}") from None


@dataclass(frozen=True)
class _Known:
    """What needs no second check.

    tasks   : those of texts that are read already, with the number of symbols
    fitting : texts, batches and windows that are known to fit
    pruned  : models, numbers of symbols and prunings that are known to fit
    """

    tasks: dict[DataSettings, tuple[LanguageModelling, int]] = field(default_factory=dict)
    fitting: set[tuple[DataSettings, int, int]] = field(default_factory=set)
    pruned: set[tuple[ModelSettings, int, PruningRecipe]] = field(default_factory=set)


def _check_inputs(recipe: Recipe, known: _Known) -> None:
    """Refuse what would end the training before its first update."""
    data, training = recipe.data, recipe.training
    if training.devices > 1:
        raise ValueError(f"devices: got {training.devices}, but a point of a sweep has one GPU; leave it out")
    if data not in known.tasks:
        if data.text != "builtin" and read_stream(data.text) is not None:
            raise ValueError(f"text: {printable(data.text)} can be read only once, but many runs read it; give a file")
        corpus = data.corpus()
        task = LanguageModelling(corpus.train, corpus.valid, valid_batch=data.valid_batch, carry=data.carry)
        known.tasks[data] = task, len(corpus.vocabulary)
    task, symbols = known.tasks[data]
    if (data, training.batch, training.window) not in known.fitting:
        smallest = Network.random([1], symbols=symbols, embedding=1, readout=symbols, rng=np.random.default_rng(0))
        task.check(smallest, training.batch, training.window)
        known.fitting.add((data, training.batch, training.window))
    schedule = recipe.pruning.schedule(updates(training, task))
    if schedule is not None and (recipe.model, symbols, recipe.pruning) not in known.pruned:
        # Whether a matrix has enough blocks does not depend on its weights.
        shapes = recipe.model.matrices(symbols)
        schedule.check({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        known.pruned.add((recipe.model, symbols, recipe.pruning))
    teacher = recipe.distillation.teacher
    if teacher and not located_model(teacher).is_file():
        raise ValueError(f"teacher: {printable(teacher)}: no such file")


def described(chosen: Mapping[str, Any]) -> str:
    """Settings in words."""
    return printable(", ".join(f"{key}={value}" for key, value in chosen.items()), 200)


# --- files --------------------------------------------------------------------------------------------------


def load_sweep(path: str | Path, *, settings: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep of a TOML file.

    path     : a file with `preset`, `config` (a recipe file), and the tables `settings`, `grid`, `points` (an array of
               tables) and `study` with `study.space`; see `Sweep` and `Study`. Relative paths are those of the current
               folder
    settings : further settings, which win over those of the file

    Raises ValueError for a file that cannot be read, an unknown name with the most similar known one, and a value that
    is not allowed.
    """
    table = _read(path, "sweep")
    given: dict[str, Any] = {"settings": flat(_table(table, "settings")) | dict(settings or {})}
    known = ("preset", "config", "settings", "grid", "points", "study")
    for name in table:
        if name not in known:
            raise ValueError(f"sweep: {printable(path)}: unknown name {printable(name)}; {_nearest(name, known)}")
    if "preset" in table:
        given["preset"] = table["preset"]
    if "config" in table:
        given["config"] = _read(need_text("config", table["config"]), "config")
    if "grid" in table:
        given["grid"] = flat(_table(table, "grid"))
        if not given["grid"]:
            raise ValueError("grid: is empty; name at least one key of the recipe and its values")
    if "points" in table:
        rows = table["points"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("points: need at least one table [[points]] of keys of the recipe")
        given["points"] = tuple(map(flat, rows))
    if "study" in table:
        given["study"] = _study(_table(table, "study"))
    return Sweep(**given)


def flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Dotted keys and their values. A table that is a range of a study is a value.

    Raises ValueError for a key that is there twice, as a name with dots in quotes and within tables.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        inner = isinstance(value, Mapping) and not (value and set(value) <= set(RANGE))
        for single, each in (flat(value, name) if inner else {name: value}).items():
            if single in found:
                raise ValueError(f"{printable(single)} is given twice; give it once")
            found[single] = each
    return found


def _study(table: dict[str, Any]) -> Study:
    known = tuple(Study.__dataclass_fields__)
    for name in table:
        if name not in known:
            raise ValueError(f"study: unknown name {printable(name)}; {_nearest(name, known)}")
    given: dict[str, Any] = table | {"space": flat(_table(table, "space"))}
    return Study(**given)


def _read(path: str | Path, name: str) -> dict[str, Any]:
    if is_endless(path):
        raise ValueError(f"{name}: {printable(path)} is a device; need a file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: {printable(path)} cannot be read: {reason}") from None
    return read_toml(text, path)


def _table(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name}: got {said(found)}, need a table [{name}]")
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"have {', '.join(known)}"


# --- values -------------------------------------------------------------------------------------------------


def _absolute(value: Any) -> Any:
    """A path, or a list of paths, of files that exist as absolute ones."""
    if isinstance(value, list | tuple):
        return [_absolute(each) for each in value]
    named = isinstance(value, str) and value not in ("", "builtin")
    return str(Path(value).absolute()) if named and Path(value).exists() else value


def _taken(taken: Mapping[str, str], where: str, axes: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The single keys of a recipe that are set, each with the part of the sweep that sets it.

    taken : those that are set already
    where : the part of the sweep that sets further ones
    axes  : key -> the values that it takes, which may be tables of further keys

    Raises ValueError for a single key that is set twice, and for one that a sweep sets itself.
    """
    found = dict(taken)
    for key, values in axes.items():
        for single in dict.fromkeys(name for value in values for name in flat({need_text(where, key): value})):
            if single in OWN_KEYS:
                raise ValueError(f"{single}: {OWN_KEYS[single]}; leave it out")
            if single in found:
                place = found[single]
                raise ValueError(
                    f"{place}: {single} is given twice, so that one of its values would be ignored; give it once"
                )
            found[single] = where
    return found


def plain(value: Any) -> Any:
    """A value of NumPy as one of Python, and any sequence as a list."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    return value


def _check_space(key: str, values: Any) -> None:
    if isinstance(values, Mapping):
        for name in values:
            if name not in RANGE:
                raise ValueError(f"study: {key}: unknown name {printable(name)}; {_nearest(name, RANGE)}")
        for name in ("low", "high"):
            if name not in values:
                raise ValueError(f"study: {key}: the range has no {name}; give low and high, or a list of values")
        low = need_number(f"study: {key}: low", values["low"])
        need_number(f"study: {key}: high", values["high"], above=low)
        if need_flag(f"study: {key}: log", values.get("log", False)):
            need_number(f"study: {key}: low", values["low"], above=0)
            if "step" in values:
                raise ValueError(f"study: {key}: a range with log=true has no step; leave one of them out")
        if "step" in values:
            need_number(f"study: {key}: step", values["step"], above=0)
            if is_whole(values) != isinstance(plain(values["step"]), int):
                raise ValueError(f"study: {key}: step: got {said(values['step'])}, need a number of the kind of low")
        return
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"study: {key}: got {said(values)}, need a list of values or a range with low and high")
    if not values:
        raise ValueError(f"study: {key}: has no value; give it at least one")


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a range is one of whole numbers."""
    return isinstance(plain(values["low"]), int) and isinstance(plain(values["high"]), int)


def _check_ranges(study: Study, recipe: Recipe) -> None:
    """Refuse a range of whole numbers for a setting that takes others too, of which none would be proposed.

    recipe : of any point
    """
    for key, values in study.space.items():
        if isinstance(values, Mapping) and is_whole(values):
            found: Any = recipe
            for name in key.split("."):
                found = getattr(found, name)
            if isinstance(found, float):
                low = plain(values["low"])
                raise ValueError(
                    f"study: {key}: low: got {low}, so that only whole numbers would be proposed; write {float(low)}, "
                    "or a list of values"
                )


def _ends(values: Any) -> list[Any]:
    return [values["low"], values["high"]] if isinstance(values, Mapping) else list(values)
