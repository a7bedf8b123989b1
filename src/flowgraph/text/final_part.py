"""Find the final part of a response: what stands after the thinking, or in the final channel.

Reasoning models write their thinking into the response, between tags or in a channel of its own. An answer that the
model considers there is not its answer. Every search for an answer, here and in ``rl``, is limited to the final part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from flowgraph.text.encoding import EncodedText

Place = Literal["complete response", "after thinking", "final channel", "none"]
"""Where the final part lies; "none" where the response has none."""

_NAMES = "think|thinking|thoughts?|reasoning|scratchpad"
# The tags of models and prompts in use. A tag between backticks is a mention of the tag.
_OPENING_TAG = (
    rf"(?i:<\|?(?:begin_of_|start_|seed:)?(?:{_NAMES})(?:_start|_begin)?\s{{0,4}}\|?>)"
    r"|\[THINK\]|◁think▷|<\|channel>\s{0,4}thought|<unused94>|<\|inner_prefix\|>"
    r"|^Here(?: is|'s) my thought process:"
)
_CLOSING_TAG = (
    rf"(?i:<(?:/|\|/|\|?end_of_|\|?end_)(?:seed:)?(?:{_NAMES})\s{{0,4}}\|?>|<\|(?:{_NAMES})_end\|>|<(?:{_NAMES})\s{{0,4}}/>)"
    r"|\[/THINK\]|◁/think▷|<channel\|>|<unused95>|<\|inner_suffix\|>"
    r"|^Here(?: is|'s) my response:"
)
_TAG = re.compile(rf"(?<!`)(?:(?P<open>{_OPENING_TAG})|(?P<close>{_CLOSING_TAG}))(?!`)", re.MULTILINE)

# Harmony (gpt-oss): <|channel|>NAME ...<|message|>TEXT<|end|>.
_HARMONY = re.compile(r"<\|(channel|message|start|end|return|call)\|>")
# The same, decoded without its special tokens: the names stick to the texts.
_BARE_ANALYSIS = re.compile(r"\s*analysis(?:(?=[A-Z])|(?=.*assistantfinal))", re.DOTALL)
_BARE_FINAL = re.compile(r"assistantfinal")

# Marks around the final part itself.
_WRAPPER_START = re.compile(r"<\|(?:START_RESPONSE|begin_of_solution)\|>")
_WRAPPER_END = re.compile(r"<\|(?:END_RESPONSE|end_of_solution)\|>")

# Where the model's turn starts in a prompt that was rendered before.
_TURN = re.compile(
    r"<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<\|assistant\|>|<\|start\|>assistant"
    r"|<start_of_turn>model|<\|turn>model|<｜Assistant｜>|\[/INST\]|(?i:\bassistant:)|### ?Response:"  # noqa: RUF001
)


@dataclass(frozen=True)
class FinalPart:
    """The characters of a response in which its answer may stand.

    Attributes:
        start: the first character.
        end: the character after the last; equal to ``start`` where there is no final part.
        place: where it lies.
        problem: why there is none, in words; empty where there is one.
    """

    start: int
    end: int
    place: Place
    problem: str = ""

    def holds(self, start: int, end: int) -> bool:
        """Return whether the characters from ``start`` to ``end`` lie inside."""
        return self.start <= start and end <= self.end


def final_part(response: str, *, opening: str = "") -> FinalPart:
    r"""Find the final part of a response.

    - With channels (``<|channel|>final<|message|>``), it is the text of the last message in the final channel.
    - After thinking (``<think>...</think>``, ``[THINK]``, ``<|begin_of_thought|>`` and others), it is the text after
      the last closing tag, up to a block that opens there and is not closed. A closing tag alone closes a block
      that the prompt opened.
    - Without either, it is the complete response.

    A response whose thinking is not closed, or that ends with its thinking, has no final part.

    Args:
        response: the text of the response.
        opening: what the prompt wrote of the model's turn, such as ``"<think>\n"``; see :func:`response_opening`.

    Cost: linear in the text.

    Example:
        >>> text = r"<think>Is it \boxed{12}? No.</think> Tom has 7."
        >>> part = final_part(text)
        >>> text[part.start : part.end], part.place
        (' Tom has 7.', 'after thinking')
        >>> final_part("So it is 12, or", opening="<think>").problem
        'a thinking block that is not closed'
    """
    # The opening is part of the same turn: what it opens, the response must close.
    text = opening + response
    shift = len(opening)
    part = _channel_part(text, shift)
    if not part.problem:
        part = _part_after_thinking(text, part, shift)
    if part.problem:
        return FinalPart(len(response), len(response), "none", part.problem)

    # Marks around the final part are not part of it.
    start = part.start
    end = part.end
    for mark in _WRAPPER_START.finditer(text, start, end):
        start = mark.end()
    closing_mark = _WRAPPER_END.search(text, start, end)
    if closing_mark:
        end = closing_mark.start()
    if part.place != "complete response" and not text[start:end].strip():
        where = "the thinking" if part.place == "after thinking" else "the mark of its final channel"
        problem = f"no text after {where}"
        return FinalPart(len(response), len(response), "none", problem)
    return FinalPart(start - shift, end - shift, part.place)


def response_opening(encoded: EncodedText) -> str:
    r"""Return what the prompt wrote of the model's turn and what may open its thinking, such as ``"<think>\n"``.

    It is the text after the last message that is not the model's: the end of the chat template, and a prefill. In a
    prompt that was rendered before, it is the text after the last header of a model's turn; without one, a tag at the
    end of the prompt. An opening without a tag or channel is returned as "".
    """
    prompt = encoded.prompt_text
    if encoded.roles:
        others = [span.end for span in encoded.roles if span.role not in ("assistant", "model")]
        turn_start = max(others, default=0)
        return _opening_with_marks(prompt[turn_start:])
    turns = list(_TURN.finditer(prompt))
    if turns:
        return _opening_with_marks(prompt[turns[-1].end() :])
    # A prompt that only mentions a tag opens nothing.
    tags = list(_TAG.finditer(prompt))
    if tags and not prompt[tags[-1].end() :].strip():
        return prompt[tags[-1].start() :]
    return ""


def _opening_with_marks(opening: str) -> str:
    """Return an opening, or "" where nothing in it opens or closes a thinking block or a channel."""
    if _TAG.search(opening) or "<|channel|>" in opening:
        return opening
    return ""


def _channel_part(text: str, shift: int) -> FinalPart:
    """Find the last message of the final channel; the complete text where there are no channels."""
    # A response decoded without its special tokens: the names of channels stick to the texts.
    is_bare = _BARE_ANALYSIS.match(text, shift)
    if is_bare:
        finals = list(_BARE_FINAL.finditer(text, shift))
        if not finals:
            return FinalPart(shift, shift, "none", "an analysis channel without a final one")
        return FinalPart(finals[-1].end(), len(text), "final channel")
    if "<|channel|>" not in text:
        return FinalPart(0, len(text), "complete response")

    # One pass over the marks: each message belongs to the channel named before it.
    messages: list[tuple[str, int, int]] = []
    header_start: int | None = None
    message: tuple[str, int] | None = None
    for mark in [*_HARMONY.finditer(text), None]:
        kind = "end" if mark is None else mark[1]
        at = len(text) if mark is None else mark.start()
        after = len(text) if mark is None else mark.end()
        if message is not None:
            name, message_start = message
            messages.append((name, message_start, at))
            message = None
        if kind == "channel":
            header_start = after
        elif kind == "message" and header_start is not None:
            words = text[header_start:at].split()
            message = (words[0] if words else "", after)
            header_start = None
        else:
            header_start = None

    # The last message of the final channel counts.
    finals = [(start, end) for name, start, end in messages if name == "final"]
    if not finals:
        return FinalPart(shift, shift, "none", "channels without a final one")
    start, end = finals[-1]
    return FinalPart(start, end, "final channel")


def _part_after_thinking(text: str, part: FinalPart, shift: int) -> FinalPart:
    """Limit a part to the response after its last closed thinking block, outside an open one.

    Args:
        text: the opening and the response.
        part: the part of ``text`` to limit.
        shift: where the response starts in ``text``.
    """
    # Every closed block moves the start behind it; an open one ends the part where it begins.
    start = max(part.start, shift)
    end = part.end
    is_closed = False
    is_open = False
    for tag in _TAG.finditer(text, part.start, part.end):
        if tag["close"]:
            start = max(tag.end(), shift)
            end = part.end
            is_closed = True
            is_open = False
        elif not is_open:
            end = max(tag.start(), start)
            is_open = True
    if is_open and not text[start:end].strip():
        return FinalPart(start, start, "none", "a thinking block that is not closed")
    return FinalPart(start, end, "after thinking" if is_closed else part.place)
