# %% [markdown]
# # Which explanation is right?
#
# Methods and controls on texts whose lines are masked one by one: a point that no control reaches has shown
# something.

# %%
import os

import flowgraph as fg
from flowgraph.demo import load_demo_model

is_toy = os.environ.get("FLOWGRAPH_GALLERY_SIZE") == "toy"
model, tokenizer = load_demo_model()
evaluation = fg.evaluate(
    model,
    tokenizer,
    tasks="line_knockout",
    methods=["attention", "sharp", "vtrace_share", "relevance", "preset:trivial"],
    items=1 if is_toy else 6,
    split="dev",
    out="results",
)
for note in evaluation.summaries[0].notes:
    print("-", note)

# %%
ax = fg.plot_evaluation(evaluation, "line_knockout")
fg.save_figure(ax, "evaluation.svg")

# %% [markdown]
# Six texts are few, and their intervals too narrow. [The same on sixty texts](../faithfulness.md#what-we-measured).
