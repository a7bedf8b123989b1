"""Quote the characters of selected tokens, each character once."""

from __future__ import annotations

from collections.abc import Sequence

from flowgraph.text.spans import selected_text


def quote(tokens: Sequence[int], texts: Sequence[str], spans: Sequence[Sequence[int]], text: str) -> str:
    """Join the text of some tokens: blanks between them are kept, and other characters between them become " … ".

    Tokens may share characters (a character of three bytes may be three tokens). A shared character is quoted once.

    Args:
        tokens: indices of the quoted tokens.
        texts: text of each of the T tokens.
        spans: T half-open character ranges in ``text``.
        text: the complete text; where it is empty, the texts of the tokens are joined.

    Example:
        >>> quote([0, 1, 3], ["苹", "苹", " and", " 7"], [(0, 1), (0, 1), (1, 5), (5, 7)], "苹 and 7")
        '苹 …  7'
    """
    if not text:
        return "".join(texts[token] for token in tokens)
    return selected_text(text, [spans[token] for token in tokens])


def shortened(text: str, length: int) -> str:
    """Cut a text to ``length`` characters, the last of them an ellipsis where something is left out.

    Example:
        >>> shortened("Tom now has seven apples.", 10)
        'Tom now h…'
    """
    if len(text) <= length:
        return text
    return text[: length - 1] + "…"
