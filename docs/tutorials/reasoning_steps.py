# %% [markdown]
# # Reasoning steps
#
# Single tokens are hard to read. This tutorial merges them into lines, sentences and numbered steps, and asks which
# step the answer needs: by flow, by relevance, and by masking each step in the model. About a minute on two cores.

# %%
import flowgraph as fg
from flowgraph.demo import load_demo_model

model, tokenizer = load_demo_model()
messages = [
    {
        "role": "user",
        "content": "A pen costs 2 dollars and a book costs 5 dollars. Ann buys a pen and a book. A bus ride costs "
        "3 dollars. How much do the pen and the book cost together?",
    }
]
response = (
    "1. A pen costs 2 dollars.\n2. A book costs 5 dollars.\n3. A bus ride costs 3 dollars.\n"
    "4. Together the pen and the book cost 2 + 5 = 7 dollars.\n\nThe answer is 7."
)
trace = fg.trace(model, tokenizer, messages, response)

# %% [markdown]
# Step 3 is true, and of no use. A good explanation ranks it below steps 1, 2 and 4.
#
# ## The flow between steps
#
# Merging is exact: it is the same flow, summed over the edges between two steps.

# %%
steps = trace.steps()
print(steps)

# %%
steps

# %% [markdown]
# ## Relevance between steps
#
# Conserved relevance is signed: a negative share argues against the answer. Read the lines from the answer upwards:
# what it took from which step, and that step from which one.

# %%
relevance = trace.relevance(model)
relevance.steps()

# %% [markdown]
# ## What the model needs
#
# Mask each step, so that no later token can read it, and measure the answer again. The change is in nats of the
# answer's log-probability; the more negative, the more the answer needed the step.

# %%
reasoning = [step for step in steps.steps if step.region == "reasoning"]
masked = [fg.Intervention(tokens=range(step.start, step.stop)) for step in reasoning]
results = fg.knockouts(model, trace, masked)

print(f"{'throughput':>10} {'knock-out':>10}  step")
for step, result in zip(reasoning, results, strict=True):
    throughput = float(steps.throughput[step.index])
    print(f"{throughput:10.3f} {result.change:10.3f}  {step.text!r}")

# %% [markdown]
# One text proves nothing. [Which evidence did the answer use?](which_evidence.ipynb) repeats this over many, with
# controls for length and position: a long step is visited more often because it is long, and the last step often
# matters because it stands last.
#
# ## Compare two runs
#
# The same question, answered without the useless step: `compare` aligns the two texts and their flows.

# %%
shorter = fg.trace(model, tokenizer, messages, response.replace("3. A bus ride costs 3 dollars.\n4.", "3."))
comparison = fg.compare(trace, shorter)
print(comparison)
