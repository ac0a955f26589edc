"""Laws that pairs of any pattern obey: evaluation, agreement with Pyro's losses, steps, uses."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch


def mlp(*sizes: int) -> nn.Sequential:
    """A small float64 network with tanh between its layers."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Tanh()] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers).double()


def normal(raw: Tensor) -> dist.Distribution:
    """A diagonal Normal over the last dimension, of a network's two halves."""
    loc, log_scale = raw.chunk(2, dim=-1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def evaluation_laws(
    model: Any, guide: Any, *batch: Any, data_plate: Any = None, vectorized: bool = True
) -> pv.LogWeights:
    """Chunks change nothing; a plate of particles scores draws as a loop does; bounds reduce it."""
    options = {"data_plate": data_plate, "seed": 1}
    weights = pv.log_weights(model, guide, *batch, num_particles=5, **options)
    again = pv.log_weights(model, guide, *batch, num_particles=5, chunk_size=3, **options)
    for name in ("log_likelihood", "log_prior", "log_guide"):
        torch.testing.assert_close(
            getattr(again, name), getattr(weights, name), rtol=1e-11, atol=1e-11
        )
    first, loop = (
        Evaluator(model, guide, as_batch(*batch), particles=mode, **options)
        for mode in ("auto", "loop")
    )
    assert ("loop" not in first.modes.values()) is vectorized
    (chunk,) = first.chunks(5)
    rows = chunk.rows
    torch.testing.assert_close(
        loop.score_guide(rows, chunk.values), chunk.weights.log_guide, rtol=1e-11, atol=1e-11
    )
    found = loop.score_model(rows, chunk.values)
    torch.testing.assert_close(sum(found), chunk.weights.log_joint, rtol=1e-11, atol=1e-11)
    bound = pv.elbo(model, guide, *batch, num_particles=5, **options)
    torch.testing.assert_close(bound.value, weights.total.mean(0), rtol=1e-11, atol=1e-11)
    bound = pv.iwae_bound(model, guide, *batch, num_particles=5, **options)
    wanted = torch.logsumexp(weights.total, 0) - torch.tensor(5.0).double().log()
    torch.testing.assert_close(bound.value, wanted, rtol=1e-11, atol=1e-11)
    return weights


def loss_and_gradients(loss: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
    """The loss, and the gradient by every parameter that Pyro sees, by name."""
    torch.manual_seed(3)
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = None
    with poutine.trace(param_only=True) as seen:
        value = loss.loss_and_grads(model, guide, *args, **kwargs)
    gradients = {}
    for name, node in seen.trace.nodes.items():
        leaf = node["value"].unconstrained()
        if leaf.grad is not None:
            gradients[name] = leaf.grad.clone()
            leaf.grad = None
    return value, gradients


def agrees_with_pyro(
    ours: Any, pyros: Any, model: Any, guide: Any, *args: Any, atol: float = 1e-10, **kwargs: Any
) -> None:
    """Same seed, same loss, same gradients, of the same parameters."""
    value, gradients = loss_and_gradients(ours, model, guide, *args, **kwargs)
    wanted, wanted_gradients = loss_and_gradients(pyros, model, guide, *args, **kwargs)
    assert value == pytest.approx(wanted, rel=1e-10, abs=1e-10)
    assert gradients
    assert set(gradients) == set(wanted_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-10, atol=atol)


def svi_steps(loss: Any, model: Any, guide: Any, *args: Any, steps: int = 3, **kwargs: Any) -> None:
    """A few steps of Pyro's own SVI: finite losses, and parameters that move."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    torch.manual_seed(0)
    losses = [svi.step(*args, **kwargs)]
    _, gradients = loss_and_gradients(loss, model, guide, *args, **kwargs)
    moving = {name for name, gradient in gradients.items() if bool(gradient.any())}
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    losses += [svi.step(*args, **kwargs) for _ in range(steps)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert moving
    after = dict(pyro.get_param_store().named_parameters())
    assert all(not torch.equal(after[name], before[name]) for name in moving)


def uses(model: Any, guide: Any, *batch: Any, continuous: bool = True, **options: Any) -> None:
    """What is done with a trained pair: describe, explain, refine, compare, to_arviz."""
    rows = pv.describe(model, *batch, **options).rows
    latents = {row["site"] for row in rows if row["kind"] != "observed"}
    assert latents
    assert latents <= set(pv.explain(pv.ELBO(), model, guide, *batch))
    if continuous:
        local = pv.refine(model, guide, *batch, max_steps=20, seed=0, **options)
        after = pv.elbo(model, local, *batch, num_particles=400, seed=0, **options)
        evidence = pv.iwae_bound(model, guide, *batch, num_particles=2000, seed=0, **options)
        assert after.mean < evidence.mean + 4 * (after.mean_std_error + evidence.mean_std_error)
    comparison = pv.compare(
        model, {"mine": guide}, *batch, reference="mine", num_particles=50, seed=0, **options
    )
    elbo = pv.elbo(model, guide, *batch, num_particles=50, seed=0, **options)
    torch.testing.assert_close(
        torch.as_tensor(comparison.dataset["elbo"].sel(guide="mine").values), elbo.value.double()
    )
    tree = pv.to_arviz(model, guide, *batch, num_draws=7, seed=0, **options)
    assert latents <= set(tree["posterior"].data_vars)
    assert tree["sample_stats"]["log_weight"].shape[:2] == (1, 7)
