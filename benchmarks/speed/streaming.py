"""Measure traces of 4k to 32k tokens on a CPU: memory above the model, and time over the plain forward pass.

    python -m benchmarks.speed.streaming [--tokens 4096 8192 16384 32768]

A small random Llama (4 layers, 4 heads, width 256); two layers are traced, every text in a process of its own. The
trace solves exactly on recomputed rows, keeps the 64 edges per token with most flow and solves again on those.
Memory is peak resident size above the loaded model; the plain forward pass is measured the same way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import PeakMemory, save
from flowgraph.tracing.trace import trace

LAYERS = [1, 2]


def build() -> LlamaForCausalLM:
    """Build a random model of 4 layers, 4 heads and width 256; wide weights make its attention sharp."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=65536,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def measure(tokens: int) -> dict:
    """Measure one text: the forward pass alone, then the trace."""
    model = build()
    ids = torch.randint(0, 4096, (tokens,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids[None, :64], use_cache=False, logits_to_keep=1)
    with PeakMemory() as forward_memory, torch.no_grad():
        start = time.perf_counter()
        model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        forward = time.perf_counter() - start

    # The first eighth is the question, the last eight tokens are the answer.
    question = torch.zeros(tokens, dtype=torch.bool)
    question[1 : tokens // 8] = True
    answer = torch.zeros(tokens, dtype=torch.bool)
    answer[-8:] = True
    stages: list[tuple[str, float]] = []
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = trace(
            model,
            input_ids=ids,
            question=question,
            answer=answer,
            layers=LAYERS,
            progress=lambda line: stages.append((line, time.perf_counter())),
        )
        took = time.perf_counter() - start
    return {
        "tokens": tokens,
        "forward_s": forward,
        "trace_s": took,
        "time_ratio": took / forward,
        "forward_mib": forward_memory.mib,
        "trace_mib": memory.mib,
        "matrix_mib": 4 * tokens**2 / 2**20,
        "edges": result.graph.num_edges,
        "kept_flow": result.graph.kept_flow.item(),
        "kept_attention": result.graph.kept_attention.item(),
        "throughput_error": result.graph.throughput_error.item(),
        "stages": [
            f"{name}: {after - at:.1f} s"
            for (name, at), (_, after) in zip(stages, [*stages[1:], ("", start + took)], strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for tokens in arguments.tokens:
        command = [sys.executable, "-m", "benchmarks.speed.streaming", "--one", str(tokens)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    save("streaming", rows, "memory above the model; 2 of 4 layers; 64 edges per token kept by flow", hide=("stages",))


if __name__ == "__main__":
    main()
