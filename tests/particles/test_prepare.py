"""An evaluator of a user's pair, and its chunks by block of data."""

from __future__ import annotations

import torch

from pyro_vae.particles.prepare import by_block, prepare
from tests.models import NormalModel

X = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_blocks_in_turn_with_all_their_particles():
    model = NormalModel()
    prepared = prepare(model, model.posterior, (X,), None, None, 0)
    assert prepared.given == {}
    rows, particles = [], []
    for block in by_block(prepared.evaluator.chunks(50, 20)):
        chunks = list(block)
        assert len({(c.rows.start, c.rows.stop) for c in chunks}) == 1
        rows.append(chunks[0].rows)
        particles.append(sum(c.weights.num_particles for c in chunks))
        wanted = model.log_evidence(X[chunks[0].rows])
        for chunk in chunks:
            assert (chunk.weights.total - wanted).abs().max() < 1e-9
    assert particles == [50] * len(rows)
    assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])]
    assert rows[-1].stop == 300 and len(rows) > 1
