"""Tasks of the evaluation; importing this package registers them."""

# Importing a module registers its tasks.
from flowgraph.evaluation.tasks import detour, knockout, perturbation, sanity
from flowgraph.evaluation.tasks.on_demand import task_on_demand

__all__ = ["detour", "knockout", "perturbation", "sanity", "task_on_demand"]
