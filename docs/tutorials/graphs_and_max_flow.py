# %% [markdown]
# # Graphs of your own and exact max flow
#
# The engine does not need a language model: any graph whose nodes have an order can be solved. This tutorial solves one
# by hand, compares the conserved flow with the max flow of igraph, certifies it, and moves it to networkx and back. A
# few seconds.

# %%
import torch

import flowgraph as fg

# %% [markdown]
# Six tokens. `capacity[t, s]` is the edge from s to t: how much t takes from s.

# %%
edges = {(0, 2): 1 / 2, (0, 3): 1 / 2, (1, 3): 1 / 2, (1, 4): 1 / 2, (3, 4): 1 / 2, (3, 5): 1 / 4, (4, 5): 1 / 2}
graph = fg.FlowGraph.from_edges(
    torch.tensor(list(edges)).T, torch.tensor(list(edges.values())), num_nodes=6, question=[0, 1], answer=[5]
)
flow = fg.solve(graph)
print(flow.throughput)

# %% [markdown]
# By hand: the [potential](../glossary.md#potential) of token 3 is 1/4 (directly) plus 1/2 · 1/2 (through token 4), that
# is 1/2. Token 2 leads nowhere, so its potential is 0 and no flow takes the edge to it.

# %%
potential, influence = flow.potentials
print(potential)
print(torch.allclose(potential * influence, flow.throughput))

# %% [markdown]
# ## The max flow
#
# Capacities are shares of attention, not pipes; still, the max flow says how much *could* be carried. `alpha` is the
# factor by which the conserved flow fits into the capacities, so it is a lower bound.

# %%
best = fg.max_flow(graph)
print(f"alpha {float(flow.alpha):.4f}, max flow {best.value:.4f}")
print(fg.gap_report(flow))

# %% [markdown]
# The solver's flow and the cut are checked again, apart from igraph: flow equals cut, so both are optimal.
#
# ## A certificate
#
# `certify` recomputes every provable property; at level "rational" in exact fractions.

# %%
print(fg.certify(flow, level="rational"))

# %% [markdown]
# ## Many graphs at once
#
# A PyG batch is solved in one call. Each graph has its own answer; one without a route is not an error.

# %%
from torch_geometric.data import Batch

unreachable = fg.FlowGraph.from_dense(torch.zeros(4, 4), question=[0], answer=[3])
flows = fg.solve(Batch.from_data_list([graph, unreachable]))
print(flows.feasible, flows.alpha)

# %% [markdown]
# ## Gradients
#
# The flow is differentiable: which capacity would raise the throughput of token 4 most?

# %%
capacity = torch.tensor(list(edges.values()), dtype=torch.float64, requires_grad=True)
weighted = fg.FlowGraph.from_edges(torch.tensor(list(edges)).T, capacity, num_nodes=6, question=[0, 1], answer=[5])
fg.solve(weighted).throughput[4].backward()
assert capacity.grad is not None
strongest = int(capacity.grad.argmax())
print(list(edges)[strongest], float(capacity.grad[strongest]))

# %% [markdown]
# ## Other libraries
#
# Capacities, flow and throughput travel with the graph.

# %%
exported = fg.to_networkx(flow)
print(exported.nodes[3])
print(exported.edges[3, 5])
back = fg.from_networkx(exported)
print(torch.equal(back.capacity, graph.capacity))
