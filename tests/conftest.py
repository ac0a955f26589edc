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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that hold an address: processes that share the tests would not agree on them."""
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"parametrize needs ids: {named[0]}")


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
