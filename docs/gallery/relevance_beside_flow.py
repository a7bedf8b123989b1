# %% [markdown]
# # Relevance beside the default flow
#
# The same text by two edge weights: mean attention, and conserved relevance, which takes a backward pass per hop.

# %%
import matplotlib.pyplot as plt

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
relevance = trace.relevance(model)
print(relevance.residual)  # of the conservation law

# %%
flow_steps = trace.steps("lines", split_question=True)
relevance_steps = relevance.steps("lines")
reasoning = [step.index for step in flow_steps.steps if step.region == "reasoning"]
shares = {
    "flow": flow_steps.throughput[reasoning].tolist(),
    "relevance": relevance_steps.throughput[reasoning].tolist(),
}
for step, by_flow, by_relevance in zip(reasoning, shares["flow"], shares["relevance"], strict=True):
    print(f"{by_flow:6.2f} {by_relevance:10.2f}  {flow_steps.steps[step].text.strip()}")

# %%
labels = [flow_steps.steps[number].text.strip()[:32] for number in reasoning]

figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
for ax, (name, values) in zip(axes, shares.items(), strict=True):
    ax.barh(labels, values, color=["#b74d02" if value >= 0 else "#a64e81" for value in values])
    ax.axvline(0, color="#4a4d55", linewidth=0.8)
    ax.set_title(name)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].invert_yaxis()
fg.save_figure(axes[0], "relevance_beside_flow.svg")

# %% [markdown]
# A share of relevance is what passes through the line on the way from the answer, of the answer's logit; it is
# signed, though nothing is negative here. Relevance sets the line with the sum far above the three facts; the flow
# does so less. Neither ranks the useless line on the bus below the book. Which of the two is right is a question for
# [interventions](hub_knockout.md), not for the picture.
