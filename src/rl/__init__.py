"""Train LoRA policies by PPO with token credit shaped by reasoning flow.

Start with :class:`PPOTrainer` and :class:`PPOConfig`, or with ``flowgraph-rl train``; :func:`credit_rule` registers a
credit rule of your own. Names load on first use, so importing the package (and ``flowgraph-rl --help``) is quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
