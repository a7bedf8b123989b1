"""Options of chat templates: a tokenizer that passes them to its template."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OWN_ARGUMENTS = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
"""Arguments of ``apply_chat_template`` that decide how it is called, not what the template writes."""


def with_template_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer with options that every use of its chat template gets, such as ``enable_thinking=False``.

    Args:
        tokenizer: of the model; it stays as it is.
        options: names and values; without any the tokenizer itself is returned.

    Raises:
        ConfigError: the tokenizer has no chat template, the template does not read an option, or an option belongs to
            the call itself.
    """
    if not options:
        return tokenizer
    template = options.get("chat_template") or getattr(tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            f"chat_template_kwargs: must be left out for a tokenizer without a chat template, got {dict(options)!r}; "
            "set tokenizer.chat_template, or write the prompts as text"
        )
    # Several named templates are a mapping.
    text = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
    for name in options:
        if name in _OWN_ARGUMENTS:
            raise ConfigError(
                f"chat_template_kwargs: must be options of the chat template, got {name!r}, which rollouts set "
                "themselves; leave it out"
            )
        is_read = re.search(rf"\b{re.escape(name)}\b", text) is not None
        if name != "chat_template" and not is_read:
            raise ConfigError(
                f"chat_template_kwargs: must be options that the chat template reads, got {name!r}, which does not "
                "occur in it; check the name in tokenizer.chat_template"
            )
    configured = copy.copy(tokenizer)
    configured.apply_chat_template = partial(tokenizer.apply_chat_template, **options)  # type: ignore[method-assign]
    return configured
