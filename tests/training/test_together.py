"""Runs in threads that go on by turns: each with its own random numbers, none beside another."""

from __future__ import annotations

import threading

import torch

from pyro_vae.programs.state import one_thread
from pyro_vae.training.together import Run, run_together


def test_each_run_has_its_own_random_numbers():
    found = {}

    def work(seed):
        def run():
            torch.manual_seed(seed)
            found[seed] = torch.rand(3)
            return seed

        return run

    before = torch.get_rng_state()
    runs, why = run_together([work(seed) for seed in (1, 2)], None, [None, None])
    assert torch.equal(torch.get_rng_state(), before)
    assert [run.result for run in runs] == [1, 2] and why == ""
    for seed, numbers in found.items():
        torch.manual_seed(seed)
        assert torch.equal(numbers, torch.rand(3))


def test_an_error_is_of_its_run():
    def fail():
        raise OSError("gone")

    runs, _ = run_together([fail, lambda: 3], None, [None, None])
    assert isinstance(runs[0].error, OSError) and runs[1].result == 3


def test_a_run_is_inside_and_others_are_kept_out():
    """Its thread goes on while the one that started it waits inside."""
    told = []

    def outside():
        try:
            with one_thread():
                told.append("in")
        except RuntimeError as error:
            told.append(str(error))

    def work():
        with one_thread():
            other = threading.Thread(target=outside)
            other.start()
            other.join()

    with one_thread():
        run = Run(work)
        run.go_on()
    assert run.error is None
    assert len(told) == 1 and "at work in another thread" in told[0]
    with one_thread():
        pass


def test_a_run_that_has_ended_takes_no_step():
    run = Run(lambda: None)
    run.go_on()
    assert run.request is None and run.error is None
    run.take_alone()
