# %% [markdown]
# # Does the answer need its hubs?
#
# Mask every token of the reasoning, one at a time, and measure the answer again: throughput against the fall.

# %%
import matplotlib.pyplot as plt

import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
trace = fg.trace(model, tokenizer, messages, response)

answer = int(trace.answer.nonzero()[0])
reasoning = [token for token in trace.reasoning.nonzero().flatten().tolist() if token < answer]
results = fg.knockouts(model, trace, [fg.Intervention(tokens=[token]) for token in reasoning])
falls = [-result.change for result in results]

# %%
figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
age = [answer - token for token in reasoning]
points = ax.scatter(trace.throughput[reasoning], falls, c=age, cmap="viridis", s=26)
for number in sorted(range(len(falls)), key=lambda number: -falls[number])[:5]:
    token = reasoning[number]
    place = (float(trace.throughput[token]), falls[number])
    ax.annotate(repr(trace.tokens[token]), place, textcoords="offset points", xytext=(5, 3), fontsize=8)
ax.set_xlabel("throughput")
ax.set_ylabel("fall of log p(answer) when masked, nats")
ax.spines[["top", "right"]].set_visible(False)
figure.colorbar(points, label="tokens before the answer")
fg.save_figure(ax, "hub_knockout.svg")

# %% [markdown]
# The answer needs the 7 and the = of the sum, and their throughput is middling. The token with most flow, " is",
# hardly matters, and most of the tokens that do are close to the answer (dark). Throughput says what the answer can
# reach, not what it needs; [the hub test](../interventions.md#the-hub-test) repeats this with controls for position.
