"""Vocabulary: the tokens of a task's own language, as a tokenizer and as training batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerFast

CONTEXT = 256
"""Most tokens of a prompt and its response."""

_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
NO_TARGET = -100
"""The target of positions that are not trained on, which the cross-entropy of torch ignores."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a task: every text of the task is a sequence of them without anything in between.

    Attributes:
        words: the tokens, beside padding, end and unknown token, which come first.
        pattern: a regular expression that matches one token, and a single character where no word fits.
    """

    words: tuple[str, ...]
    pattern: str

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the token ids by token."""
        return {token: number for number, token in enumerate([*_SPECIAL_TOKENS, *self.words])}

    @property
    def pad_id(self) -> int:
        """Return the id of the padding token."""
        return self.ids["<pad>"]

    @property
    def end_id(self) -> int:
        """Return the id of the token that ends a response."""
        return self.ids["<eos>"]

    def token_ids(self, text: str) -> list[int]:
        """Encode a text of the task; faster than the tokenizer, and tested to agree with it.

        Raises:
            KeyError: the text holds a token that is none of the task's.
        """
        return [self.ids[token] for token in re.findall(self.pattern, text)]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer; decoding gives the same text again."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel(self.ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(self.pattern), "isolated")  # type: ignore[assignment]
        tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            unk_token="<unk>",
            padding_side="left",
            model_max_length=CONTEXT,
            clean_up_tokenization_spaces=False,
        )

    def encode(
        self, rows: Sequence[tuple[str, str]]
    ) -> tuple[Int64[Tensor, "batch tokens"], Int64[Tensor, "batch tokens"]]:
        """Encode prompts and responses for training.

        Args:
            rows: pairs of prompt and response.

        Returns:
            Token ids ``[B, T]``, padded on the right, and targets ``[B, T]``: the token at each position of the
            response and its end, -100 elsewhere.
        """
        prompts = [self.token_ids(prompt) for prompt, _ in rows]
        sequences = [
            prompt_ids + self.token_ids(response) + [self.end_id]
            for prompt_ids, (_, response) in zip(prompts, rows, strict=True)
        ]
        shape = (len(rows), max(len(sequence) for sequence in sequences))
        input_ids = torch.full(shape, self.pad_id)
        targets = torch.full(shape, NO_TARGET)
        for row, (prompt_ids, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            start = len(prompt_ids)
            end = len(sequence)
            input_ids[row, :end] = torch.tensor(sequence)
            targets[row, start:end] = input_ids[row, start:end]
        return input_ids, targets
