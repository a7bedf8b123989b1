"""Options of chat templates: a tokenizer whose template has them."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
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
        ConfigError: the tokenizer has no chat template, the template does not read an option, an option belongs to the
            call itself, or a value is not a JSON value.
    """
    if not options:
        return tokenizer
    own_template: Any = getattr(tokenizer, "chat_template", None)
    template: Any = options.get("chat_template") or own_template
    # A tokenizer may have several templates by name, of which the option chooses one.
    if isinstance(own_template, Mapping) and isinstance(template, str):
        template = own_template.get(template, template)
    if not template:
        raise ConfigError(
            f"chat_template_kwargs: must be left out for a tokenizer without a chat template, got {dict(options)!r}; "
            "set tokenizer.chat_template, or write the prompts as text"
        )
    templates = template if isinstance(template, Mapping) else {"default": str(template)}
    for name in options:
        if name in _OWN_ARGUMENTS:
            raise ConfigError(
                f"chat_template_kwargs: must be options of the chat template, got {name!r}, which rollouts set "
                "themselves; leave it out"
            )
        is_read = any(re.search(rf"\b{re.escape(name)}\b", text) for text in templates.values())
        if name != "chat_template" and not is_read:
            raise ConfigError(
                f"chat_template_kwargs: must be options that the chat template reads, got {name!r}, which does not "
                "occur in it; check the name in tokenizer.chat_template"
            )

    # The options become assignments in front of the template, so every reader of the template sees them. The template
    # environment of transformers removes the line break behind an assignment.
    assignments = ""
    for name, value in options.items():
        if name != "chat_template":
            assignments += f"{{% set {name} = {_literal(name, value)} %}}\n"
    configured = copy.copy(tokenizer)
    if isinstance(template, Mapping):
        configured.chat_template = {name: assignments + text for name, text in template.items()}  # type: ignore[assignment]
    else:
        configured.chat_template = assignments + str(template)
    return configured


def _literal(name: str, value: Any) -> str:
    """Write a value as a literal of the template language."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(name, inner) for inner in value)}]"
    if isinstance(value, Mapping):
        pairs = [f"{_literal(name, str(key))}: {_literal(name, inner)}" for key, inner in value.items()]
        return f"{{{', '.join(pairs)}}}"
    raise ConfigError(
        f"chat_template_kwargs: {name} must be a JSON value, got {value!r:.80}; use text, numbers, lists and mappings"
    )
