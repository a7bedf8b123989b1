# %% [markdown]
# # A certificate
#
# Every provable property of a flow, recomputed by other code: each residual beside the bound that rounding explains.

# %%
import matplotlib.pyplot as plt

import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
certificate = fg.trace(model, tokenizer, messages, response).certify()
print(certificate)

# %%
smallest = 1e-18  # a residual of 0 is drawn here
checks = [check for check in certificate.checks if check.bound > 0]
rows = range(len(checks))
figure, ax = plt.subplots(figsize=(6.4, 0.26 * len(checks) + 1), layout="constrained")
ax.scatter([check.bound for check in checks], rows, marker="|", s=90, color="#4a4d55", label="bound")
ax.scatter([max(check.residual, smallest) for check in checks], rows, s=18, color="#b74d02", label="residual")
ax.set_xscale("log")
ax.set_yticks(rows, [check.name for check in checks], fontsize=8)
ax.invert_yaxis()
ax.set_xlabel(f"residual and bound, relative ({smallest:.0e}: exactly 0)")
ax.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper right", ncols=2, frameon=False)
fg.save_figure(ax, "certificate.svg")

# %% [markdown]
# Checks that count violations have the bound 0 and are left out of the picture. A certificate checks the arithmetic,
# not the interpretation.
