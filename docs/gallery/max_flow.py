# %% [markdown]
# # Exact max flow with igraph
#
# The conserved flow beside the most that the same edges could carry, on a graph of your own; no model is needed.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import flowgraph as fg

edges = {(0, 2): 1 / 2, (0, 3): 1 / 2, (1, 3): 1 / 2, (1, 4): 1 / 2, (3, 4): 1 / 2, (3, 5): 1 / 4, (4, 5): 1 / 2}
graph = fg.FlowGraph.from_edges(
    torch.tensor(list(edges)).T, torch.tensor(list(edges.values())), num_nodes=6, question=[0, 1], answer=[5]
)
flow = fg.solve(graph)
best = fg.max_flow(graph)
print(f"alpha {float(flow.alpha):.3f} <= max flow {best.value:.3f} = cut {best.cut_capacity:.3f}")

# %%
alpha = float(flow.alpha)
cut = set(best.cut_edges.tolist())
names = []
for number, (source, target) in enumerate(graph.edge_index.T.tolist()):
    names.append(f"{source} → {target}" + (" (cut)" if number in cut else ""))
rows = np.arange(len(names))
figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.barh(rows, graph.capacity.numpy(), height=0.8, color="#e4e5e9", label="capacity")
ax.barh(rows - 0.18, best.edge_flow.numpy(), height=0.3, color="#0072b2", label="max flow")
ax.barh(rows + 0.18, alpha * flow.edge_flow.numpy(), height=0.3, color="#b74d02", label="conserved flow, scaled to fit")
ax.set_yticks(rows, names)
ax.invert_yaxis()
ax.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper center", ncols=3, frameon=False)
fg.save_figure(ax, "max_flow.svg")

# %% [markdown]
# Scaled by `alpha`, the largest factor with which it fits, the conserved flow stays below the capacity of every edge,
# so `alpha` is a lower bound of the max flow. The cut proves that no flow is larger.
