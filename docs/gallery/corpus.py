# %% [markdown]
# # Summary of a file of answers
#
# Trace every line of a JSONL file, then draw its table: how many hops a route makes, and how few edges carry its
# flow.

# %%
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt

import flowgraph as fg
from flowgraph.demo import load_demo_model

texts = {
    "sum": ("Tom has 3 apples. He buys 4 more. How many now?", "He has 3 and buys 4.\n3 + 4 = 7.\nThe answer is 7."),
    "no steps": ("Tom has 3 apples. He buys 4 more. How many now?", "The answer is 7."),
    "capital": ("What is the capital of France?", "Paris is the capital of France.\nThe answer is Paris."),
    "lookup": ("The key is in the car. Where is the key?", "The key is in the car.\nThe answer is the car."),
    "product": ("What is 5 times 6?", "5 times 6 means six fives.\n5 * 6 = 30.\nThe answer is 30."),
    "copy": ("Repeat: copper, lantern, violet.", "The list is copper, lantern, violet.\nThe answer is violet."),
}
lines = [json.dumps({"id": name, "prompt": prompt, "response": text}) for name, (prompt, text) in texts.items()]
Path("answers.jsonl").write_text("\n".join(lines), encoding="utf-8")

# %%
model, tokenizer = load_demo_model()
summary = fg.trace_corpus(model, tokenizer, "answers.jsonl", "results", format="csv")
print(f"{summary.traced} of {len(texts)} traced, {summary.tokens} tokens")

# %%
with Path("results/traces.csv").open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
figure, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
for row in rows:
    hops = float(row["mean_hops"])
    share = int(row["backbone_edges"]) / int(row["edges"])
    ax.scatter(hops, share, color="#b74d02", s=30)
    ax.annotate(row["id"], (hops, share), textcoords="offset points", xytext=(6, 3), fontsize=9)
ax.margins(x=0.2, y=0.15)
ax.set_xlabel("mean hops of a route")
ax.set_ylabel("share of the edges that carry 90 % of the flow")
ax.spines[["top", "right"]].set_visible(False)
fg.save_figure(ax, "corpus.svg")

# %% [markdown]
# The folder also holds a page for all lines and a table with a row for each token; a run that is stopped continues
# ([more](../corpora.md)).
