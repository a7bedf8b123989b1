"""Measure capture against the plain forward pass (time) and against eager + output_attentions (memory).

    python -m benchmarks.speed.capture [--tokens 512 1024 2048 4096]

A 16-layer, 16-head random Llama; 4 layers captured, their rows read once in blocks. Times are medians of
interleaved runs in one process. Memory is peak resident size above the loaded model, each way in a process
of its own; the extra memory is that above the plain forward pass, which every way has to make.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import PeakMemory, interleaved, save
from flowgraph.attention.capture import capture

LAYERS = "6-9"


def build() -> LlamaForCausalLM:
    """Build a random model of 16 layers, 16 heads and width 1024: 190 million weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def forward(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Run the plain forward pass."""
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def captured(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Capture the rows of some layers, and read each block once."""
    for _ in capture(model, ids, layers=LAYERS).blocks():
        pass


def eager(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Compute the same mean over layers and heads from the attention matrices of all layers."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_attentions=True).attentions
    torch.stack([layer.mean(1) for layer in weights[6:10]]).mean(0)


WAYS = {"forward": forward, "capture": captured, "eager": eager}


def peak_mib(way: str, tokens: int) -> float:
    """Measure the peak resident memory of one way above the model, in this process."""
    model = build()
    ids = torch.randint(0, 4096, (1, tokens))
    forward(model, ids[:, :8])
    with PeakMemory() as memory:
        WAYS[way](model, ids)
    return memory.mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak_mib(arguments.peak[0], int(arguments.peak[1]))))
        return
    model = build()
    rows = []
    for tokens in arguments.tokens:
        ids = torch.randint(0, 4096, (1, tokens))
        times = interleaved(
            {"forward": lambda ids=ids: forward(model, ids), "capture": lambda ids=ids: captured(model, ids)},
            arguments.repeats,
        )
        # Each way in a process of its own, so that no way reuses memory of another.
        memory = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.speed.capture", "--peak", way, str(tokens)]
            memory[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {
                "tokens": tokens,
                "forward_s": times["forward"],
                "capture_s": times["capture"],
                "time_ratio": times["capture"] / times["forward"],
                "forward_mib": memory["forward"],
                "capture_mib": memory["capture"],
                "eager_mib": memory["eager"],
                "memory_ratio": memory["capture"] / memory["eager"],
                "extra_memory_ratio": (memory["capture"] - memory["forward"]) / (memory["eager"] - memory["forward"]),
            }
        )
        print(rows[-1], flush=True)
    save(
        "capture",
        rows,
        "4 of 16 layers captured and read; ratios: capture/forward time, capture/eager memory above the forward pass",
    )


if __name__ == "__main__":
    main()
