"""Models and guides written as Pyro's own examples are: images, labels and missing pixels."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from tests.patterns.laws import agrees_with_pyro, evaluation_laws, mlp, normal, svi_steps, uses

N, PIXELS, LATENTS, LABELS = 6, 5, 2, 3


def pixels(n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(n, PIXELS, generator=generator) < 0.5).double()


def labels(n: int = N) -> Tensor:
    return nn.functional.one_hot(torch.arange(n) % LABELS, LABELS).double()


# --- the variational autoencoder


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = mlp(PIXELS, 4, 2 * LATENTS), mlp(LATENTS, 4, PIXELS)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            prior = dist.Normal(x.new_zeros(x.shape[0], LATENTS), x.new_ones(x.shape[0], LATENTS))
            z = pyro.sample("latent", prior.to_event(1))
            logits = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", normal(self.encoder(x)))


def test_vae() -> None:
    vae, x = VAE(), pixels()
    assert pv.describe(vae.model, x).data_plate == "data"
    evaluation_laws(vae.model, vae.guide, x)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), vae.model, vae.guide, x)
    agrees_with_pyro(pv.ELBO(), TraceMeanField_ELBO(), vae.model, vae.guide, x)
    pyros = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)
    agrees_with_pyro(pv.ELBO(3, kl="sample"), pyros, vae.model, vae.guide, x)
    assert pv.explain(pv.ELBO(), vae.model, vae.guide, x)["latent"].startswith("analytic")
    for loss in (pv.ELBO(3), pv.IWAE(3), pv.IWAE(3, "dreg"), pv.WakeSleep(3, insomnia=0.5)):
        svi_steps(loss, vae.model, vae.guide, x)
    pv.fit(vae.model, vae.guide, x, batch_size=4, epochs=2, progress=False)
    uses(vae.model, vae.guide, x)


# --- the semi-supervised autoencoder: labels given for a whole batch, or for none of it


class SSVAE(nn.Module):
    """A label y, one-hot, a style z, and an image of both."""

    def __init__(self, *, sized: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sized = sized
        self.encoder_y = mlp(PIXELS, 4, LABELS)
        self.encoder_z = mlp(PIXELS + LABELS, 4, 2 * LATENTS)
        self.decoder = mlp(LATENTS + LABELS, 4, PIXELS)

    def plate(self, xs: Tensor) -> Any:
        return pyro.plate("data", len(xs)) if self.sized else pyro.plate("data")

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with self.plate(xs):
            z = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), LATENTS), 1.0).to_event(1))
            probs = xs.new_ones(len(xs), LABELS) / LABELS
            ys = pyro.sample("y", dist.OneHotCategorical(probs), obs=ys)
            shape = torch.broadcast_shapes(z.shape[:-1], ys.shape[:-1])
            both = torch.cat([z.expand(*shape, -1), ys.expand(*shape, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(both)).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with self.plate(xs):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.encoder_y(xs)))
            shape = torch.broadcast_shapes(xs.shape[:-1], ys.shape[:-1])
            both = torch.cat([xs.expand(*shape, -1), ys.expand(*shape, -1)], -1)
            pyro.sample("z", normal(self.encoder_z(both)))

    def guide_of_z(self, xs: Tensor, ys: Tensor | None = None) -> None:
        """The label left out, to be summed out; z proposed from the image alone."""
        pyro.module("ss_vae", self)
        with self.plate(xs):
            probs = self.encoder_y(xs).softmax(-1)
            pyro.sample("z", normal(self.encoder_z(torch.cat([xs, probs], -1))))

    def classifier_model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        """The auxiliary loss of the labelled: the guide's classifier as a model of y."""
        pyro.module("ss_vae", self)
        with self.plate(xs):
            logits = self.encoder_y(xs)
            if ys is not None:
                with poutine.scale(scale=46.0):
                    pyro.sample("y_aux", dist.OneHotCategorical(logits=logits), obs=ys)

    def classifier_guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        """Nothing to propose."""


SIZED = [pytest.param(True, id="plate of len(x)"), pytest.param(False, id="plate without a size")]


@pytest.mark.parametrize("sized", SIZED)
@pytest.mark.parametrize("labelled", [True, False])
def test_semi_supervised_vae(labelled: bool, sized: bool) -> None:
    vae, batch = SSVAE(sized=sized), (pixels(), labels() if labelled else None)
    kinds = {row["site"]: row["kind"] for row in pv.describe(vae.model, batch).rows}
    assert kinds["y"] == ("observed" if labelled else "local latent")
    evaluation_laws(vae.model, vae.guide, batch)
    guide = config_enumerate(vae.guide, "parallel", expand=True)
    pyros = Trace_ELBO() if labelled else TraceEnum_ELBO(max_plate_nesting=1)
    agrees_with_pyro(pv.ELBO(kl="sample"), pyros, vae.model, guide, *batch)
    pyros = type(pyros)(3, vectorize_particles=True, max_plate_nesting=1)
    agrees_with_pyro(pv.ELBO(3, kl="sample"), pyros, vae.model, guide, *batch)
    svi_steps(pv.ELBO(2), vae.model, guide, *batch)
    svi_steps(pv.WakeSleep(3), vae.model, vae.guide, *batch)
    pv.fit(vae.model, guide, batch, batch_size=4, epochs=2, progress=False)
    uses(vae.model, vae.guide, batch, continuous=labelled)


@pytest.mark.parametrize("sized", SIZED)
def test_semi_supervised_vae_with_the_label_left_out(sized: bool) -> None:
    vae, batch = SSVAE(sized=sized), (pixels(), None)
    model = config_enumerate(vae.model)
    evaluation_laws(model, vae.guide_of_z, batch)
    agrees_with_pyro(
        pv.ELBO(kl="sample"), TraceEnum_ELBO(max_plate_nesting=1), model, vae.guide_of_z, *batch
    )
    assert pv.explain(pv.ELBO(), model, vae.guide_of_z, batch)["y"].startswith("summed out")
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, model, vae.guide_of_z, *batch)
    pv.fit(model, vae.guide_of_z, batch, batch_size=4, epochs=2, progress=False)
    uses(model, vae.guide_of_z, batch)


def test_the_classifier_loss_of_the_labelled() -> None:
    vae, batch = SSVAE(), (pixels(), labels())
    agrees_with_pyro(
        pv.ELBO(kl="sample"), Trace_ELBO(), vae.classifier_model, vae.classifier_guide, *batch
    )
    svi = SVI(vae.classifier_model, vae.classifier_guide, pyro.optim.Adam({}), loss=pv.ELBO())
    assert svi.step(pixels(), None) == 0  # of the unlabelled there is none
    with torch.no_grad():
        exact = dist.OneHotCategorical(logits=vae.encoder_y(batch[0])).log_prob(batch[1])
    found = pv.elbo(vae.classifier_model, vae.classifier_guide, batch).value
    torch.testing.assert_close(found, exact.double())


def test_two_losses_by_turns() -> None:
    """The published training loop: labelled and unlabelled batches, and the classifier's loss."""
    vae, x, y = SSVAE(), pixels(), labels()
    guide = config_enumerate(vae.guide, "parallel", expand=True)
    loss = pv.ELBO(kl="sample")
    optim = pyro.optim.Adam({"lr": 0.01})
    main = SVI(vae.model, guide, optim, loss=loss)
    auxiliary = SVI(vae.classifier_model, vae.classifier_guide, optim, loss=pv.ELBO())
    for batch in ((x, y), (x, None), (x[:4], y[:4]), (x[:2], None)):
        pyros = Trace_ELBO() if batch[1] is not None else TraceEnum_ELBO(max_plate_nesting=1)
        torch.manual_seed(0)
        wanted = pyros.loss(vae.model, guide, *batch)
        torch.manual_seed(0)
        assert main.step(*batch) == pytest.approx(wanted, rel=1e-10)
        assert auxiliary.step(*batch) >= 0


# --- labels of some of the data


class PartlyLabelled(SSVAE):
    def model(self, xs: Tensor, ys: Tensor, seen: Tensor) -> None:
        pyro.module("ss_vae", self)
        with self.plate(xs):
            z = pyro.sample("z", dist.Normal(xs.new_zeros(LATENTS), 1.0).to_event(1))
            logits = xs.new_zeros(LABELS)
            y = pyro.sample("y", dist.Categorical(logits=logits), obs=ys, obs_mask=seen)
            one_hot = torch.eye(LABELS, dtype=xs.dtype)[y]
            shape = torch.broadcast_shapes(z.shape[:-1], one_hot.shape[:-1])
            both = torch.cat([z.expand(*shape, -1), one_hot.expand(*shape, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(both)).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor, seen: Tensor) -> None:
        pyro.module("ss_vae", self)
        with self.plate(xs):
            probs = self.encoder_y(xs).softmax(-1)
            pyro.sample("z", normal(self.encoder_z(torch.cat([xs, probs], -1))))

    def guide_of_y(self, xs: Tensor, ys: Tensor, seen: Tensor) -> None:
        """The missing label proposed as Pyro names it."""
        pyro.module("ss_vae", self)
        with self.plate(xs):
            logits = self.encoder_y(xs)
            pyro.sample("y_unobserved", dist.Categorical(logits=logits))
            pyro.sample("z", normal(self.encoder_z(torch.cat([xs, logits.softmax(-1)], -1))))


def test_labels_of_some_of_a_batch() -> None:
    """Each datum's weight is that of the model with its own label given, or summed out."""
    vae = PartlyLabelled()
    x, y = pixels(), torch.arange(N) % LABELS
    seen = torch.tensor([True, False] * (N // 2))
    batch = (x, y, seen)
    mixed = evaluation_laws(vae.model, vae.guide, batch)
    known = pv.log_weights(vae.model, vae.guide, x, y, seen | True, num_particles=5, seed=1)
    unknown = pv.log_weights(vae.model, vae.guide, x, y, seen & False, num_particles=5, seed=1)
    wanted = torch.where(seen, known.total, unknown.total)
    torch.testing.assert_close(mixed.total, wanted, rtol=1e-12, atol=1e-12)
    unknown = pv.log_weights(
        SSVAE.model.__get__(vae), vae.guide_of_z, x, None, num_particles=5, seed=1
    )
    torch.testing.assert_close(mixed.total[:, ~seen], unknown.total[:, ~seen])
    evaluation_laws(vae.model, vae.guide_of_y, batch)
    agrees_with_pyro(
        pv.ELBO(kl="sample"),
        TraceEnum_ELBO(max_plate_nesting=1),
        config_enumerate(vae.model),
        vae.guide,
        *batch,
    )
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi_steps(loss, vae.model, vae.guide, *batch)
    pv.fit(vae.model, vae.guide, batch, batch_size=4, epochs=2, progress=False)
    uses(vae.model, vae.guide, batch)


# --- the conditional autoencoder


class CVAE(nn.Module):
    """Pixels ys given inputs xs: a baseline guesses, a prior and a recognition network of z."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.baseline = mlp(PIXELS, 4, PIXELS)
        self.prior = mlp(2 * PIXELS, 4, 2 * LATENTS)
        self.recognition = mlp(2 * PIXELS, 4, 2 * LATENTS)
        self.generation = mlp(LATENTS, 4, PIXELS)

    def model(self, xs: Tensor, ys: Tensor, mask: Tensor | None = None) -> Any:
        pyro.module("generation_net", self)
        with pyro.plate("data", len(xs)):
            with torch.no_grad():
                guess = self.baseline(xs).sigmoid()
            z = pyro.sample("z", normal(self.prior(torch.cat([xs, guess], -1))))
            loc = self.generation(z)
            if mask is None:
                pyro.sample("y", dist.Bernoulli(logits=loc).to_event(1), obs=ys)
            else:
                pyro.sample("y", dist.Bernoulli(logits=loc).mask(mask).to_event(1), obs=ys)
            return loc

    def guide(self, xs: Tensor, ys: Tensor, mask: Tensor | None = None) -> None:
        with pyro.plate("data", len(xs)):
            pyro.sample("z", normal(self.recognition(torch.cat([xs, ys], -1))))


def test_conditional_vae() -> None:
    vae, x, y = CVAE(), pixels().flip(0), pixels()
    evaluation_laws(vae.model, vae.guide, x, y)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), vae.model, vae.guide, x, y)
    pv.fit(vae.model, vae.guide, (x, y), batch_size=4, epochs=2, progress=False)
    for loss in (pv.ELBO(2), pv.IWAE(3, "dreg"), pv.WakeSleep(3)):
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
        assert all(svi.step(x, y) > 0 for _ in range(3))
    uses(vae.model, vae.guide, x, y)


def test_conditional_vae_with_missing_pixels() -> None:
    """A mask on pixels is the model without them: by the mask's argument, exactly."""
    vae, x, y = CVAE(), pixels().flip(0), pixels()
    mask = torch.ones(N, PIXELS, dtype=torch.bool)
    mask[:, 3:] = False
    batch = {"xs": x, "ys": y, "mask": mask}
    weights = evaluation_laws(vae.model, vae.guide, batch)
    whole = pv.log_weights(vae.model, vae.guide, x, y, num_particles=5, seed=1)
    torch.testing.assert_close(weights.log_guide, whole.log_guide)

    def smaller(xs: Tensor, ys: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(xs)):
            guess = vae.baseline(xs).sigmoid()
            z = pyro.sample("z", normal(vae.prior(torch.cat([xs, guess], -1))))
            logits = vae.generation(z)[..., :3]
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=ys[:, :3])

    cut = pv.log_weights(smaller, vae.guide, batch, num_particles=5, seed=1)
    torch.testing.assert_close(weights.total, cut.total, rtol=1e-12, atol=1e-12)
    agrees_with_pyro(pv.ELBO(kl="sample"), Trace_ELBO(), vae.model, vae.guide, **batch)
    pv.fit(vae.model, vae.guide, batch, batch_size=4, epochs=2, progress=False)
    svi_steps(pv.IWAE(3), vae.model, vae.guide, **batch)
    uses(vae.model, vae.guide, batch)
