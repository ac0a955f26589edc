"""Processes: shares, sums, what the first one does for all."""

import logging
import os
import signal

import pytest
import torch

from pyro_vae.programs.processes import Processes, alone, note_interrupts, processes
from pyro_vae.programs.structure import DataPlateError
from tests.together import together


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [5, 6, 7, 23])
def test_shares_are_those_of_tensor_split(total, size):
    parts = [Processes(rank, size).share(total) for rank in range(size)]
    wanted = torch.arange(total).tensor_split(size)
    assert all(
        torch.equal(torch.arange(total)[p.rows], w) for p, w in zip(parts, wanted, strict=True)
    )


def test_fewer_data_than_processes_are_all_taken_by_each():
    share = Processes(2, 3).share(2)
    assert share.is_all and share.count == 2


def test_one_process_is_alone():
    here = Processes()
    assert processes() == here and here.is_first
    tensor = torch.ones(2)
    assert (
        here.add(tensor) is tensor and here.gather("x") == ["x"] and here.by_first(lambda: 3) == 3
    )


def test_torchrun_is_seen_by_its_environment(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert processes() == Processes()  # one process of torchrun's is one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with alone():
        assert processes() == Processes()


def test_what_processes_tell_one_another(tmp_path):
    def function(rank):
        here = processes()
        tensor = torch.full((2,), float(rank + 1), dtype=torch.float64)
        first = torch.tensor([[float(rank), 1.0], [2.0, 3.0]]).T  # not contiguous
        here.take_first([first])

        def fails():
            raise OSError(f"disk full in process {rank}")

        told = []
        with here.first_tells():
            told = [logging.getLogger("pyro_vae.x").isEnabledFor(logging.WARNING)]
        try:
            here.by_first(fails)
        except OSError as error:
            told.append(str(error))
        same = {"a": torch.ones(3), "b": torch.tensor([1.0, 2.0])}
        other = {"a": torch.ones(3), "b": torch.tensor([2.0, 1.0] if rank else [1.0, 2.0])}
        with alone():
            single = processes()
        return {
            "who": here,
            "sum": here.add(tensor).tolist(),
            "first": first.tolist(),
            "all": here.gather({"rank": rank, "x": torch.tensor([rank])}),
            "any": (here.any(rank == 1), here.any(False)),
            "by_first": here.by_first(lambda: rank),
            "told": told,
            "differ": (here.named_difference(same), here.named_difference(other)),
            "single": single,
        }

    for rank, found in enumerate(together(function, tmp_path)):
        assert found["who"] == Processes(rank, 2)
        assert found["sum"] == [3.0, 3.0]
        assert found["first"] == [[0.0, 2.0], [1.0, 3.0]]
        assert [each["x"].item() for each in found["all"]] == [0, 1]
        assert found["any"] == (True, False)
        assert found["by_first"] == 0
        assert found["told"] == [rank == 0, "disk full in process 0"]
        assert found["differ"] == (None, "b")
        assert found["single"] == Processes()


def test_an_interrupt_is_noted_once():
    noted = []
    with note_interrupts(lambda: noted.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # from torchrun, of the same Ctrl-C
    assert noted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_items_are_taken_by_turns_in_their_order(tmp_path):
    def function(rank):
        here, mine = processes(), []

        def square(item):
            mine.append(item)
            assert processes().size == 1  # nothing inside is shared once more
            return torch.tensor(item) ** 2

        found = [int(each) for each in here.by_turns(square, iter(range(5)))]

        def fails(item):
            if item == 3:
                raise DataPlateError("odd item")
            return item

        texts = []
        try:
            list(here.by_turns(fails, range(5)))
        except ValueError as error:
            texts.append(str(error))
        return found, mine, texts

    for rank, (found, mine, texts) in enumerate(together(function, tmp_path)):
        assert found == [0, 1, 4, 9, 16]
        assert mine == [[0, 2, 4], [1, 3]][rank]
        assert texts == ["odd item"]
