# %% [markdown]
# # A figure for a paper
#
# Two panels as wide as two columns, with text that fits, as a PDF whose fonts are embedded.

# %%
import matplotlib.pyplot as plt

import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
trace = fg.trace(model, tokenizer, messages, response)

# %% [markdown]
# One column is a preset, `size="single"`; the figure is written at its final size, so nothing is scaled in the paper.

# %%
fg.save_figure(fg.plot_throughput(trace, top=5, size="single"), "column.pdf")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.8), layout="constrained", width_ratios=(1.2, 1))
fg.plot_throughput(trace, top=5, ax=left)
fg.plot_steps(trace, ax=right)
left.set_xlabel("(a) tokens")
right.set_xlabel("(b) steps")
fg.save_figure(left, "paper_figure.pdf")
fg.save_figure(left, "paper_figure.svg")

# %% [markdown]
# The same figure gives the same SVG, byte for byte, so it can be kept under version control.
