"""End responses at texts: a response stops with the token that completes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES_OF_A_CHARACTER = 4
"""Tokens that one character may be split into."""
_CONTEXT_TOKENS = 8
"""Tokens before a stop string that are decoded with it: some tokenizers drop a space at the beginning."""


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a response.

    Attributes:
        texts: not empty.
        tokenizer: of the model.
    """

    texts: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase = field(compare=False)

    @property
    def num_tokens(self) -> int:
        """The most tokens at the end of a response that can hold the longest text."""
        longest = max(len(text) for text in self.texts)
        return _BYTES_OF_A_CHARACTER * longest + _CONTEXT_TOKENS

    def ends(self, response: Sequence[int]) -> bool:
        """Tell whether the last token of a response completes one of the texts."""
        tail = list(response[-self.num_tokens :])
        text = self._decode(tail)
        before = self._decode(tail[:-1])
        # A text that is complete without the last token was completed by an earlier one, or by the prompt.
        return any(text.count(stop) > before.count(stop) for stop in self.texts)

    def _decode(self, ids: list[int]) -> str:
        """Decode tokens, special ones included: a closing tag may be one."""
        decoded: Any = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return decoded


class StopStringCriterion:
    """A stopping criterion of ``generate`` that remembers where each response stopped.

    Only response tokens are read, so a prompt may hold the texts.

    Args:
        stops: the texts.
        num_prompt_tokens: columns of the prompts, padding included.

    Attributes:
        lengths: tokens of each response up to the one that completed a text; missing for a response without.

    Cost: two decodings of a few tokens for each response and step.
    """

    def __init__(self, stops: StopStrings, num_prompt_tokens: int) -> None:
        self.lengths: dict[int, int] = {}
        self._stops = stops
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: Int64[Tensor, "batch tokens"], scores: Any, **options: Any) -> Bool[Tensor, " batch"]:
        response = input_ids[:, self._num_prompt_tokens :]
        num_responses, length = response.shape
        # The end of each response is enough, so the cost of a step does not grow with the response.
        tails = response[:, -self._stops.num_tokens :].tolist()
        for row, tail in enumerate(tails):
            if row not in self.lengths and self._stops.ends(tail):
                self.lengths[row] = length
        is_stopped = [row in self.lengths for row in range(num_responses)]
        return torch.tensor(is_stopped, dtype=torch.bool, device=input_ids.device)

    def within(self, response_mask: Bool[Tensor, "batch response"]) -> Bool[Tensor, " batch"]:
        """Cut a mask of response tokens after the stop strings, in place, and tell which responses they end."""
        is_stopped = torch.zeros(len(response_mask), dtype=torch.bool)
        for row, length in self.lengths.items():
            # After an end token the policy generates nothing, so a stop string there ends no response.
            is_stopped[row] = bool(response_mask[row, length - 1])
            response_mask[row, length:] = False
        return is_stopped
