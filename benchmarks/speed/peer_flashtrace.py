"""Compare the cost of a trace with FlashTrace 0.1.1 (arXiv 2602.01914) on the same model, prompt and response.

    pip install --group bench
    python -m benchmarks.speed.peer_flashtrace [--tokens 512 1024 2048 4096]

Both answer "where in the prompt did these last tokens come from?" by their default method: FlashTrace
attributes through attention and residual stream under eager attention (its default), flowgraph traces the flow under
the model's own attention. They are different methods; what is compared is what a trace costs. An 8-layer, 8-head
random Llama of width 512; half of the tokens are the prompt, the last eight the answer. Times are medians of
interleaved runs in one process; memory is peak resident size above the loaded model, each tool in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import PeakMemory, interleaved, save
from flowgraph.text.selectors import Span
from flowgraph.tracing.trace import trace

WORDS = 4000


def build() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Build the model, and a tokenizer of one token per word."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=WORDS,
    )
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<eos>": WORDS, "<unk>": WORDS + 1}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def texts(tokens: int) -> tuple[str, str]:
    """Make prompt and response of half the tokens each, including the end token that the trace adds."""
    ids = torch.randint(0, WORDS, (tokens - 1,), generator=torch.Generator().manual_seed(0)).tolist()
    half = tokens // 2
    return " ".join(f"w{i}" for i in ids[:half]), " " + " ".join(f"w{i}" for i in ids[half:])


def ways(model: LlamaForCausalLM, tokenizer: Any, tokens: int) -> dict[str, Callable[[], object]]:
    """Return one call for each tool."""
    from flashtrace import FlashTrace  # pyright: ignore[reportMissingImports]

    prompt, response = texts(tokens)
    generated = tokens - 1 - tokens // 2
    peer = FlashTrace(model, tokenizer)

    def ours() -> object:
        model.set_attn_implementation("sdpa")
        start = len(response) - len(" ".join(response.split()[-8:]))
        return trace(model, tokenizer, prompt, response, answer=Span(start, len(response)))

    def theirs() -> object:
        model.set_attn_implementation("eager")
        return peer.trace(prompt=prompt, target=response, output_span=(generated - 8, generated - 1))

    return {"flowgraph": ours, "flashtrace": theirs}


def peak_mib(way: str, tokens: int) -> float:
    """Measure the peak memory above the model, in this process."""
    model, tokenizer = build()
    ways(model, tokenizer, 64)[way]()
    run = ways(model, tokenizer, tokens)[way]
    with PeakMemory() as memory:
        run()
    return memory.mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak_mib(arguments.peak[0], int(arguments.peak[1]))))
        return
    model, tokenizer = build()
    rows = []
    for tokens in arguments.tokens:
        times = interleaved(ways(model, tokenizer, tokens), arguments.repeats)
        memory = {}
        for way in times:
            command = [sys.executable, "-m", "benchmarks.speed.peer_flashtrace", "--peak", way, str(tokens)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            memory[way] = float(printed.splitlines()[-1])
        rows.append(
            {
                "tokens": tokens,
                **{f"{way}_s": value for way, value in times.items()},
                "times_faster": times["flashtrace"] / times["flowgraph"],
                **{f"{way}_mib": value for way, value in memory.items()},
                "times_less_memory": memory["flashtrace"] / memory["flowgraph"],
            }
        )
        print(rows[-1], flush=True)
    save("flashtrace", rows, f"flashtrace {version('flashtrace')}, its default method, eager attention")


if __name__ == "__main__":
    main()
