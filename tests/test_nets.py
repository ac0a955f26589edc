"""Networks: layers, shapes, leading dimensions, and their two modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.nets import MLP, ConvDecoder, ConvEncoder

SHAPES = [(1, 8, 8), (3, 7, 5), (2, 1, 9), (1, 28, 28)]


def test_layers():
    net = MLP([3, 5, 2], activation=nn.ReLU)
    assert [type(layer) for layer in net.layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in MLP([3, 2], activate_last=True).layers] == [nn.Linear, nn.Tanh]
    first, _, last = net.layers
    x = torch.randn(7, 4, 3)
    torch.testing.assert_close(net(x), last(torch.relu(first(x))))


def test_normalization_stands_before_the_activation_and_dropout_after_it():
    options = {"batch_norm": True, "dropout": 0.1}
    hidden = [nn.Linear, nn.BatchNorm1d, nn.Tanh, nn.Dropout]
    net = MLP([3, 5, 2], **options)
    assert [type(layer) for layer in net.layers] == [*hidden, nn.Linear]
    net = MLP([3, 5, 2], activate_last=True, **options)
    assert [type(layer) for layer in net.layers] == hidden * 2
    hidden = [nn.BatchNorm2d, nn.SiLU, nn.Dropout2d]
    net = ConvEncoder((1, 4, 4), 3, channels=[2], **options)
    found = [type(layer) for layer in net.layers]
    assert found == [nn.Conv2d, *hidden, nn.Flatten, nn.Linear, nn.SiLU]
    net = ConvDecoder(3, (1, 4, 4), channels=[2], **options)
    found = [type(layer) for layer in net.layers]
    assert found == [nn.Linear, nn.Unflatten, *hidden, nn.ConvTranspose2d]


@pytest.mark.parametrize(
    "net", [MLP([3, 2]), ConvEncoder((1, 3, 3), 2, channels=[2])], ids=lambda n: type(n).__name__
)
def test_input_scale_divides(net):
    x = torch.randn(4, 3) if isinstance(net, MLP) else torch.randn(4, 1, 3, 3)
    plain = net(x)
    net.input_scale = 16.0
    torch.testing.assert_close(net(16 * x), plain)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_has_its_shape_and_its_neighbourhoods(shape, depth):
    """Whatever the size, halved and doubled; and every parameter has a part in it."""
    channels = [4, 3, 2][:depth]
    encoder = ConvEncoder(shape, 5, channels=channels)
    decoder = ConvDecoder(5, shape, channels=channels[::-1])
    features = encoder(torch.randn(6, *shape))
    assert features.shape == (6, 5)
    images = decoder(features)
    assert images.shape == (6, *shape)
    images.square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("make", ["mlp", "encoder", "decoder"])
def test_leading_dimensions_are_rows_like_any_other(make, leading):
    """In eval mode each row is mapped alone, wherever it stands."""
    net, row = {
        "mlp": (MLP([4, 6, 2], batch_norm=True, dropout=0.5), (4,)),
        "encoder": (ConvEncoder((2, 5, 3), 4, channels=[3, 2], batch_norm=True), (2, 5, 3)),
        "decoder": (ConvDecoder(4, (2, 5, 3), channels=[3, 2], dropout=0.5), (4,)),
    }[make]
    net = net.double().eval()
    x = torch.randn(*leading, *row, dtype=torch.float64)
    found = net(x)
    assert found.dtype == torch.float64
    alone = torch.stack([net(one.unsqueeze(0))[0] for one in x.reshape(-1, *row)])
    torch.testing.assert_close(found, alone.reshape(*leading, *alone.shape[1:]))


def test_leading_dimensions_are_normalized_together():
    """In training a normalization is over particles and data alike, never over features."""
    net = MLP([4, 6], batch_norm=True, activate_last=True, activation=nn.Identity).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    features = net(x)
    torch.testing.assert_close(features.mean((0, 1)), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(net.layers[1].running_mean, 0.1 * net.layers[0](x).mean((0, 1)))


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(3)], ids=["elbo", "iwae"])
def test_statistics_move_in_training_only(loss):
    torch.manual_seed(0)
    model = pv.zoo.ConvVAE((1, 4, 4), 2, channels=[3], batch_norm=True, dropout=0.3)
    x = model.simulate(24)
    encoder = model.make_encoder(8, channels=[3], batch_norm=True, dropout=0.3)
    guide = pv.AmortizedGuide(model, encoder, example=x)
    norms = [m for net in (model, guide) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2

    result = pv.fit(
        model, guide, x, loss=loss, batch_size=8, epochs=2, validation_data=x, progress=False
    )
    # Three steps in an epoch, up to the one that was kept, each particle a batch of its own;
    # looking at the pair is no training, nor is validation.
    steps = 3 * result.best_epoch * loss.num_particles
    assert [norm.num_batches_tracked.item() for norm in norms] == [steps, steps]

    before = {k: v.clone() for net in (model, guide) for k, v in net.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        guide.train(mode)
        guide.head.train(not mode)
        a, b = (pv.iwae_bound(model, guide, x, num_particles=4, seed=0) for _ in range(2))
        assert torch.equal(a.value, b.value)
        assert all(module.training is mode for module in model.modules())
        assert {m for m in guide.modules() if m.training is not mode} == {guide.head}
    after = {k: v for net in (model, guide) for k, v in net.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_dropout_is_drawn_in_training():
    net = MLP([4, 50, 3], dropout=0.5)
    x = torch.randn(2, 4)
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


def test_two_sizes_are_needed():
    with pytest.raises(ValueError, match=r"sizes=\[3\]: an MLP needs an input and an output"):
        MLP([3])


@pytest.mark.parametrize("net", [ConvEncoder, ConvDecoder])
def test_refusals_of_convolutions(net):
    def make(shape, channels=(2,)):
        return net(shape, 4, channels=channels) if net is ConvEncoder else net(4, shape)

    with pytest.raises(ValueError, match=r"shape=\(8, 8\): channels, height and width are needed"):
        make((8, 8))
    with pytest.raises(ValueError, match=r"shape=\(1, 0, 8\)"):
        make((1, 0, 8))
    with pytest.raises(ValueError, match="channels is empty"):
        net(*((1, 8, 8), 4) if net is ConvEncoder else (4, (1, 8, 8)), channels=[])


def test_flat_images_are_refused():
    with pytest.raises(ValueError, match=r"got \[5, 64\]; x.reshape\(-1, 1, 8, 8\) makes them"):
        ConvEncoder((1, 8, 8), 4)(torch.zeros(5, 64))
