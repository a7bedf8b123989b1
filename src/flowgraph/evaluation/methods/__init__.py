"""The methods that are compared: importing this package registers those that have a name of their own."""

from flowgraph.evaluation.methods import attention as _attention
from flowgraph.evaluation.methods import gradients as _gradients
from flowgraph.evaluation.methods import peers as _peers
from flowgraph.evaluation.methods import perturbation as _perturbation
from flowgraph.evaluation.methods import text_only as _text_only
from flowgraph.evaluation.methods import trivial as _trivial

_BUILTIN = (_attention, _gradients, _peers, _perturbation, _text_only, _trivial)
