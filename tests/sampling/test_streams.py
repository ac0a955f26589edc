"""Random numbers of chains: a key decides them, and nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyro_vae.sampling.streams import Stream

LIKE = torch.zeros(3, 4, dtype=torch.float64)


def numbers(*key):
    stream = Stream(*key)
    return torch.stack([stream.normal(LIKE), stream.uniform(LIKE), stream.normal(LIKE)])


def test_a_key_decides_whatever_the_global_random_state_is():
    first = numbers(7, 1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(numbers(7, 1), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_keys_give_other_numbers():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**62,), (2**62 - 1,), (0, 1, 2)]
    for one, other in itertools.combinations(keys, 2):
        assert (numbers(*one) != numbers(*other)).all(), (one, other)


def test_a_stream_goes_on():
    stream = Stream(0)
    assert (stream.normal(LIKE) != stream.normal(LIKE)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_have_the_shape_and_dtype_asked_for(dtype):
    like = torch.zeros(2, 5, dtype=dtype)
    for found in (Stream(0).normal(like), Stream(0).uniform(like)):
        assert (found.shape, found.dtype, found.device) == (like.shape, dtype, like.device)


def test_moments():
    """Of 100,000 numbers, to 4 standard errors."""
    like = torch.zeros(100_000, dtype=torch.float64)
    normal, uniform = Stream(3).normal(like), Stream(3).uniform(like)
    error = len(like) ** -0.5
    assert abs(normal.mean()) < 4 * error
    assert abs(normal.square().mean() - 1) < 4 * math.sqrt(2) * error
    assert abs(normal.pow(4).mean() - 3) < 4 * math.sqrt(96) * error
    assert abs(uniform.mean() - 0.5) < 4 * math.sqrt(1 / 12) * error
    assert abs(uniform.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45) * error
    assert uniform.min() >= 0 and uniform.max() < 1
