"""What makes it fast? Tensor operations traced once into a graph, then replayed or compiled."""

from pyro_vae.compiler.graph import Graph, UntraceableError, trace
from pyro_vae.compiler.recorder import Recorder

__all__ = ["Graph", "Recorder", "UntraceableError", "trace"]
