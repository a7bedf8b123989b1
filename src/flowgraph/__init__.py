"""flowgraph traces how a language model's answer drew on its question.

Attention becomes a DAG over tokens. Two exact sweeps give the conserved flow from question to answer.
Start with :func:`trace`, or with :class:`FlowGraph` and :func:`solve` for other graphs. Names load on first
use, so importing the package (and ``flowgraph --help``) is quick.
"""

import sys

import lazy_loader

if "torch" in sys.modules:
    # torch.load then reads results of this package at once; otherwise from the first use of one of their classes on.
    from flowgraph.files import allow_restored

    allow_restored()

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)

_UNLISTED = {"atomic_write", "holm", "trace_file"}
"""Names that can be imported but are not part of the API: two helpers of ``rl``, and a deprecated alias."""


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(set(_names) - _UNLISTED)
