"""Measure what each capacity costs beside the plain forward pass, and beside a forward and backward pass.

    python -m benchmarks.speed.capacities [--tokens 128 512 2048] [--ways attention sharp relevance] [--name capacities]

Two peers are ways too: autograd through eager attention with ``output_attentions`` (the gradient of the answer by
every attention weight, times the weight), and FlashTrace 0.1.1 (arXiv 2602.01914) where it is installed, else it is
left out. Both hold the attention of every layer and head.

SmolLM2-135M-Instruct (30 layers, all weights frozen) on texts of random tokens; every way reads its rows once, in
blocks. The backward pass is that of the answer's margin to the embeddings, without gradients of weights. Times are
medians of interleaved runs in one process. Memory is peak resident size above the loaded model, each way in a process
of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import flowgraph
from benchmarks.common import PeakMemory, interleaved, save
from flowgraph.demo import load_demo_model

FORWARD_ONLY = ("attention", "value_norm", "sharp", "sharp_max", "centred", "vtrace", "vtrace_share")
HOPS = {"relevance": 0, "relevance, streamed": 0, "relevance, 4 hops": 4}
EAGER = "eager attention, autograd"
FLASHTRACE = "flashtrace"
PEERS = (EAGER, FLASHTRACE)
SHARE_GENERATED = 0.5


def plain(model: nn.Module, ids: Tensor) -> None:
    """Run the plain forward pass."""
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def forward_backward(model: Any, ids: Tensor) -> None:
    """Run the forward pass, and the backward pass of the last logit's margin to the embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits[0, -1]
    best = logits.topk(2).values
    torch.autograd.grad(best[0] - best[1], embeddings)


def captured(name: str, model: nn.Module, ids: Tensor) -> None:
    """Capture the rows of a capacity, and read each block once."""
    options: dict[str, Any] = {}
    if name in HOPS:
        position = torch.arange(ids.shape[1])
        options["answer"] = (position == ids.shape[1] - 1)[None]
        options["hops"] = HOPS[name]
        options["streamed"] = name.endswith("streamed")
        if HOPS[name]:
            options["generated"] = (position >= ids.shape[1] * (1 - SHARE_GENERATED))[None]
    rows = flowgraph.capture(model, ids, capacity=name.split(",")[0], **options)
    for _ in rows.blocks():
        pass


def eager_autograd(model: Any, ids: Tensor) -> None:
    """Differentiate the last logit's margin by the attention weights of eager attention; sum weight x gradient."""
    model.set_attn_implementation("eager")
    try:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1, output_attentions=True)
        best = output.logits[0, -1].topk(2).values
        gradients = torch.autograd.grad(best[0] - best[1], output.attentions)
        total = torch.zeros(ids.shape[1], ids.shape[1])
        for weights, gradient in zip(output.attentions, gradients, strict=True):
            total += (weights.detach() * gradient)[0].sum(0)
    finally:
        model.set_attn_implementation("sdpa")


def flashtrace(model: Any, ids: Tensor) -> None:
    """Attribute the last tokens by FlashTrace's default method, under eager attention."""
    from flashtrace import FlashTrace  # pyright: ignore[reportMissingImports]

    _, tokenizer = loaded()
    half = ids.shape[1] // 2
    prompt = tokenizer.decode(ids[0, :half])
    response = tokenizer.decode(ids[0, half:])
    length = len(tokenizer(response, add_special_tokens=False)["input_ids"])
    model.set_attn_implementation("eager")
    try:
        FlashTrace(model, tokenizer).trace(prompt=prompt, target=response, output_span=(length - 1, length - 1))
    finally:
        model.set_attn_implementation("sdpa")


def ways(names: Sequence[str]) -> dict[str, Callable[[nn.Module, Tensor], None]]:
    """List the two passes to compare with, the capacities, and the peers that are installed."""
    listed: dict[str, Callable[[nn.Module, Tensor], None]] = {
        "forward": plain,
        "forward and backward": forward_backward,
    }
    peers = {EAGER: eager_autograd, FLASHTRACE: flashtrace}
    for name in names:
        if name == FLASHTRACE and importlib.util.find_spec("flashtrace") is None:
            print("flashtrace is not installed and is left out: pip install --group bench")
            continue
        listed[name] = peers[name] if name in peers else partial(captured, name)
    return listed


@cache
def loaded() -> tuple[Any, Any]:
    """Load the demo model and its tokenizer once."""
    return load_demo_model()


def frozen_model() -> nn.Module:
    """Return the demo model with frozen weights: relevance needs gradients of activations only."""
    model, _ = loaded()
    return model.requires_grad_(False)


def random_ids(tokens: int) -> Tensor:
    """Draw token ids of ordinary text, which starts behind the special tokens."""
    return torch.randint(20, 40_000, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def peak_mib(way: str, tokens: int) -> float:
    """Measure the peak resident memory of one way above the model, in this process."""
    model = frozen_model()
    plain(model, random_ids(8))
    with PeakMemory() as memory:
        ways([way])[way](model, random_ids(tokens))
    return memory.mib


def main() -> None:
    names = [*FORWARD_ONLY, *HOPS, *PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=names, choices=names)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--name", default="capacities", help="of the file in benchmarks/results")
    parser.add_argument("--notes", default="", help="added to the file, for example what else ran on the machine")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak_mib(arguments.peak[0], int(arguments.peak[1]))))
        return

    model = frozen_model()
    rows = []
    for tokens in arguments.tokens:
        ids = random_ids(tokens)
        runs: dict[str, Callable[[], object]] = {
            name: partial(run, model, ids) for name, run in ways(arguments.ways).items()
        }
        times = interleaved(runs, arguments.repeats)
        for name in runs:
            # Each way in a process of its own, so that no way reuses memory of another.
            memory = None
            if arguments.memory:
                command = [sys.executable, "-m", "benchmarks.speed.capacities", "--peak", name, str(tokens)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                memory = float(printed.splitlines()[-1])
            rows.append(
                {
                    "tokens": tokens,
                    "way": name,
                    "seconds": times[name],
                    "over_forward": times[name] / times["forward"],
                    "over_forward_and_backward": times[name] / times["forward and backward"],
                    "peak_mib": memory,
                }
            )
            print(rows[-1], flush=True)
    notes = "SmolLM2-135M-Instruct, float32; over_forward: time over the plain forward pass"
    save(arguments.name, rows, "; ".join([notes, arguments.notes]) if arguments.notes else notes)


if __name__ == "__main__":
    main()
