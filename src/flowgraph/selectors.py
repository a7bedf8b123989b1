"""Selectors name the tokens of the question and of the answer.

Pass one as ``question=`` or ``answer=`` of :func:`flowgraph.trace`::

    import flowgraph as fg

    fg.trace(model, tokenizer, prompt, response, answer=fg.selectors.Boxed())
"""

from flowgraph.text.selectors import (
    AllOf,
    Boxed,
    CodeBlock,
    LastLine,
    LastSentence,
    Literal,
    Prompt,
    Regex,
    Role,
    Selector,
    Span,
    Stated,
    Tokens,
)

__all__ = [
    "AllOf",
    "Boxed",
    "CodeBlock",
    "LastLine",
    "LastSentence",
    "Literal",
    "Prompt",
    "Regex",
    "Role",
    "Selector",
    "Span",
    "Stated",
    "Tokens",
]
