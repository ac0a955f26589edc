"""Findings follow from numbers: of made-up ones at each threshold, and of three real guides."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation.comparison import Comparison
from pyro_vae.report.findings import SEVERITIES, Finding, of_comparison, of_generalization
from tests.report.cases import comparison_dataset


def said(about: str, **numbers: float) -> Finding:
    """The one finding of a kind, of numbers."""
    dataset = comparison_dataset(**numbers)
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    (one,) = [each for each in found if each.about == about]
    return one


def topics(**numbers: float) -> dict[str, str]:
    dataset = comparison_dataset(**numbers)
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    return {each.about: each.severity for each in found}


def test_an_encoder_that_loses_most():
    one = said("encoder", encoder=2.0, family=0.5)
    assert one.severity == "bad"
    assert one.evidence["share of the encoder"] == pytest.approx(0.8)
    assert "loses 2.000 ± 0.002 nats per datum against 'mean-field'" in one.text
    assert "80% of what it loses" in one.text and "larger encoder" in one.advice
    assert said("family", encoder=2.0, family=0.5).severity == "warning"


def test_a_family_that_loses_most():
    one = said("family", encoder=0.5, family=2.0)
    assert one.severity == "bad"
    assert one.evidence["share of the family"] == pytest.approx(0.8)
    assert "FullRankNormal" in one.advice
    assert said("encoder", encoder=0.5, family=2.0).severity == "warning"


def test_neither():
    assert topics(encoder=0.05, family=0.05) == {
        "log p(x)": "good", "convergence": "good", "gap": "good", "weights": "good"
    }  # fmt: skip


def test_what_is_within_its_error_is_left_open():
    """0.2 nats is above 0.1 by two errors only where the error is below 0.05 of the mean."""
    error = 0.049 * math.sqrt(40)
    assert said("encoder", encoder=0.2, family=0.01, error=error).severity != "note"
    one = said("encoder", encoder=0.2, family=0.01, error=0.051 * math.sqrt(40))
    assert one.severity == "note" and "may be small or not" in one.text


def test_evidence_in_doubt_takes_conclusions_back():
    """log p(x) may be higher: then the family loses more, and the encoder's share is smaller."""
    assert said("encoder", encoder=2.0, untrusted=2).severity == "bad"  # 5% of 40
    one = said("encoder", encoder=2.0, untrusted=3)
    assert one.severity == "warning" and "at most" in one.text
    assert said("family", encoder=2.0, untrusted=3).severity == "warning"
    assert "it may be more than that" in said("family", family=2.0, untrusted=3).text
    assert said("family", family=2.0, untrusted=3).severity == "bad"
    assert "gap" not in topics(untrusted=3)  # not "neither loses"
    assert said("log p(x)", untrusted=3).severity == "warning"
    assert "evidence='auto'" in said("log p(x)", untrusted=3).advice
    assert said("log p(x)", untrusted=21).severity == "bad"


def test_fits_in_doubt_take_conclusions_back():
    """A fit that is not at its optimum overstates the family's loss, not the encoder's."""
    assert said("family", family=2.0, unconverged=2).severity == "bad"
    one = said("family", family=2.0, unconverged=3)
    assert one.severity == "warning" and "it may be less than that" in one.text
    assert said("encoder", encoder=2.0, unconverged=3).severity == "bad"
    assert "at least that" in said("encoder", encoder=2.0, unconverged=3).text
    assert said("encoder", encoder=0.0, family=2.0, unconverged=3).severity == "warning"
    assert said("convergence", unconverged=3).evidence == {"not_converged": 3.0}


def test_a_refined_guide_below_the_encoder_is_not_refined():
    assert topics(encoder=-0.05)["gap"] == "good"
    one = said("encoder", encoder=-0.5)
    assert one.severity == "warning" and "not at its optimum" in one.text


def test_k_hat_beside_the_effective_sample_size():
    assert topics(heavy=2)["weights"] == "good" and topics(heavy=3)["weights"] == "note"
    dataset = comparison_dataset(heavy=8)
    dataset["good"][0, :3] = True  # a tail that carries nothing
    dataset["ess"][0, :3] = 1000.0
    dataset["ess"][0, 20] = 100.0
    dataset["good"][0, 20] = False
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    text = next(f.text for f in found if f.about == "weights" and "'amortized'" in f.text)
    assert "34 of 40 data" in text
    assert "fewer than 400 of 5000 are effective for 6" in text
    assert "k-hat is above 0.70 for 8" in text
    assert "3 of these are good all the same" in text
    assert "1 have a low k-hat and too few" in text


def test_few_data_that_hold_the_loss_are_named():
    assert "few data" not in topics(encoder=2.0)
    dataset = comparison_dataset(encoder=0.2)
    dataset["elbo"][0, 7] -= 50.0
    dataset["amortization_gap"][0, 7] += 50.0
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    (one,) = [each for each in found if each.about == "few data"]
    assert "the worst are 7" in one.text
    gap = (dataset["log_evidence"] - dataset["elbo"][0]).values
    assert one.evidence["share of the worst tenth"] == pytest.approx(
        np.sort(gap)[-4:].sum() / gap.sum()
    )


def test_a_gap_that_could_not_be_split():
    dataset = comparison_dataset(encoder=1.0, family=0.5)
    dataset["amortization_gap"][0] = math.nan
    dataset = dataset.assign_coords(reference=("guide", ["", "mean-field"]))
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    (one,) = [each for each in found if each.about == "gap"]
    assert one.evidence["log_evidence - elbo"] == pytest.approx(1.5)
    assert "reference=" in one.advice


def test_draws_outside_of_the_support():
    dataset = comparison_dataset()
    dataset["elbo"][0, :2] = -math.inf
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    (one,) = [each for each in found if each.about == "gap"]
    assert one.severity == "bad" and "For 2 of 40 data" in one.text


def test_the_worst_comes_first():
    dataset = comparison_dataset(encoder=2.0, untrusted=1)
    found = of_comparison(dataset, Comparison(dataset, {}).summary())
    order = [SEVERITIES.index(each.severity) for each in found]
    assert order == sorted(order)
    assert str(found[0]).startswith("bad: The encoder of 'amortized'")


@pytest.mark.parametrize(
    ("train", "test", "says"), [(0.3, 1.0, True), (0.6, 1.0, False), (0.01, 0.05, False)]
)
def test_an_encoder_that_does_not_generalize(train, test, says):
    tables = [Comparison(comparison_dataset(encoder=e), {}).summary() for e in (train, test)]
    found = of_generalization(*tables)
    assert bool(found) == says
    if says:
        assert "does not generalize" in found[0].text and found[0].severity == "bad"


# --- three guides ------------------------------------------------------------------------------


def model(x):
    """Two latents of which the data see each: the posterior is 0.8 (x, y), 0.2 wide in variance."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def correlated(x):
    """Two latents of which the data see the sum: mean-field cannot hold their correlation."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.1), obs=x[:, 0])


class Linear(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2, dtype=torch.float64)


def compared(model, *numbers: float, **others: pv.families.Family) -> dict[str, Finding]:
    """Findings of a guide: prior, or z ~ N(slope * x, variance) of data as the model sees them."""
    torch.manual_seed(0)
    x = torch.randn(12, 2, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, Linear(), example=x)
    with torch.no_grad():
        guide.encoder.weight.copy_(torch.eye(2))
        guide.encoder.bias.zero_()
        guide.head.weight.zero_()
        guide.head.bias.zero_()
        if numbers:
            slope, variance, second = numbers
            guide.head.weight[[0, 2], [0, int(second)]] = slope
            guide.head.bias[[1, 3]] = 0.5 * math.log(variance)
    guides = {"amortized": guide, "mean-field": pv.families.Normal(), **others}
    found = pv.compare(
        model, guides, x, num_particles=2000, max_steps=600, seed=0, progress=False
    ).findings()
    return {each.about: each for each in reversed(found)}  # the worst of each kind


def test_of_a_good_guide():
    found = compared(model, 0.8, 0.2, 1)
    assert found["gap"].severity == "good"
    assert not {"encoder", "family"} & set(found)
    assert all(each.severity in ("good", "note") for each in found.values())


def test_of_a_bad_encoder():
    """One that was never trained: KL(N(0, 1), N(0.8 x, 0.2)) of each latent, by algebra."""
    found = compared(model)
    assert found["encoder"].severity == "bad" and found["family"].severity == "good"
    torch.manual_seed(0)
    x = torch.randn(12, 2, dtype=torch.float64)
    kl = 0.5 * (5 + 5 * (0.8 * x) ** 2 - 1 + math.log(0.2)).sum(1).mean()
    evidence = found["encoder"].evidence
    error = max(4 * evidence["amortization_gap_se"], 0.02)
    assert evidence["amortization_gap"] == pytest.approx(float(kl), abs=error)
    assert evidence["share of the encoder"] > 0.98


@pytest.mark.parametrize("is_known", [True, False])
def test_of_a_bad_family(is_known):
    """-log sqrt(1 - rho^2) of the two latents is what independent ones cost, by algebra.

    Weights of independent ones cannot tell log p(x), and that is said; a full rank can.
    """
    own, shared = 1 + 0.1**-2, 0.1**-2
    others = {"full": pv.families.FullRankNormal()} if is_known else {}
    found = compared(correlated, shared / (own + shared), 1 / own, 0, **others)
    assert found["family"].severity == "bad"
    assert found["encoder"].severity == "good"
    lost = -0.5 * math.log(1 - (shared / own) ** 2)
    value = found["family"].evidence["approximation_gap"]
    if is_known:
        assert found["log p(x)"].severity == "good"
        error = found["family"].evidence["approximation_gap_se"]
        assert value == pytest.approx(lost, abs=4 * error + 0.02)
        assert "that of 'full' loses" in found["family"].advice
    else:
        assert found["log p(x)"].severity == "bad"
        assert value < lost and "it may be more than that" in found["family"].text
