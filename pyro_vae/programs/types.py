"""Types that name what a signature holds, for the type checker and the reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

# A Pyro model or guide: any callable that makes sample statements, an nn.Module among them. What it
# takes and returns is the user's own.
Program: TypeAlias = Callable[..., Any]
# Values by the name of their site: draws of latents, values to hold global latents at, parameters.
Values: TypeAlias = Mapping[str, Tensor]
