"""flowgraph traces how a language model's answer drew on its question.

Attention becomes a DAG over tokens; two exact sweeps give the conserved flow from question to answer.
Start with :func:`trace`, or with :class:`FlowGraph` and :func:`solve` for graphs of your own. Names load
on first use, so importing the package (and ``flowgraph --help``) is quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
