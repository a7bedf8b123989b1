# %% [markdown]
# # Token credit of a rollout
#
# The weights that a response of the shipped base model would train with, beside the steps that its answer needs.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import flowgraph as fg
import rl

torch.set_num_threads(1)
model, tokenizer = rl.load_base_model("program")
config = rl.PPOConfig(
    num_prompts=4, group_size=4, advantage="group", max_response_tokens=48, credit=rl.CreditConfig.recommended()
)
trainer = rl.PPOTrainer(model, tokenizer, task=rl.make_task("program"), config=config, progress=False)
experience = trainer.collect()
responses = experience.responses
print(responses.samples[0].prompt)
print(responses.completions[0])

# %%
row = 0
chosen = responses.response_mask[row]
tokens = responses.input_ids[row, responses.prompt_length :][chosen].tolist()
weights = experience.credit.weights[row][chosen]
assert responses.oracle is not None
assert responses.detours is not None
needed = responses.oracle[row][chosen]
unneeded = responses.detours[row][chosen]

# %%
places = np.arange(len(tokens))
kinds = [
    (needed, "#007a58", "the answer needs it"),
    (unneeded, "#a64e81", "the same kind of work, not needed"),
    (~(needed | unneeded), "#8a8d96", "other tokens"),
]
figure, ax = plt.subplots(figsize=(8, 2.8), layout="constrained")
for mask, colour, label in kinds:
    ax.bar(places[mask.numpy()], weights[mask].numpy(), color=colour, label=label)
ax.axhline(1, color="#4a4d55", linewidth=0.8)
ax.set_xticks(places, [tokenizer.decode([token]) for token in tokens], fontsize=7)
ax.set_ylabel("weight in the policy loss")
ax.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper center", ncols=3, frameon=False)
fg.save_figure(ax, "token_credit.svg")

# %% [markdown]
# The rule never sees which steps are needed: the colours come from the task. Whether such weights pay is [another
# measurement](../credit.md#training-on-program).
