# %% [markdown]
# # What a ranking depends on
#
# Change one choice at a time (layers, heads, rows, power, capacity) and rank the tokens again: a band for each
# choice.

# %%
import matplotlib.pyplot as plt

import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
sensitivity = fg.trace(model, tokenizer, messages, response).sensitivity(model)
print(sensitivity)

# %%
bands: dict[str, list[float]] = {}
for variation in sensitivity.variations:
    if variation.spearman is not None:
        bands.setdefault(variation.choice, []).append(variation.spearman)

figure, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
for row, values in enumerate(bands.values()):
    ax.plot([min(values), max(values)], [row, row], color="#e9c3a6", linewidth=12, solid_capstyle="butt")
    ax.scatter(values, [row] * len(values), color="#b74d02", s=22, zorder=3)
ax.set_yticks(range(len(bands)), list(bands))
ax.invert_yaxis()
ax.set_xlabel("Spearman's correlation with the default ranking")
ax.set_xlim(min(0.0, ax.get_xlim()[0]), 1.02)
ax.spines[["top", "right"]].set_visible(False)
fg.save_figure(ax, "sensitivity.svg")

# %% [markdown]
# A point is one other value of the choice. A ranking that no choice changes is robust; it need not be right.
