# %% [markdown]
# # Steps of a reasoning
#
# Tokens merged into numbered steps: a bar is the share of the flow that visits the step, a band the flow between two.

# %%
import flowgraph as fg
from flowgraph.demo import load_demo_model

model, tokenizer = load_demo_model()
messages = [
    {
        "role": "user",
        "content": "A pen costs 2 dollars and a book costs 5 dollars. A bus ride costs 3 dollars. "
        "How much do the pen and the book cost together?",
    }
]
response = (
    "1. A pen costs 2 dollars.\n2. A bus ride costs 3 dollars.\n3. A book costs 5 dollars.\n"
    "4. Together the pen and the book cost 2 + 5 = 7 dollars.\n\nThe answer is 7."
)
trace = fg.trace(model, tokenizer, messages, response)
print(trace.steps())

# %%
ax = fg.plot_steps(trace)
fg.save_figure(ax, "steps.svg")

# %% [markdown]
# Merging is exact: it is the same flow, summed over the edges between two steps. Step 2 is of no use to the answer,
# and the default flow visits it all the same.
