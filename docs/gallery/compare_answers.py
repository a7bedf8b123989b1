# %% [markdown]
# # Two answers compared
#
# A right and a wrong answer to one question, aligned by their text: where does the flow differ?

# %%
import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

model, tokenizer = load_demo_model()
messages = [{"role": "user", "content": PROMPT}]
right = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
wrong = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 4 - 3 = 1 apple.\n\nThe answer is 1."
comparison = fg.compare(fg.trace(model, tokenizer, messages, right), fg.trace(model, tokenizer, messages, wrong))
print(comparison)

# %%
ax = fg.plot_comparison(comparison)
fg.save_figure(ax, "compare_answers.svg")

# %% [markdown]
# The two curves nearly coincide: a flow on mean attention does not tell a right answer from a wrong one.
