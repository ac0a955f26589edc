"""Which argument has missing values, and which one is its mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from tests.missing_data.models import NAN, PRODUCTS, data, mixture, of, proposal
from tests.models import encoder, factor_analysis
from tests.runs import structure_of


def integers() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[3, 7, 1], [0, 2, 2], [5, 5, 5]])
    return x, torch.tensor([[True, False, True], [True, True, True], [False, False, False]])


@pytest.mark.parametrize("call", ["positional", "keyword", "values"])
def test_a_mask_says_what_nan_would(call):
    x, seen = integers()
    model = of(PRODUCTS["Poisson"][0])
    coded = x.double().masked_fill(~seen, NAN)
    torch.set_default_dtype(torch.float64)
    try:
        wanted = pv.log_weights(pv.MissingData(model), proposal, coded, num_particles=3, seed=0)
        masked = pv.MissingData(
            lambda x: model(x), mask="seen", values=0 if call == "values" else None
        )

        def guide(x, seen):
            assert seen.dtype == torch.bool
            proposal(x.double())

        batch = {"x": x, "seen": seen} if call == "keyword" else (x, seen)
        found = pv.log_weights(masked, guide, batch, num_particles=3, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.total, wanted.total)


def test_what_is_there_where_the_mask_is_false_does_not_count():
    x, seen = integers()
    model = pv.MissingData(of(PRODUCTS["Poisson"][0]), mask="seen")
    other = x.clone()
    other[~seen] = -99
    guide = lambda x, seen: proposal(x.float())  # noqa: E731
    first = pv.log_weights(model, guide, x, seen, num_particles=3, seed=0).total
    assert torch.equal(
        pv.log_weights(model, guide, other, seen, num_particles=3, seed=0).total, first
    )


def test_minibatches_take_the_rows_of_the_mask():
    x = data(32)
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    model = pv.MissingData(factor_analysis(), mask="seen")
    guide = pv.AmortizedGuide(model, pv.MissingEncoder(encoder(12), mask="seen"), example=(x, seen))
    pv.fit(model, guide, (x, seen), epochs=1, batch_size=8, progress=False, seed=0)
    alone = pv.AmortizedGuide(
        pv.MissingData(factor_analysis()), pv.MissingEncoder(guide.encoder.encoder), example=x
    )
    alone.load_state_dict(guide.state_dict())
    coded = x.masked_fill(~seen, NAN)
    torch.testing.assert_close(
        pv.elbo(model, guide, x, seen, num_particles=5, seed=0).value,
        pv.elbo(pv.MissingData(factor_analysis()), alone, coded, num_particles=5, seed=0).value,
    )


@pytest.mark.parametrize(
    ("options", "batch", "error", "message"),
    [
        ({"mask": "m"}, (torch.ones(2, 3),), TypeError, "last positional argument is no boolean"),
        ({"mask": "m"}, {"x": torch.ones(2, 3)}, TypeError, "no such argument among ['x']"),
        ({"mask": "m"}, {"x": torch.ones(2, 3), "m": torch.ones(2, 3)}, TypeError, "that keyword"),
        ({"mask": "m"}, (torch.ones(2, 3), torch.ones(2, 3) > 0, torch.ones(2, 3) > 0),
         ValueError, "as have the arguments [0, 1]"),
        ({"mask": "m"}, (torch.ones(2, 3), torch.ones(2) > 0), ValueError, "arguments [] of [0]"),
        ({"mask": "m", "values": 0}, (torch.ones(2, 3), torch.ones(2) > 0), ValueError,
         "has shape [2], but the argument 0 that it speaks of has [2, 3]"),
        ({"mask": "m", "values": "y"}, (torch.ones(2, 3), torch.ones(2, 3) > 0), ValueError,
         "values='y': the batch has the arguments [0]"),
        ({"mask": "m"}, (torch.full((2, 3), 2**24 + 1), torch.ones(2, 3) > 0), ValueError,
         "have no exact value in torch.float32"),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_told_are_refused(options, batch, error, message):
    model = pv.MissingData(of(PRODUCTS["Normal"][0]), **options)
    with pytest.raises(error) as caught:
        structure_of(model, batch)
    assert message in str(caught.value)


def test_values_needs_a_mask():
    with pytest.raises(ValueError, match="values='x' says what the mask is of: give mask="):
        pv.MissingData(mixture, values="x")
