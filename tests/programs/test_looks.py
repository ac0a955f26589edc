"""Looks at a model: what they leave as it was, and what is said of an error in one."""

from __future__ import annotations

import pytest
import torch

from pyro_vae.programs.structure import inspect
from tests.models import factor_analysis


def test_inspection_leaves_the_random_state_and_the_modules_alone():
    model = factor_analysis()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inspect(model, torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(torch.rand(2), expected)


def test_an_error_in_the_model_says_what_it_was_run_on():
    model = factor_analysis()
    with pytest.raises(ValueError, match="shape") as caught:
        inspect(model, torch.zeros(5, 4, dtype=torch.float64))
    assert "its value has shape [5, 4]" in str(caught.value)

    def broken(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as other:
        inspect(broken, torch.zeros(5, 4))
    assert other.value.__notes__ == [
        "while running the model on a batch of argument 0: torch.float32 of shape [5, 4]"
    ]
