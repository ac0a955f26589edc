"""What makes it fast? Tensor operations traced once into a graph, then replayed or compiled."""

from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.recorder import Recorder
from pyro_vae.compiler.tracing import UntraceableError, trace

__all__ = ["Graph", "Recorder", "UntraceableError", "trace"]
