# %% [markdown]
# # Which evidence did the answer use?
#
# Three methods rank the lines of one reasoning, and one of these lines is of no use. Which ranking is right? This
# tutorial asks the model itself, by masking each line, then does the same over several texts with controls, and ends
# with what so few texts cannot show. A minute or two on a machine that does nothing else.

# %%
import os

import flowgraph as fg
from flowgraph.demo import load_demo_model

model, tokenizer = load_demo_model()
messages = [
    {
        "role": "user",
        "content": "A pen costs 2 dollars. A book costs 5 dollars. A bus ride costs 3 dollars. "
        "How much do a pen and a book cost together?",
    }
]
response = (
    "A pen costs 2 dollars.\nA bus ride costs 3 dollars.\nA book costs 5 dollars.\n"
    "Together they cost 2 + 5 = 7 dollars.\nThe answer is 7."
)
trace = fg.trace(model, tokenizer, messages, response, capacity="attention")
lines = [step for step in trace.steps("lines").steps if step.region == "reasoning"]
for line in lines:
    print(line.start, line.stop, repr(line.text))

# %% [markdown]
# The line on the bus ride is the distractor. The last line, "The answer is", only announces the answer.
#
# ## Three rankings
#
# `attention` averages what the model looks at. `vtrace_share` weighs what a head writes, not only where it looks.
# Conserved relevance takes a backward pass and is signed. The score of a line is the sum over its tokens.

# %%
units = [range(line.start, line.stop) for line in lines]
scores = {
    "attention": trace.scores,
    "vtrace_share": fg.trace(model, tokenizer, messages, response, capacity="vtrace_share").scores,
    "relevance": trace.relevance(model).scores,
}
of_lines = {name: fg.Explanation(tokens=values).of_units(units) for name, values in scores.items()}

print("".join(f"{name:>14}" for name in of_lines), "  line")
for number, line in enumerate(lines):
    print("".join(f"{float(values[number]):14.3f}" for values in of_lines.values()), f"  {line.text.strip()!r}")

# %% [markdown]
# The scales differ, so compare the order within a column. (A sum can exceed 1, because what passes through one token of
# a line may pass through another.) Each column looks plausible, and nothing in it says whether it is right.
#
# ## Ask the model
#
# Mask each line, so that no later token can read it, and measure the answer again. The fall is in nats of the answer's
# log-probability: the larger, the more the answer needed the line.

# %%
results = fg.knockouts(model, trace, [fg.Intervention(tokens=unit) for unit in units])
falls = [-result.change for result in results]
for fall, line in sorted(zip(falls, lines, strict=True), key=lambda pair: -pair[0]):
    print(f"{fall:8.3f}  {line.text.strip()!r}")

# %%
for name, values in of_lines.items():
    order = sorted(range(len(lines)), key=lambda number: -float(values[number]))
    print(f"{name:>14}: " + " > ".join(lines[number].text.split()[1] for number in order))
order = sorted(range(len(lines)), key=lambda number: -falls[number])
print(f"{'knock-out':>14}: " + " > ".join(lines[number].text.split()[1] for number in order))

# %% [markdown]
# (Each line is named by its second word.) The answer needs two lines: the sum, and the line that announces the answer.
# All three methods put these two first. Masking one of the three facts changes next to nothing, the distractor being no
# exception: the sum repeats both numbers. So the knock-outs cannot say which order of the facts is right, although the
# scores of attention and relevance there are far from 0.
#
# This is one text, and its lines differ in more than their use: the two that count stand last. A method that prefers
# late lines would look just as right without reading the model at all. Such a method is a *control*.
#
# ## Several texts, with controls
#
# `fg.evaluate` repeats this over many texts. The task `line_knockout` masks each line of a reasoning; its metric is the
# share of all falls that lies in the three lines of highest score. `preset:trivial` holds the controls: random scores,
# early or late tokens, length, digits, words of the answer. They read nothing of the model. The line of the answer is
# in no unit, because without it every answer becomes unlikely.

# %%
number = 1 if os.environ.get("FLOWGRAPH_TUTORIAL_SIZE") == "toy" else 3
methods = ["attention", "vtrace_share", "relevance", "preset:trivial"]
evaluation = fg.evaluate(
    model, tokenizer, tasks="line_knockout", methods=methods, items=number, split="dev", out="results"
)


def shown(value: float | None) -> str:
    """Write a value of the table; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


rows = evaluation.table("line_knockout", metric="primary")
print(f"{'method':<16} {'share':>6} {'- control':>10} {'n':>3}")
for row in rows:
    name = row["method"] + ("*" if row["trivial"] else "")
    print(f"{name:<16} {shown(row['value']):>6} {shown(row['control_difference']):>10} {row['n']:>3}")

# %% [markdown]
# The best method comes first; controls have a star. `- control` is the difference to the best control, over the same
# texts. Here this is `shared_tokens`, which marks the words that the answer repeats. It gets close to the best methods
# and is ahead of plain attention: without this row, the shares of the methods would look better than they are. The
# notes say first what matters most:

# %%
for note in evaluation.summaries[0].notes:
    print("-", note)

# %% [markdown]
# ## What three texts cannot show
#
# There are no intervals and no p-values, and for a good reason. The test behind a p-value flips the signs of the
# differences between two methods: of three differences there are 2³ = 8 patterns of signs, and the two extreme ones
# are as far from 0 as three wins in a row. So even a method that beats the control on every text has p = 2/8 = .25.
# From six texts on, six wins in six give p = 2/64 = .03, before any correction for the number of methods.
#
# An order of methods among three texts may turn around with the next three. And the texts of the split `dev` are for
# choosing: what you choose there is read once on `test`, with many texts.
#
# ```bash
# flowgraph evaluate --tasks line_knockout --methods preset:standard --split dev --items 20 --out results
# flowgraph evaluate --tasks line_knockout --methods vtrace_share,relevance,preset:trivial --items 60 --out results
# ```
#
# Both continue what is in the folder. `results/index.html` shows the tables, and every text with its tokens coloured
# by a method beside the measured falls.
#
# A knock-out has limits of its own: it shows what *masked attention* does to this model, on texts that it was not
# trained to read with gaps. [Which explanation is right](../faithfulness.md) lists tasks of other kinds, and
# [planted models](../planted.md) are small models where the truth is known by construction.
