# %% [markdown]
# # Throughput of a sum
#
# Which tokens does the flow from question to answer pass through? A bar for each token, the strongest with their
# text.

# %%
import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
trace = fg.trace(model, tokenizer, messages, response)
for hub in trace.hubs(3):
    print(hub)

# %%
ax = fg.plot_throughput(trace)
fg.save_figure(ax, "throughput.svg")

# %% [markdown]
# The words just before the answer carry most, whatever the text: everything that reaches the answer passes them.
# Compare with a [masking of every token](hub_knockout.md) before you read more into a high bar.
