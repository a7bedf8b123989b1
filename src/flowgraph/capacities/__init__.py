"""What an edge weighs: capacities from attention, from values, or from one backward pass.

Importing this package registers the capacities that ship with it.
"""

from flowgraph.capacities import builtin

__all__ = ["builtin"]
