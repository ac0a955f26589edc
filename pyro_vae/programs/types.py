"""Types that name what a signature holds, for the type checker and the reader."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from numpy.typing import ArrayLike
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

# A Pyro model or guide: any callable that makes sample statements, an nn.Module among them. What it
# takes and returns is the user's own.
Program: TypeAlias = Callable[..., Any]
# Values by the name of their site: draws of latents, values to hold global latents at, parameters.
Values: TypeAlias = Mapping[str, Tensor]
# A sample statement of a trace: its distribution, value, scale, mask and plates, by Pyro's words.
Node: TypeAlias = dict[str, Any]

# A mask on a sample statement, or inside a distribution; None where there is none.
Mask: TypeAlias = Tensor | bool | None
# A distribution of Pyro: one of torch's, with plates, masks and to_event.
Distribution: TypeAlias = TorchDistributionMixin

# How several particles run: in a plate, with the batch repeated, or one after the other.
ModeName: TypeAlias = Literal["plate", "repeat", "loop"]
# The mode that is asked for; "auto" is the first that agrees with single particles.
Particles: TypeAlias = Literal["auto", "plate", "repeat", "loop"]

# The argument compile=: how what runs again and again is run.
Compile: TypeAlias = bool | Literal["auto", "replay"]
# The argument data_plate=: the name of the plate of the data; None to find it; False to treat the
# whole batch as one datum.
DataPlate: TypeAlias = str | bool | None
# The argument given=: values of global latent sites, by name.
GivenValues: TypeAlias = Mapping[str, Tensor | ArrayLike]


if TYPE_CHECKING:

    class Trace(poutine.Trace):
        """A trace of a Pyro program: its statements by name, in the order of the program."""

        nodes: OrderedDict[str, Node]  # type: ignore[assignment]

else:
    Trace = poutine.Trace
