"""Every test starts from the same global state, and leaves none behind."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

from pyro_vae.programs import messages

# Helpers that assert say as much as tests do where they fail.
pytest.register_assert_rewrite(
    "tests.runs",
    "tests.compiler.graphs",
    "tests.losses.gradients",
    "tests.patterns.laws",
    "tests.zoo.cases",
)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Empty param store, float32, one seed, nothing said yet."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    messages.said.clear()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)


@pytest.fixture
def float64() -> None:
    """float64 as the default dtype; the state above is put back after each test."""
    torch.set_default_dtype(torch.float64)
