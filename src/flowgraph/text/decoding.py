"""Decode token ids into text, and find the characters that each id contributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowgraph.text.spans import Offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Every decoder writes this character for bytes that are not a complete character (yet).
REPLACEMENT = "\ufffd"
# Prompt tokens decoded in front of the response. Without them, some decoders strip the response's first space.
CONTEXT = 8
# Tokens that may wait for one character to become complete. The limit bounds the decoded window.
PENDING = 16


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_ids: list[int]) -> tuple[str, list[Offsets]]:
    """Decode ids that follow a prompt, and find the characters of each id.

    The algorithm is the incremental decoding of inference servers, because a single id cannot be decoded alone: its
    characters depend on the ids before it, and one character may take several ids. Ids are added one at a time to a
    short window, which is decoded again after each. While the window's text ends in a replacement character, the last
    character is incomplete and its ids are pending. Once the text ends in another character, it is final: the pending
    ids become the context of the window, and the window starts anew. Ids that each bring a part of one character all
    cover that character.

    Args:
        tokenizer: any Hugging Face tokenizer, fast or slow.
        ids: the ids to decode.
        prompt_ids: the ids before them; only the last 8 are read.

    Returns:
        The text of ``ids``, and for each id its half-open range of characters in this text.

    Cost: two decodings of at most 32 ids for each id.
    """
    decoder = _IncrementalDecoder(tokenizer, prompt_ids[-CONTEXT:])
    for position, index in enumerate(ids):
        is_last = position + 1 == len(ids)
        decoder.add(index, is_last)
    return "".join(decoder.final_texts), decoder.spans


class _IncrementalDecoder:
    """The state of :func:`decode` between two ids.

    Attributes:
        final_texts: the pieces of text that no later id can change.
        spans: the characters of each id so far.
        context_ids: ids of the window whose text is final; they are decoded as context of the pending ids.
        context_text: the text of ``context_ids`` alone, which is the start of the window's text.
        pending_ids: ids of the window whose text is not final.
        pending_text: their text after the latest id; it ends in a replacement character or is empty.
        num_known: characters of ``pending_text`` that later ids will not change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = _vocabulary_size(tokenizer)
        self._final_length = 0
        self.final_texts: list[str] = []
        self.spans: list[Offsets] = []
        self._start_window(context_ids)

    def add(self, index: int, is_last: bool) -> None:
        """Append one id, find its characters, and finish the pending text where it is complete."""
        self.pending_ids.append(index)
        window_text = self._text(self.context_ids + self.pending_ids)
        text = window_text[len(self.context_text) :]
        is_partial = text.endswith(REPLACEMENT)

        # The pending text looked incomplete but stayed in front of a complete text. Its replacement characters
        # are real text or bytes that form no character: they belong to the ids before this one.
        if self.pending_text and not is_partial and text.startswith(self.pending_text):
            self.num_known = len(self.pending_text)
            previous_start, _ = self.spans[-1]
            self.spans[-1] = (previous_start, self._final_length + self.num_known)

        num_complete = len(text.rstrip(REPLACEMENT))
        is_final = (text and not is_partial) or len(self.pending_ids) >= PENDING or is_last
        if is_final:
            end = len(text)
        elif is_partial:
            # The id covers the one character that it leaves incomplete.
            end = num_complete + 1
        else:
            end = num_complete
        end = max(self.num_known, end)
        self.spans.append((self._final_length + self.num_known, self._final_length + end))

        if is_final:
            self.final_texts.append(text)
            self._final_length += len(text)
            self._start_window(self.pending_ids)
        else:
            self.pending_text = text
            self.num_known = max(self.num_known, num_complete)

    def _start_window(self, context_ids: list[int]) -> None:
        """Make ids with final text the context of the ids to come."""
        self.context_ids = context_ids
        self.context_text = self._text(context_ids)
        self.pending_ids: list[int] = []
        self.pending_text = ""
        self.num_known = 0

    def _text(self, ids: list[int]) -> str:
        """Decode ids with their special tokens; ids beyond the vocabulary (a padded embedding) give no text."""
        known_ids = [index for index in ids if index < self._vocabulary_size]
        text = self._tokenizer.decode(known_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def token_name(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Name a token by its entry in the vocabulary, for a token that covers no character."""
    name = None
    if index < _vocabulary_size(tokenizer):
        name = tokenizer.convert_ids_to_tokens(index)
    return str(name or f"<id {index}>")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids of special tokens: the named ones, and the added ones marked as special (chat headers)."""
    marked = {index for index, token in _added_tokens(tokenizer).items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest known id plus 1, because added tokens may have ids beyond ``len(tokenizer)``."""
    largest_added = max(_added_tokens(tokenizer), default=-1)
    return max(len(tokenizer), largest_added + 1)


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    """Return the tokens added to the vocabulary, by id; none where a backend does not list them as a mapping."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return added if isinstance(added, Mapping) else {}
