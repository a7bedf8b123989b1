# %% [markdown]
# # An edge opened by head
#
# One edge of the graph is a sum over layers and heads. Which of them read the token?

# %%
import matplotlib.pyplot as plt

import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
trace = fg.trace(model, tokenizer, messages, response, capacity="sharp")

source, target = trace.graph.edge_index[:, trace.flow.edge_flow.argmax()].tolist()
parts = trace.edge(source, target).by_head(model)
print(repr(trace.tokens[source]), "->", repr(trace.tokens[target]))
print(parts)

# %%
figure, ax = plt.subplots(figsize=(5.2, 4), layout="constrained")
image = ax.imshow((parts.values / parts.capacity).numpy(), aspect="auto", cmap="Oranges")
ax.set_xlabel("head")
ax.set_ylabel("layer")
ax.set_xticks(range(parts.values.shape[1]))
ax.set_yticks(range(len(parts.layers)), [str(layer) for layer in parts.layers])
ax.set_title("the edge with most flow")
figure.colorbar(image, label="share of the edge's capacity")
fg.save_figure(ax, "edge_by_head.svg")

# %% [markdown]
# Of 180 parts, the largest holds 14 % of the edge and the eight largest 59 %. The parts sum to its capacity exactly,
# for every capacity that adds up layers and heads.
