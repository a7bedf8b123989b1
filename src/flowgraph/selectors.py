"""Selectors name the tokens of the question and of the answer.

Pass one as ``question=`` or ``answer=`` of :func:`flowgraph.trace`::

    import flowgraph as fg

    fg.trace(model, tokenizer, prompt, response, answer=fg.selectors.Boxed())
"""

from flowgraph.text.selectors import Boxed, LastLine, Prompt, Regex, Role, Selector, Span, Tokens

__all__ = ["Boxed", "LastLine", "Prompt", "Regex", "Role", "Selector", "Span", "Tokens"]
