"""Schedules of the factor on the latent terms: exact values, laws over all of them, refusals."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae import schedules
from pyro_vae.schedules import Constant, Cyclical, LinearWarmup, Schedule, factor_at, shortfall

# One of each kind and each border: rising, falling and level; a ramp that rounds to nothing, to
# the whole period, and to neither; ends of cycles.
REGISTRY = [
    Constant(0.0),
    Constant(4.0),
    LinearWarmup(1),
    LinearWarmup(7),
    LinearWarmup(7, start=0.25, end=0.25),
    LinearWarmup(49, start=0.1, end=0.7),
    LinearWarmup(10, start=4.0, end=1.0),
    Cyclical(8),
    Cyclical(2),
    Cyclical(10, ramp=0.3, start=0.2, end=2.0),
    Cyclical(10, ramp=1.0),
    Cyclical(10, ramp=0.001, cycles=3),
    Cyclical(7, ramp=0.9, start=1.0, end=0.5, cycles=1),
    Cyclical(7, start=0.5, end=0.5),
]
STEPS = range(60)


# --- exact values ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.25), [0.25, 0.25, 0.25]),
        (LinearWarmup(4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (LinearWarmup(2, start=0.5, end=4.5), [0.5, 2.5, 4.5, 4.5]),
        (LinearWarmup(4, start=3.0, end=1.0), [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]),
        (LinearWarmup(1), [0.0, 1.0, 1.0]),
        # Two steps up, two level, again and again.
        (Cyclical(4), [0.0, 0.5, 1.0, 1.0] * 3),
        (Cyclical(4, cycles=2), [0.0, 0.5, 1.0, 1.0] * 2 + [1.0] * 9),
        (Cyclical(4, start=1.0, end=2.0, cycles=1), [1.0, 1.5, 2.0, 2.0, 2.0, 2.0]),
        # A fifth of ten: 0, 1/2, then eight level.
        (Cyclical(10, ramp=0.2), [0.0, 0.5] + [1.0] * 8 + [0.0, 0.5, 1.0]),
        # The whole of it: the last step of a period is at the end.
        (Cyclical(5, ramp=1.0), [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]),
        # Next to nothing of it: the first is at the start.
        (Cyclical(3, ramp=0.01), [0.0, 1.0, 1.0, 0.0]),
    ],
    ids=repr,
)
def test_values_by_hand(schedule, values):
    assert [schedule(step) for step in range(len(values))] == values


@pytest.mark.parametrize(
    ("schedule", "since", "full"),
    [
        (Constant(2.0), 0, 0),
        (Constant(2.0), 9, 9),
        (LinearWarmup(400), 0, 400),
        (LinearWarmup(400), 300, 400),
        (LinearWarmup(400), 500, 500),
        (Cyclical(10), 0, 5),
        (Cyclical(10), 7, 7),
        (Cyclical(10), 11, 15),
        (Cyclical(10, cycles=2), 11, 15),
        (Cyclical(10, cycles=2), 21, 21),
    ],
)
def test_full_at_by_hand(schedule, since, full):
    assert schedule.full_at(since) == full


# --- laws ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", REGISTRY, ids=repr)
class TestLaws:
    def test_floats_between_start_and_end(self, schedule):
        ends = [getattr(schedule, name, schedule(0)) for name in ("start", "end")]
        for step in STEPS:
            assert type(schedule(step)) is float
            assert min(ends) <= schedule(step) <= max(ends)

    def test_the_first_step_has_the_start(self, schedule):
        assert schedule(0) == getattr(schedule, "start", schedule(0))

    def test_reaches_the_end_at_full_at_and_not_before(self, schedule):
        end = getattr(schedule, "end", schedule(0))
        for since in STEPS:
            full = schedule.full_at(since)
            assert type(full) is int
            assert full >= since
            assert schedule(full) == end
            assert all(schedule(step) != end for step in range(since, full))

    def test_moves_one_way_until_it_is_full(self, schedule):
        values = [schedule(step) for step in range(schedule.full_at() + 1)]
        assert values in (sorted(values), sorted(values, reverse=True))

    def test_repr_makes_it_again(self, schedule):
        assert eval(repr(schedule), vars(schedules)) == schedule

    def test_is_frozen_and_hashable(self, schedule):
        name = dataclasses.fields(schedule)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, name, 1)
        assert hash(schedule) == hash(dataclasses.replace(schedule))

    def test_is_a_schedule_and_passes_the_check_of_factors(self, schedule):
        assert isinstance(schedule, Schedule)
        assert [factor_at(schedule, step) for step in STEPS] == [schedule(step) for step in STEPS]

    def test_the_shortfall_is_where_the_last_step_is_not_full(self, schedule):
        end = getattr(schedule, "end", schedule(0))
        for steps in range(1, 60):
            assert (shortfall(schedule, steps) is None) == (schedule(steps - 1) == end)


def test_every_schedule_is_in_the_registry():
    public = {getattr(schedules, name) for name in schedules.__all__}
    kinds = {kind for kind in public if isinstance(kind, type) and kind is not Schedule}
    assert kinds == {type(schedule) for schedule in REGISTRY}


def test_after_its_cycles_it_stays_at_the_end():
    assert {Cyclical(5, cycles=3)(step) for step in range(15, 100)} == {1.0}


# --- what is said of a warm-up that is not done --------------------------------------------


def test_the_shortfall_names_step_factor_and_the_step_it_would_take():
    assert shortfall(LinearWarmup(400), 300) == (
        "step 300, with the factor 0.7475 on the latent terms; LinearWarmup(steps=400, start=0.0, "
        "end=1.0) comes to 1 at step 401. Train longer, or shorten it"
    )
    told = shortfall(Cyclical(10), 12)
    assert told.startswith("step 12, with the factor 0.2 on")
    assert "comes to 1 at step 16." in told


def test_the_last_step_has_to_be_full():
    """Of 4 steps up, the fifth is the first at the end."""
    assert shortfall(LinearWarmup(4), 4) is not None
    assert shortfall(LinearWarmup(4), 5) is None


def test_nothing_is_said_where_nothing_is_known():
    class Endless(Schedule):
        def __call__(self, step):
            return 1.0 - 0.5**step

        def full_at(self, since=0):
            return None

    assert shortfall(Endless(), 10) is None
    assert shortfall(lambda step: 0.5, 10) is None
    assert shortfall(None, 10) is None
    assert shortfall(LinearWarmup(10), 0) is None  # no step had a factor


def test_a_schedule_has_to_say_both():
    class Half(Schedule):
        def __call__(self, step):
            return 0.5

    with pytest.raises(TypeError, match="full_at"):
        Half()


# --- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Constant(-1.0), r"^beta=-1.0: a factor on the latent terms is a finite number"),
        (lambda: Constant(math.nan), r"^beta=nan: .* finite number of at least 0"),
        (lambda: Constant(math.inf), r"^beta=inf: "),
        (lambda: LinearWarmup(0), r"^steps=0: a whole number of at least 1 is needed"),
        (lambda: LinearWarmup(2.5), r"^steps=2.5: a whole number"),
        (lambda: LinearWarmup(math.inf), r"^steps=inf: a whole number"),
        (lambda: LinearWarmup(math.nan), r"^steps=nan: a whole number"),
        (lambda: LinearWarmup(5, start=-0.1), r"^start=-0.1: "),
        (lambda: LinearWarmup(5, end=math.nan), r"^end=nan: "),
        (lambda: Cyclical(1), r"^period=1: a whole number of at least 2 is needed"),
        (lambda: Cyclical(8, cycles=0), r"^cycles=0: a whole number of at least 1 is needed"),
        (lambda: Cyclical(8, ramp=0), r"^ramp=0: the fraction of a period"),
        (lambda: Cyclical(8, ramp=1.1), r"^ramp=1.1: .*above 0 and at most 1"),
        (lambda: Cyclical(8, ramp=math.nan), r"^ramp=nan: "),
        (lambda: Cyclical(8, start=-1.0), r"^start=-1.0: "),
        (lambda: Cyclical(8, end=math.inf), r"^end=inf: "),
    ],
)
def test_bad_arguments(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize("found", [-0.5, math.nan, math.inf, None, "1.0", 1j])
def test_a_factor_that_is_none(found):
    with pytest.raises(ValueError, match="factor at step 7, counted from 0, is") as raised:
        factor_at(lambda step: found, 7)
    assert f"is {found!r}; a finite number of at least 0 is needed" in str(raised.value)


@pytest.mark.parametrize("found", [0, 1, 0.5, torch.tensor(0.5)])
def test_a_factor_of_any_kind_of_number(found):
    assert type(factor_at(lambda step: found, 0)) is float
    assert factor_at(lambda step: found, 0) == float(found)


def test_the_file_needs_neither_torch_nor_pyro():
    code = f"""
import runpy, sys
runpy.run_path({str(Path(schedules.__file__))!r})
print(sorted({{"torch", "pyro"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
