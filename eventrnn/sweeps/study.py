"""Proposals of optuna that do not depend on workers, and that a resumed sweep makes again.

Results are told in the order of the trials, and trial k is proposed once those up to k - ahead are told. So the
proposals are a function of the study and of its results. Nothing of optuna is stored: a study that is resumed asks and
tells again what is known already, which costs milliseconds per trial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from math import isfinite
from typing import Any

from eventrnn.sweeps.plan import Study, is_whole, plain
from eventrnn.sweeps.results import DONE


def need_optuna() -> None:
    """Raise ImportError where optuna is not installed."""
    if find_spec("optuna") is None:
        raise ImportError("study: needs optuna: pip install 'eventrnn[sweep]'")


class Proposals:
    """The trials of a study: proposed and told in order."""

    def __init__(self, study: Study):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self.plan = study
        self._study = optuna.create_study(
            direction="maximize" if study.maximise else "minimize", sampler=kinds[study.sampler](seed=study.seed)
        )
        self._space = {key: _distribution(values) for key, values in study.space.items()}
        self._trials: list[Any] = []
        self._results: dict[int, Mapping[str, Any]] = {}
        self._told = 0

    def tell(self, number: int, result: Mapping[str, Any]) -> None:
        """The result of a trial, in any order."""
        self._results[number] = result

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """The number and the settings of the next trial; None where it waits for results, or where there is none."""
        import optuna

        number = len(self._trials)
        if number == self.plan.trials:
            return None
        while self._told <= number - self.plan.ahead:
            result = self._results.get(self._told)
            if result is None:
                return None
            value = result.get(self.plan.goal)
            if result["state"] == DONE and isinstance(value, int | float) and isfinite(value):
                self._study.tell(self._trials[self._told], value)
            else:
                self._study.tell(self._trials[self._told], state=optuna.trial.TrialState.FAIL)
            self._told += 1
        trial = self._study.ask(self._space)
        self._trials.append(trial)
        found = {key: _value(self.plan.space[key], trial.params[key]) for key in self._space}
        return number, found


def _distribution(values: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Mapping):
        # Lists cannot be choices, but their texts can.
        return CategoricalDistribution([json.dumps(plain(value)) for value in values])
    low, high, step = (plain(values.get(name)) for name in ("low", "high", "step"))
    log = bool(values.get("log", False))
    if is_whole(values):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)


def _value(values: Any, proposed: Any) -> Any:
    return proposed if isinstance(values, Mapping) else json.loads(proposed)
