"""Steps that are not finite: the errors, and what such a step leaves as it was."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.losses.base import Objective
from pyro_vae.torch_internals import copy_all
from pyro_vae.training.parameters import Parameters


class NonFiniteLossError(ArithmeticError):
    """Training met a loss or gradient that is not finite, and stopped.

    Model and guide keep the parameters of the last good step; of the last epoch, where
    that step's update itself overflowed.

    Attributes:
        step: the step that failed, counted from 1.
        sites: the sites whose value or log density is not finite.
    """

    def __init__(self, message: str, step: int, sites: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.sites = sites

    @classmethod
    def of(cls, what: str, step: int, sites: list[str], kept: str) -> NonFiniteLossError:
        """Return the error of a step, with what to do.

        Args:
            what: is not finite: the loss or the gradient.
            step: counted from 1.
            sites: as in the attributes.
            kept: whose parameters model and guide have now: "the step before", say.
        """
        where = "though each site's log density is: a derivative, a sum or a KL overflows"
        where = f"at sites {', '.join(sites)}" if sites else where
        kept = f"Model and guide keep the parameters of {kept}"
        advice = "Try a smaller learning rate, or bound the scale or logit there"
        text = f"{what} of step {step} is not finite, {where}. {kept}. {advice}"
        return cls(text, step, sites)


class NotFiniteError(Exception):
    """The loss or a gradient of a step is not finite."""

    def __init__(self, what: str, sites: list[str] | None = None) -> None:
        super().__init__(what)
        self.what, self.sites = what, sites


class Carried:
    """What steps write to, parameters and the optimizer's state aside, to come back to.

    Buffers, such as running means, and the state of the loss.
    """

    def __init__(self, parameters: Parameters, objective: Objective | None) -> None:
        self._objective = objective
        self._tensors = [*parameters.buffers, *([] if objective is None else objective.carried)]
        self._values = [tensor.clone() for tensor in self._tensors]
        self._state = {} if objective is None else objective.state_dict()

    @torch.no_grad()
    def restore(self) -> None:
        """Go back."""
        if self._tensors:
            copy_all(self._tensors, self._values)
        if self._objective is not None:
            self._objective.load_state_dict(self._state)

    @torch.no_grad()
    def restore_where(self, failed: Tensor) -> None:
        """Go back where a number on the device is not zero."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(torch.where(failed.bool(), value, tensor))
