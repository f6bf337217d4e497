"""Calls are whole: an exception leaves the last whole call, two calls never mix, and copies are independent."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import warnings

import numpy as np
import pytest

from eventrnn.backend import get_backend
from eventrnn.cpu import engine as cpu
from eventrnn.pruning import Combined, DynamicMasks, GradualPruning, GroupLasso, MovementPruning, RegrownMasks
from eventrnn.pruning import patterns as pattern
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State
from eventrnn.training import LanguageModelling, Model, Regularisers, Settings, Trainer
from support.conformance import assert_same_state
from support.small_runs import KINDS, drawn, inputs, of_kind

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


# Kinds of networks, each with a way to use a simulator before it is copied.
USED_KINDS = [("gru", "run"), ("lstm", "step"), ("gated", "run"), ("gated", "step")]


class Fault(BaseException):
    """What a signal handler raises, and no part of the library knows."""


# --- a simulator ----------------------------------------------------------------------------------------------------


def test_a_step_of_inputs_that_another_thread_has_put_right_is_not_made(monkeypatch):
    simulator, x = Simulator(drawn(), batch=2), inputs(3)
    simulator.step(x[0])
    before, check = simulator.state, simulator._stepper.check
    x[1, 0, 0] = np.nan

    def changed(given):
        given[:] = 0
        return check(given)

    monkeypatch.setattr(simulator._stepper, "check", changed)
    with pytest.raises(ValueError, match="another thread changed them"):
        simulator.step(x[1])
    assert_same_state(simulator.state, before)


@pytest.mark.parametrize(
    ("kind", "symbols"), [("egru", False), ("egru", True), *((kind, False) for kind in KINDS)], ids=str
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_step_that_raises_is_not_made(place, kind, symbols, monkeypatch):
    network, x = drawn(symbols, kind), inputs(6, symbols)
    whole, simulator = simulate(network, x), Simulator(network, batch=2)
    for each in x[:2]:
        simulator.step(each)
    before, stepper = simulator.state, simulator._stepper
    kernel = stepper.kernel

    def interrupted(*arguments):
        if place == "after":
            kernel(*arguments)
        raise Fault

    monkeypatch.setattr(stepper, "kernel", interrupted)
    with pytest.raises(Fault):
        simulator.step(x[2])
    monkeypatch.undo()
    assert_same_state(simulator.state, before)
    assert np.array_equal(np.stack([simulator.step(each) for each in x[2:]]), whole.output[2:])


@pytest.mark.parametrize(("threads", "alone"), [(1, True), (2, False)])
@pytest.mark.parametrize("call", ["step", "run"])
def test_an_exception_while_a_call_gives_back_its_lock_takes_the_call_back(call, threads, alone, monkeypatch):
    monkeypatch.setattr(cpu, "MOST_ALONE", float("inf") if alone else 0)
    network, x = drawn(), inputs(4)
    simulator = Simulator(network, batch=2, threads=threads)
    make = simulator.run if call == "run" else lambda part: simulator.step(part[0])
    make(x[:1])
    before, lock = simulator.state, simulator._use.lock

    class Late:
        """A lock after whose release a signal handler raises, once."""

        def __enter__(self):
            lock.acquire()

        def __exit__(self, *error):
            lock.release()
            simulator._use.lock = lock
            raise Fault

    simulator._use.lock = Late()
    with pytest.raises(Fault):
        make(x[1:2])
    assert_same_state(simulator.state, before)
    make(x[1:2])
    assert_same_state(simulator.state, simulate(network, x[:2]).state)


@pytest.mark.parametrize("kind", ["egru", *KINDS])
@pytest.mark.parametrize("call", ["step", "run", "trainer"])
# Python reports the exception of an alarm within a finaliser or a callback of the garbage collector so, and drops it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_calls_that_alarms_break_off_leave_the_last_whole_call(call, kind, monkeypatch):
    """On two threads, at any moment. Where an alarm comes does not decide what holds."""
    monkeypatch.setattr(cpu, "MOST_ALONE", 0)
    simulator, x = Simulator(drawn(kind=kind), batch=2, threads=2), inputs(40)
    trainer = trained(threads=2, kind=kind)
    advance = {"step": lambda: simulator.step(x[0]), "run": lambda: simulator.run(x), "trainer": trainer.step}[call]
    arrays, numbers = {name: array.copy() for name, array in trainer.arrays().items()}, trainer.numbers()

    def reset():
        simulator.reset()
        trainer.restore(arrays, numbers)

    def state():
        return [a.tobytes() for a in (*simulator.state.cells, *simulator.state.outputs)], bits(trainer)

    def late(number, frame):
        raise Fault

    rng, handler = np.random.default_rng(2), signal.signal(signal.SIGALRM, late)
    try:
        for _ in range(10):
            reset()
            made = 0
            try:
                # Again after a second: an exception that a handler raises within a finaliser is lost.
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-4, 2e-2)), 1.0)
                while True:
                    advance()
                    made += 1
            except Fault:
                signal.setitimer(signal.ITIMER_REAL, 0)
                found = state()
            reset()
            expected = []
            for _ in range(made):
                advance()
            expected.append(state())
            advance()
            assert found in (*expected, state())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_a_call_within_a_call_is_refused_and_the_outer_call_is_made():
    network, x, refused = drawn(), inputs(3), []
    simulator = Simulator(network, batch=2)
    run = simulator.engine.run

    def nosy(*arguments, **keywords):
        """A signal handler that uses the simulator within its own run."""
        for use in (lambda: simulator.state, simulator.reset, lambda: simulator.step(x[0]), lambda: simulator.run(x)):
            with pytest.raises(RuntimeError, match="simulator: in use by a call that has not returned"):
                use()
            refused.append(use)
        return run(*arguments, **keywords)

    simulator.engine.run = nosy
    assert np.array_equal(simulator.run(x).output, simulate(network, x).output)
    assert len(refused) == 4
    assert_same_state(simulator.state, simulate(network, x).state)


def test_calls_from_two_threads_are_made_one_after_the_other():
    network, x = drawn(), inputs(300)
    first = simulate(network, x)
    wanted = {first.output.tobytes(), simulate(network, x, state=first.state).output.tobytes()}
    for _ in range(5):
        simulator, found = Simulator(network, batch=2), set()
        callers = [threading.Thread(target=lambda: found.add(simulator.run(x).output.tobytes())) for _ in range(2)]  # noqa: B023
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert found == wanted


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kind", "used"), [*(("egru", used) for used in ("step", "run", "not")), *USED_KINDS])
def test_a_copy_of_a_simulator_goes_on_by_itself(kind, used, threads, how):
    network, x = drawn(kind=kind), inputs(9)
    whole, simulator = simulate(network, x).output, Simulator(network, batch=2, threads=threads)
    begun = 0 if used == "not" else 4
    for each in x[:begun] if used == "step" else ():
        simulator.step(each)
    if used == "run":
        simulator.run(x[:begun])
    other = COPIES[how](simulator)
    for each in x[::-1]:
        other.step(each)
    later = COPIES[how](simulator)
    assert np.array_equal(simulator.run(x[begun:]).output, whole[begun:])
    del simulator
    assert np.array_equal(np.stack([later.step(each) for each in x[begun:]]), whole[begun:])


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_engine_or_a_network_gives_the_same_bits(how):
    network, x = drawn(symbols=True), inputs(5, symbols=True)
    expected = simulate(network, x)
    assert np.array_equal(simulate(COPIES[how](network), x).output, expected.output)
    engine = get_backend("cpu").engine(network, threads=2)
    engine.run(engine.prepare(x), State.zeros(network, 2))
    other = COPIES[how](engine)
    assert other.team is not engine.team
    assert np.array_equal(other.run(other.prepare(x), State.zeros(network, 2)).output, expected.output)
    with pytest.raises(TypeError, match="stepper: .* cannot be copied; copy the simulator"):
        COPIES[how](get_backend("cpu").engine(network).stepper(State.zeros(network, 2)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_use_the_simulators_and_trainers_of_its_parent(monkeypatch):
    monkeypatch.setattr(cpu, "MOST_ALONE", 0)
    network, x = drawn(), inputs(4)
    simulator, trainer, twin = Simulator(network, batch=2, threads=2), trained(threads=2), trained(threads=2)
    simulator.run(x[:2])
    trainer.step()
    for _ in range(2):
        twin.step()
    holding, go = threading.Event(), threading.Event()

    def hold():
        with simulator._use.lock:
            holding.set()
            go.wait()

    # Another thread uses the simulator while the process is forked; that thread is not in the child.
    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        outputs = np.stack([simulator.step(x[2]), simulator.run(x[3:]).output[0]])
        trainer.step()
        same = np.array_equal(outputs, simulate(network, x).output[2:]) and bits(trainer) == bits(twin)
        os._exit(0 if same else 1)
    go.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- a trainer ------------------------------------------------------------------------------------------------------

TEXT = np.random.default_rng(5).integers(0, 8, 400)


def trained(threads: int = 1, pruning=None, steps: int = 40, kind: str = "egru", **changes) -> Trainer:
    """A trainer; products go over events where units are silent."""
    network = of_kind(kind, [20, 11], symbols=8, embedding=5, readout=8)
    noise = Regularisers(0.3, 0.1, 0.2, 0.1, 0.1, 0.1)
    options = {"steps": steps, "batch": 3, "window": 6, "window_jitter": 2.0, "learning_rate": 1e-2}
    options |= {"backward": "auto" if kind in ("gru", "lstm") else "sparse"}
    settings = Settings(**(options | {"threads": threads, "regularisers": noise} | changes))
    return Trainer(network, LanguageModelling(TEXT[:300], TEXT[300:]), settings, pruning=pruning)


def bits(trainer: Trainer) -> dict:
    return {name: array.tobytes() for name, array in trainer.arrays().items()} | {"rest": trainer.numbers()}


PRUNINGS = {
    "none": lambda: None,
    "gradual": lambda: GradualPruning(0.5, start=1, end=8, every=2),
    "movement": lambda: MovementPruning(0.5, start=1, end=8, every=2),
    "regrown": lambda: RegrownMasks(0.5, start=0, end=8, every=3),
    "dynamic": lambda: DynamicMasks(pattern.Blocks(0.5, (1, 4)), start=0, end=8, every=3),
    "lasso and movement": lambda: Combined(
        GroupLasso(1e-3, start=0, end=9), MovementPruning(0.5, start=1, end=8, every=2)
    ),
}


# Kinds of networks, each with a pruning method.
PRUNED_KINDS = [("gru", "regrown"), ("lstm", "dynamic"), ("lstm", "gradual"), ("gated", "none")]


@pytest.mark.parametrize("place", ["forward", "loss", "backward", "commit"])
@pytest.mark.parametrize(("kind", "method"), [*(("egru", method) for method in PRUNINGS), *PRUNED_KINDS])
def test_an_update_that_raises_is_not_made_and_can_be_made_again(kind, method, place, monkeypatch):
    trainer, twin = (trained(pruning=PRUNINGS[method](), kind=kind) for _ in range(2))
    owner, name = {
        "forward": (trainer.model, "forward"),
        "loss": (trainer.task, "loss"),
        "backward": (trainer.model, "backward"),
        "commit": (trainer._transaction, "uninterrupted"),
    }[place]
    own, calls = getattr(owner, name), [0]

    def interrupted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == 1:
            if place != "commit":
                own(*arguments, **keywords)
            raise Fault
        return own(*arguments, **keywords)

    for _ in range(10):
        before = bits(trainer)
        assert before == bits(twin)
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(Fault):
                trainer.step()
        assert bits(trainer) == before
        trainer.step()
        twin.step()
    assert bits(trainer) == bits(twin)


def test_an_interrupt_while_an_update_is_committed_leaves_the_whole_update(monkeypatch):
    from eventrnn.cpu.threads import Job

    trainer, twin, wait = trained(), trained(), Job.wait

    def interrupted(job, shares):
        wait(job, shares)
        monkeypatch.undo()
        raise Fault

    monkeypatch.setattr(Job, "wait", interrupted)
    with pytest.raises(Fault):
        trainer.step()
    twin.step()
    assert bits(trainer) == bits(twin)
    trainer.step()
    twin.step()
    assert bits(trainer) == bits(twin)


def test_a_commit_that_fails_half_way_is_remembered_until_a_checkpoint_is_restored(monkeypatch):
    trainer, twin = trained(), trained()
    trainer.step()
    arrays, numbers = {name: array.copy() for name, array in trainer.arrays().items()}, trainer.numbers()
    apply = trainer.model.apply_masks

    def short():
        raise MemoryError("no memory")

    monkeypatch.setattr(trainer.model, "apply_masks", short)
    with pytest.raises(MemoryError, match="no memory"):
        trainer.step()
    monkeypatch.setattr(trainer.model, "apply_masks", apply)
    words = "trainer: its last update failed half-way .MemoryError: no memory.; restore the last checkpoint, here or in"
    for use in (trainer.step, trainer.validate, trainer.network, trainer.arrays, trainer.numbers):
        with pytest.raises(RuntimeError, match=words):
            use()
    trainer.restore(arrays, numbers)
    for _ in range(2):
        twin.step()
    trainer.step()
    assert bits(trainer) == bits(twin)


def test_what_cannot_be_restored_changes_nothing_and_a_restore_that_fails_half_way_is_remembered():
    trainer, twin = trained(), trained()
    for each in (trainer, twin):
        each.step()
    before, after = trainer.arrays(), trainer.numbers()
    arrays, numbers = {name: array.copy() for name, array in before.items()}, dict(after)
    some = next(name for name in arrays if name.startswith("parameters."))
    for wrong, missing, words in (
        ({}, numbers, "arrays: parameters"),
        (arrays | {some: arrays[some][:1]}, numbers, f"arrays: {some} does not fit"),
        (arrays | {"parameters.more": arrays[some]}, numbers, "arrays: parameters.more does not fit"),
        (arrays, {}, "numbers: got none named steps"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer.restore(wrong, missing)
    assert bits(trainer) == bits(twin)
    with pytest.raises(TypeError):
        trainer.restore(arrays, numbers | {"generator": 3})
    with pytest.raises(RuntimeError, match="failed half-way"):
        trainer.step()
    trainer.restore(arrays, numbers)
    for each in (trainer, twin):
        each.step()
    assert bits(trainer) == bits(twin)


def test_an_interrupted_validation_changes_nothing(monkeypatch):
    changes = {"learning_rate": 0.5}
    trainer, twin = trained(**changes), trained(**changes)
    for each in (trainer, twin):
        each.step()
        each.validate()
        each.step()
    before, evaluate = bits(trainer), trainer.task.evaluate

    def interrupted(model):
        evaluate(model)
        raise Fault

    monkeypatch.setattr(trainer.task, "evaluate", interrupted)
    with pytest.raises(Fault):
        trainer.validate()
    monkeypatch.undo()
    assert bits(trainer) == before
    assert trainer.validate() == twin.validate()
    assert bits(trainer) == bits(twin)


def test_a_trainer_is_refused_within_its_own_update(monkeypatch):
    """By its task on the calling thread, and by a pruning method on the thread that commits the update."""
    trainer = trained(pruning=GradualPruning(0.5, start=1, end=8, every=2))
    loss, refused = LanguageModelling.loss, []

    def use_trainer():
        for use in (trainer.step, trainer.validate, trainer.network, trainer.arrays):
            with pytest.raises(RuntimeError, match="trainer: in use by a call that has not returned"):
                use()
            refused.append(threading.get_ident())

    def nosy(task, output, batch):
        use_trainer()
        return loss(task, output, batch)

    monkeypatch.setattr(LanguageModelling, "loss", nosy)
    monkeypatch.setattr(trainer.pruning, "after_step", lambda *arguments: use_trainer(), raising=False)
    assert trainer.step().step == 1
    assert len(refused) == 8
    assert len(set(refused)) == 2


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("threads", "kind"), [(1, "egru"), (2, "egru"), (1, "gru"), (2, "lstm"), (2, "gated")])
def test_a_copy_of_a_trainer_goes_on_by_itself(threads, kind, how):
    trainer, twin = (trained(threads, RegrownMasks(0.5, start=0, end=8, every=3), kind=kind) for _ in range(2))
    for each in (trainer, twin):
        for _ in range(3):
            each.step()
    other = COPIES[how](trainer)
    before = bits(trainer)
    assert bits(other) == before
    for _ in range(3):
        other.step()
        twin.step()
    assert bits(trainer) == before
    assert bits(other) == bits(twin) != before
    trainer.step()
    assert bits(other) == bits(twin)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_has_memory_of_its_own(how):
    model = Model(drawn(), threads=2, backward="sparse")
    x, state = inputs(4), State.zeros(drawn(), 2)
    output, _, tape = model.forward(x, state)
    gradients = model.backward(tape, np.ones_like(output))
    other = COPIES[how](model)
    for array in other.parameters.values():
        array *= 2
    other.backward(other.forward(x, state)[2], np.ones_like(output))
    again, _, tape = model.forward(x, state)
    assert np.array_equal(again, output)
    for name, gradient in model.backward(tape, np.ones_like(output)).items():
        assert np.array_equal(gradient, gradients[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.parameters.update({"layers.0.w_rec": np.zeros((3, 9), np.float32)}), r"w_rec is float32 \(3, 9\)"),
        (lambda m: m.parameters.update({"readout": np.zeros((17, 3))}), r"readout is float64 \(17, 3\), need C-contig"),
        (lambda m: m.masks.update({"layers.0.w_in": np.ones((6, 7), bool)}), r"w_in is bool \(6, 7\), need bool"),
    ],
)
def test_a_model_refuses_arrays_that_its_kernels_would_read_past(change, message):
    model = Model(drawn())
    change(model)
    with pytest.raises(ValueError, match=message):
        model.forward(inputs(4), State.zeros(drawn(), 2))


def test_a_model_refuses_a_state_of_another_batch():
    with pytest.raises(ValueError, match=r"state cells: got arrays of shape \[\(1, 24\), \(1, 17\)\], need"):
        Model(drawn()).forward(inputs(4), State.zeros(drawn(), 1))
