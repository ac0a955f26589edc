"""Blocks in a random order: each row once, each block read once, near rows stay near."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from pyro_vae.programs.on_demand import on_demand
from pyro_vae.training.block_order import ShuffledBlocks
from pyro_vae.training.data_source import source_of

COUNT, BLOCK = 103, 10
X = torch.arange(COUNT * 2.0).reshape(COUNT, 2)


@pytest.fixture
def data(monkeypatch):
    batch = on_demand(scipy.sparse.csr_matrix(X.numpy()), torch.arange(COUNT))
    rows = batch.args[0]
    rows.block, rows.seen, read = BLOCK, [], rows.read
    monkeypatch.setattr(rows, "read", lambda index: rows.seen.append(index) or read(index))
    return batch


@pytest.mark.parametrize("together", [1, 240, 10**6])
@pytest.mark.parametrize("batch_size", [1, 8, 32, 200])
def test_every_row_is_read_once(data, together, batch_size):
    """In whole blocks, three at a time of 240 bytes; minibatches may be of two groups."""
    torch.manual_seed(0)
    blocks = ShuffledBlocks(data, together)
    assert blocks.order.sort().values.tolist() == list(range(COUNT))
    for index in blocks.order.split(batch_size):
        part = blocks.rows(index)
        assert torch.equal(part.args[0], X[index])
        assert torch.equal(part.args[1], index)
        assert torch.equal(part.numbers, index)
    found = sorted((part.start, part.stop) for part in data.args[0].seen)
    starts = range(0, COUNT, BLOCK)
    assert found == [(start, min(start + BLOCK, COUNT)) for start in starts]


def test_rows_of_a_group_are_mixed_and_groups_are_not(data):
    torch.manual_seed(0)
    order = ShuffledBlocks(data, 240).order // BLOCK
    groups = [set(part.tolist()) for part in order.split(3 * BLOCK)]
    assert len(set(order[:10].tolist())) > 1
    # Of rows in any order each would hold all 11 blocks; one with the last block is shorter.
    assert sum(map(len, groups)) < 25
    first, second = ShuffledBlocks(data, 240).order, ShuffledBlocks(data, 240).order
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = ShuffledBlocks(data, 240).order
    torch.manual_seed(3)
    assert torch.equal(again, ShuffledBlocks(data, 240).order)


def test_in_training_and_what_it_would_cost_otherwise(data, caplog, monkeypatch):
    source = source_of(data, 20, None, False, "blocks")
    for skip in (0, 3):
        torch.manual_seed(1)
        epochs = [(index, batch.args[1]) for index, batch in source.epoch(20, skip)]
        assert all(torch.equal(index, rows) for index, rows in epochs)
        if not skip:
            whole = epochs
    assert [index.tolist() for index, _ in epochs] == [index.tolist() for index, _ in whole[3:]]
    assert not caplog.messages
    monkeypatch.setattr("pyro_vae.training.data_source._LARGE", 100)
    source_of(data, 20, None, False)
    assert "chunks of 10 rows, and a minibatch of 20 rows opens up to 11 of them" in caplog.text
    with pytest.raises(ValueError, match=r"shuffle='chunks': one of \('rows', 'blocks'\)"):
        source_of(X, 20, None, False, "chunks")
    plain = source_of(np.asarray(X), 20, None, False, "blocks")  # in memory: rows are shuffled
    assert sum(batch.size for _, batch in plain.epoch(20)) == COUNT
