"""The encoder that sees which values are missing, and which argument has them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from tests.missing_data.models import (
    NAN,
    PRODUCTS,
    PartlySeen,
    data,
    mixture,
    of,
    proposal,
    scattered,
)
from tests.models import encoder, factor_analysis
from tests.runs import structure_of


def test_an_encoder_that_sees_the_mask_learns():
    exact = PartlySeen(factor_analysis("orthogonal"))
    x = scattered(data(200))
    model = pv.MissingData(exact.model)
    torch.manual_seed(0)
    guide = pv.AmortizedGuide(model, pv.MissingEncoder(encoder(12, 32)), example=x)
    before = pv.elbo(model, guide, x, num_particles=100, seed=0).mean
    pv.fit(model, guide, x, epochs=40, batch_size=50, progress=False, seed=0,
           optim=functools.partial(torch.optim.Adam, lr=0.02))  # fmt: skip
    after = pv.elbo(model, guide, x, num_particles=100, seed=0)
    best = float(exact.log_evidence(x).mean())
    assert before < best - 3
    assert best - 1 < after.mean < best + 4 * after.mean_std_error


def test_the_encoder_sees_filled_data_and_mask():
    x = torch.tensor([[1.5, NAN], [NAN, 2.0]])
    seen = (~x.isnan()).float()
    wanted = torch.cat([torch.tensor([[1.5, 0.0], [0.0, 2.0]]), seen], -1)
    assert torch.equal(pv.MissingEncoder(nn.Identity())(x), wanted)
    filled = pv.MissingEncoder(nn.Identity(), fill=torch.tensor([5.0, 6.0]))(x)
    assert torch.equal(filled[:, :2], torch.tensor([[1.5, 6.0], [5.0, 2.0]]))
    images = x.reshape(2, 1, 1, 2)
    assert pv.MissingEncoder(nn.Identity(), dim=1)(images).shape == (2, 2, 1, 2)
    assert torch.equal(
        pv.MissingEncoder(nn.Identity())(x[:, 0]), torch.tensor([[1.5, 1.0], [0.0, 0.0]])
    )


def test_the_encoder_keeps_other_arguments():
    class Both(nn.Module):
        def forward(self, x, label):
            return torch.cat([x, label], -1)

    x, label = torch.tensor([[NAN, 2.0]]), torch.tensor([[7.0]])
    with pytest.raises(
        ValueError, match=r"arguments \[0, 1\] are floating-point tensors; say with"
    ):
        pv.MissingEncoder(Both())(x, label)
    found = pv.MissingEncoder(Both(), values=0)(x, label)
    assert torch.equal(found, torch.tensor([[0.0, 2.0, 0.0, 1.0, 7.0]]))
    found = pv.MissingEncoder(Both(), values="x")(x=x, label=label)
    assert torch.equal(found, torch.tensor([[0.0, 2.0, 0.0, 1.0, 7.0]]))


def test_the_encoder_refuses_to_append_the_mask_to_the_data():
    with pytest.raises(
        ValueError, match="dim=0 of data of shape .* is that of the data themselves"
    ):
        pv.MissingEncoder(nn.Identity(), dim=0)(torch.ones(2, 3))


# --- which argument has missing values, and which one is its mask


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
