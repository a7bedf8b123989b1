# %% [markdown]
# # A first trace
#
# You ask a model a question; it reasons and answers. Which parts of the question and of the reasoning did the answer
# draw on, and how sure can you be of that? This tutorial traces one answer of a small model, reads the result, and
# ends with what it does *not* show. It takes about half a minute on two cores.

# %%
import flowgraph as fg
from flowgraph.demo import load_demo_model

model, tokenizer = load_demo_model()

# %% [markdown]
# The model is SmolLM2-135M-Instruct, which `make demo` installs; any causal language model of transformers can take its
# place. The response is given here, so that the tutorial shows the same text on every machine. Leave it out, and the
# model generates one.

# %%
messages = [
    {
        "role": "user",
        "content": "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now? Think step by step.",
    }
]
response = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 3 + 4 = 7 apples.\n\nThe answer is 7."
trace = fg.trace(model, tokenizer, messages, response)
print(trace)

# %% [markdown]
# One forward pass gave the attention of the middle third of the layers. Each pair of tokens, an earlier and a later
# one, became an edge; the [flow](../glossary.md#flow) of one unit from the question to the answer was solved exactly.
# In a notebook, a trace shows its text: the stronger the colour, the more of the unit passes through a token.

# %%
trace

# %% [markdown]
# ## Numbers
#
# Throughput is the share of the unit that passes through a token. Routes are paths from a question token to the answer.

# %%
for hub in trace.hubs(5):
    print(hub)

# %%
for route in trace.routes(3):
    print(route)

# %% [markdown]
# A certificate recomputes every provable property by other code: what enters equals what arrives, nothing is lost at
# any token, the flow stays below the exact max flow.

# %%
print(trace.certify())

# %% [markdown]
# ## What it does not show
#
# The numbers are exact for the graph. Whether the graph explains the model is another question, and averaged attention
# is a blunt instrument: the same flow, let in at the system message instead of the question, passes through nearly the
# same tokens.

# %%
print(trace.specificity())

# %% [markdown]
# So read this flow as "what the answer can reach", not as "what it took from the question". Two other edge weights
# depend on more: `vtrace_share`, one forward pass as well, and conserved relevance, which takes a backward pass per hop
# and states what each line contributed to the answer's margin.

# %%
sharp = fg.trace(model, tokenizer, messages, response, capacity="vtrace_share")
best = sharp.scores.masked_fill(~sharp.reasoning, 0).topk(5).indices.tolist()
print([sharp.tokens[token] for token in sorted(best)])

# %%
relevance = trace.relevance(model)
print(relevance)

# %%
relevance.steps("sentences")

# %% [markdown]
# ## Keep it
#
# A page holds everything in one file and needs no network; the trace itself is a safetensors file.

# %%
trace.to_html("trace.html", relevance=relevance)
trace.save("trace.safetensors")
print(fg.load_trace("trace.safetensors").throughput.equal(trace.throughput))

# %% [markdown]
# Next: [which evidence did the answer use?](which_evidence.ipynb) puts methods against interventions on the model.
