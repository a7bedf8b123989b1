"""The rollout file: an experience with its readable tokens in one safetensors file, checked when it is read.

A run keeps some rollouts for the token-credit report, and a checkpoint inside a step holds one as its rollout buffer.
Files are never unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from flowgraph import InvalidInputError, atomic_write
from rl.errors import CheckpointError
from rl.records import Credit, Experience, Responses, Sample, TokenScores

PathLike = str | os.PathLike[str]
Tokens = Sequence[Sequence[str]]

FORMAT = "flowgraph-rollout"
FORMAT_VERSION = 1
_UTF8_LENGTH = 4
"""Bytes of the longest character, and so the most tokens that share one."""
_REPLACEMENT = "\ufffd"
"""A decoder writes this character for bytes that are not a complete character."""


@dataclass(frozen=True)
class _TensorField:
    """A tensor of the file.

    Attributes:
        record: the part of the experience that holds it; empty for the experience itself.
        name: its field in that record.
        kind: ``"float"``, ``"bool"`` or ``"int64"``.
        dimensions: of B responses, R response columns, T columns in all and K reward functions.
        optional: whether the record may hold None instead.
    """

    record: str
    name: str
    kind: str
    dimensions: str
    optional: bool = False

    @property
    def key(self) -> str:
        """The name of the tensor in the file."""
        if self.record:
            return f"{self.record}.{self.name}"
        return self.name


_RATIO = _TensorField("", "ratio", "float", "BR", optional=True)
_EXPERIENCE_FIELDS = (
    _TensorField("responses", "input_ids", "int64", "BT"),
    _TensorField("responses", "attention_mask", "bool", "BT"),
    _TensorField("responses", "response_mask", "bool", "BR"),
    _TensorField("responses", "truncated", "bool", "B"),
    _TensorField("responses", "groups", "int64", "B"),
    _TensorField("responses", "rewards", "float", "B"),
    _TensorField("responses", "question", "bool", "BT"),
    _TensorField("responses", "answer", "bool", "BT"),
    _TensorField("responses", "oracle", "bool", "BR", optional=True),
    _TensorField("responses", "detours", "bool", "BR", optional=True),
    _TensorField("responses", "sampled_logprobs", "float", "BR", optional=True),
    _TensorField("responses", "reward_parts", "float", "BK", optional=True),
    _TensorField("scores", "logprobs", "float", "BR"),
    _TensorField("scores", "entropy", "float", "BR"),
    _TensorField("scores", "ref_logprobs", "float", "BR", optional=True),
    _TensorField("scores", "values", "float", "BR", optional=True),
    _TensorField("scores", "final_values", "float", "B", optional=True),
    _TensorField("credit", "scores", "float", "BR"),
    _TensorField("credit", "scored", "bool", "BR"),
    _TensorField("credit", "weights", "float", "BR"),
    _TensorField("credit", "tie", "float", "B", optional=True),
    _TensorField("credit", "unanchored", "bool", "B", optional=True),
    _TensorField("", "advantages", "float", "BR"),
    _TensorField("", "returns", "float", "BR", optional=True),
    _TensorField("", "loss_mask", "bool", "BR"),
    _TensorField("", "policy_weights", "float", "BR"),
)


class Rollout(NamedTuple):
    """A rollout that was read by :func:`load_rollout`.

    Attributes:
        experience: the rollout.
        tokens: B lists of R readable token strings.
        info: JSON values of the writer, for example ``title``, ``subtitle`` and ``settings``.
        ratio: ``[B, R]`` new over old probability, or None.
    """

    experience: Experience
    tokens: list[list[str]]
    info: dict[str, Any]
    ratio: Float[Tensor, "batch response"] | None


def token_texts(tokenizer: Any, input_ids: Int64[Tensor, "batch tokens"]) -> list[list[str]]:
    """Read the text of every token; pass the response columns, ``input_ids[:, prompt_length:]``.

    A token's text is what it adds to the decoded text after its predecessor. If several tokens share one character (an
    emoji split into bytes), the first of them has it and the others are empty. A token without text gets its vocabulary
    name.

    Args:
        tokenizer: of the model.
        input_ids: ``[B, T]`` token ids.

    Returns:
        B lists of T strings.

    Raises:
        InvalidInputError: ``input_ids`` is not a table of token ids.

    Cost: about two decodings for each distinct pair of neighbours.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point() or bool((input_ids < 0).any()):
        raise InvalidInputError(
            f"input_ids: must be a [batch, tokens] tensor of token ids, got {tuple(input_ids.shape)} "
            f"{input_ids.dtype}; pass responses.input_ids[:, responses.prompt_length:]"
        )
    decoder = _TokenDecoder(tokenizer)
    return [decoder.texts(row) for row in input_ids.tolist()]


class _TokenDecoder:
    """Decodes tokens one by one, with a cache over all rows.

    Attributes:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[tuple[int, ...], str] = {}

    def texts(self, ids: list[int]) -> list[str]:
        """Read one sequence, character by character."""
        texts: list[str] = []
        # The tokens of the character before: without them a decoder may strip a leading space.
        before: list[int] = []
        position = 0
        while position < len(ids):
            num_tokens, text = self._next_character(before, ids[position : position + _UTF8_LENGTH])
            before = ids[position : position + num_tokens]
            if not text or _REPLACEMENT in text:
                # A special token without text, or bytes that form no character: show the token by itself.
                num_tokens = 1
                text = self._vocabulary_name(ids[position])
                before = []
            texts.append(text)
            texts.extend([""] * (num_tokens - 1))
            position += num_tokens
        return texts

    def _next_character(self, before: list[int], following: list[int]) -> tuple[int, str]:
        """Find the fewest following tokens that decode to complete characters, and the text that they add."""
        num_tokens = 0
        text = ""
        for num_tokens in range(1, len(following) + 1):
            text = self._added_text(before, following[:num_tokens])
            if _REPLACEMENT not in text:
                break
        return num_tokens, text

    def _added_text(self, before: list[int], ids: list[int]) -> str:
        """Decode tokens behind others, and remove the text of the others."""
        head = self._decode(before) if before else ""
        joined = self._decode(before + ids)
        if joined.startswith(head):
            return joined.removeprefix(head)
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        """Decode tokens, special ones included."""
        key = tuple(ids)
        if key not in self._cache:
            self._cache[key] = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self._cache[key]

    def _vocabulary_name(self, token_id: int) -> str:
        """Name a token as its vocabulary does, or by its id."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>")


def save_rollout(
    path: PathLike,
    experience: Experience,
    tokens: Tokens,
    info: Mapping[str, Any],
    *,
    ratio: Float[Tensor, "batch response"] | None = None,
) -> Path:
    """Write a rollout, its token strings and JSON about it to one safetensors file, atomically.

    Args:
        path: of the file.
        experience: the rollout.
        tokens: B lists of R readable token strings; see :func:`token_texts`.
        info: JSON values about the rollout.
        ratio: ``[B, R]`` new over old probability.

    Returns:
        The path of the file.

    Raises:
        InvalidInputError: info or the metadata of a sample is not JSON.
        OutputError: the path cannot be written.
    """
    from safetensors.torch import save

    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "record": _record_text(experience.responses, tokens, info),
    }
    parts: dict[str, Any] = {
        "responses": experience.responses,
        "scores": experience.scores,
        "credit": experience.credit,
        "": experience,
    }
    # The tensors of all records under flat names; a record without an optional tensor leaves its name out.
    tensors: dict[str, Tensor] = {}
    for field in _EXPERIENCE_FIELDS:
        value = getattr(parts[field.record], field.name)
        if value is not None:
            tensors[field.key] = _own_copy(value)
    if ratio is not None:
        tensors[_RATIO.key] = _own_copy(ratio)

    content = save(tensors, metadata)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def load_rollout(path: PathLike) -> Rollout:
    """Read a file of :func:`save_rollout`; its content is checked and never executed.

    Args:
        path: of the file.

    Raises:
        CheckpointError: missing, truncated, foreign, inconsistent, or of another version.
    """
    # The JSON record first: it gives the number of responses that all tensors must have.
    tensors, record = _read(path)
    try:
        tokens = [[_text(token) for token in row] for row in record["tokens"]]
        completions = tuple(_text(text) for text in record["completions"])
        samples = tuple(Sample(**sample) for sample in record["samples"])
        prompt_length = int(record["prompt_length"])
        reward_names = [_text(name) for name in record.get("reward_names", [])]
        info = dict(record["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"path: must hold a complete rollout record, got {path} ({error!r}); write it again"
        ) from error

    _check_tensors(path, tensors, len(samples), prompt_length, len(reward_names))
    # Every response must have its text and the text of each of its columns.
    num_responses, num_columns = tensors["responses.response_mask"].shape
    right_rows = len(completions) == num_responses and len(tokens) == num_responses
    if not right_rows or {len(row) for row in tokens} != {num_columns}:
        raise CheckpointError(
            f"path: must hold text for {num_responses} responses of {num_columns} tokens, got another number in "
            f"{path}; write it again"
        )

    # The tensors of each record by the names of its fields; an optional one that is missing is None.
    parts: dict[str, dict[str, Any]] = {"responses": {}, "scores": {}, "credit": {}, "": {}}
    for field in _EXPERIENCE_FIELDS:
        parts[field.record][field.name] = tensors.get(field.key)
    responses = Responses(
        samples=samples,
        completions=completions,
        prompt_length=prompt_length,
        reward_names=reward_names,
        **parts["responses"],
    )
    experience = Experience(
        responses=responses,
        scores=TokenScores(**parts["scores"]),
        credit=Credit(**parts["credit"]),
        **parts[""],
    )
    return Rollout(experience, tokens, info, tensors.get(_RATIO.key))


def _record_text(responses: Responses, tokens: Tokens, info: Mapping[str, Any]) -> str:
    """Write everything of a rollout that is not a tensor as JSON."""
    samples = []
    for sample in responses.samples:
        values = {field.name: getattr(sample, field.name) for field in fields(Sample)}
        values["metadata"] = dict(sample.metadata)
        samples.append(values)
    record = {
        "tokens": [list(row) for row in tokens],
        "info": dict(info),
        "prompt_length": responses.prompt_length,
        "reward_names": list(responses.reward_names),
        "completions": list(responses.completions),
        "samples": samples,
    }
    try:
        return json.dumps(record, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"info, samples: must be JSON values without NaN or infinity, got others ({error}); "
            "use text, finite numbers, lists and mappings"
        ) from error


def _own_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU: safetensors writes no two tensors that share memory."""
    return tensor.detach().cpu().clone().contiguous()


def _text(value: Any) -> str:
    """Return a JSON value that must be text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _read(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON record, and check the format and its version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
                raise CheckpointError(
                    f"path: must be a {FORMAT} file of version {FORMAT_VERSION}, got {metadata.get('format')!r} of "
                    f"version {metadata.get('version')!r} in {path}; give a file written by save_rollout"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"path: must be an existing rollout file, got {path}; check the name") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"path: must be a complete safetensors file, got {path} ({error}); it is truncated, or not a rollout"
        ) from error

    try:
        record = json.loads(metadata["record"])
        if not isinstance(record, dict):
            raise ValueError("the record is not a mapping")
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"path: must hold a rollout record, got {path} ({error}); write it again") from error
    return tensors, record


def _check_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], batch: int, prompt_length: int, num_rewards: int
) -> None:
    """Check the kind and the shape of every tensor, so that a damaged file is refused here and not in an update."""
    # The response mask gives R; all other shapes follow from B, R and the prompt.
    mask = tensors.get("responses.response_mask")
    num_columns = 0
    if mask is not None and mask.ndim:
        num_columns = mask.shape[-1]
    sizes = {"B": batch, "R": num_columns, "T": prompt_length + num_columns, "K": num_rewards}

    for field in (*_EXPERIENCE_FIELDS, _RATIO):
        tensor = tensors.get(field.key)
        if tensor is None and field.optional:
            continue
        shape = tuple(sizes[dimension] for dimension in field.dimensions)
        if tensor is None or tuple(tensor.shape) != shape or _kind(tensor) != field.kind:
            got = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            expected = "floating point" if field.kind == "float" else field.kind
            raise CheckpointError(
                f"path: tensor {field.key!r} must be {expected} of shape {shape}, got {got} in {path}; write it again"
            )


def _kind(tensor: Tensor) -> str:
    """Name the kind of a tensor; all floating-point types are one kind."""
    if tensor.is_floating_point():
        return "float"
    return str(tensor.dtype).removeprefix("torch.")
