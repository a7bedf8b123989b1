"""Tasks of the evaluation; importing this package registers them."""

# Importing a module registers its tasks.
from flowgraph.evaluation.tasks import detour, knockout, perturbation

__all__ = ["detour", "knockout", "perturbation"]
