"""The multilayer perceptron."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_vae.nets import MLP


def test_layers():
    net = MLP([3, 5, 2], activation=nn.ReLU)
    assert [type(layer) for layer in net.layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in MLP([3, 2], activate_last=True).layers] == [nn.Linear, nn.Tanh]
    first, _, last = net.layers
    x = torch.randn(7, 4, 3)
    torch.testing.assert_close(net(x), last(torch.relu(first(x))))


def test_input_scale_divides():
    net = MLP([3, 2])
    x = torch.randn(4, 3)
    plain = net(x)
    net.input_scale = 16.0
    torch.testing.assert_close(net(16 * x), plain)


def test_two_sizes_are_needed():
    with pytest.raises(ValueError, match=r"sizes=\[3\]: an MLP needs an input and an output"):
        MLP([3])
