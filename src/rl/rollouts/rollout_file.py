"""The rollout file: an experience with its readable tokens in one safetensors file, checked as it is read.

A run keeps some for the token-credit report, and a checkpoint inside a step holds one as its rollout buffer. Nothing is
ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flowgraph import InvalidInputError, atomic_write
from rl.errors import CheckpointError
from rl.records import Credit, Experience, Responses, Sample, TokenScores

PathLike = str | os.PathLike[str]
Tokens = Sequence[Sequence[str]]

FORMAT, FORMAT_VERSION = "flowgraph-rollout", 1
_UTF8_LENGTH = 4
"""A character has at most four bytes, so at most four tokens share one."""
_TENSORS = {
    "responses": (
        {"input_ids": "iBT", "attention_mask": "bBT", "response_mask": "bBR", "truncated": "bB", "groups": "iB"}
        | {"rewards": "fB", "question": "bBT", "answer": "bBT", "oracle": "bBR"}
    ),
    "scores": dict.fromkeys(("logprobs", "entropy", "ref_logprobs", "values"), "fBR") | {"final_values": "fB"},
    "credit": {"scores": "fBR", "scored": "bBR", "weights": "fBR"},
    "": {"advantages": "fBR", "returns": "fBR", "loss_mask": "bBR", "policy_weights": "fBR", "ratio": "fBR"},
}
"""Tensors of the file by their record: kind (float, bool, int64) and dimensions (batch, all tokens, response)."""
_OPTIONAL = {"responses.oracle", "scores.ref_logprobs", "scores.values", "scores.final_values", "returns", "ratio"}


class Rollout(NamedTuple):
    """What :func:`load_rollout` gives back.

    Attributes:
        experience: the rollout.
        tokens: B lists of R readable token strings.
        info: what the writer said of it, for example ``title``, ``subtitle`` and ``settings``.
        ratio: ``[B, R]`` new over old probability, or None.
    """

    experience: Experience
    tokens: list[list[str]]
    info: dict[str, Any]
    ratio: Float[Tensor, "batch response"] | None


def token_texts(tokenizer: Any, input_ids: Int64[Tensor, "batch tokens"]) -> list[list[str]]:
    """The readable text of every token; pass the response columns, ``input_ids[:, prompt_length:]``.

    A token's text is what it adds to the decoded text after its predecessor. Tokens that share one character (an
    emoji split into bytes) leave it to the first of them and are empty; what has no text gets its vocabulary name.

    Raises:
        InvalidInputError: no table of token ids.

    Cost: about two decodings for each distinct pair of neighbours.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point() or bool((input_ids < 0).any()):
        raise InvalidInputError(
            f"input_ids: must be a [batch, tokens] tensor of token ids, got {tuple(input_ids.shape)} "
            f"{input_ids.dtype}; pass responses.input_ids[:, responses.prompt_length:]"
        )
    known: dict[tuple[int, ...], str] = {}

    def decode(*ids: int) -> str:
        if ids not in known:
            known[ids] = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return known[ids]

    def pieces(ids: list[int]) -> Iterator[str]:
        at, before = 0, []  # before: the tokens of the preceding character, without which a decoder may strip a space
        while at < len(ids):
            for end in range(at + 1, min(at + _UTF8_LENGTH, len(ids)) + 1):
                head, whole = decode(*before) if before else "", decode(*before, *ids[at:end])
                text = whole.removeprefix(head) if whole.startswith(head) else decode(*ids[at:end])
                if "\ufffd" not in text:
                    break
            before = ids[at:end]
            if not text or "\ufffd" in text:
                text, end, before = str(tokenizer.convert_ids_to_tokens(ids[at]) or f"<{ids[at]}>"), at + 1, []
            yield text
            yield from [""] * (end - at - 1)
            at = end

    return [list(pieces(row)) for row in input_ids.tolist()]


def save_rollout(
    path: PathLike,
    experience: Experience,
    tokens: Tokens,
    info: Mapping[str, Any],
    *,
    ratio: Float[Tensor, "batch response"] | None = None,
) -> Path:
    """Write a rollout, its token strings and JSON about it to one safetensors file, atomically.

    Raises:
        InvalidInputError: info or the metadata of a sample is no JSON.
        OutputError: the path cannot be written.
    """
    from safetensors.torch import save

    responses = experience.responses
    samples = [{item.name: getattr(sample, item.name) for item in fields(Sample)} for sample in responses.samples]
    record = {
        "tokens": [list(row) for row in tokens],
        "info": dict(info),
        "prompt_length": responses.prompt_length,
        "completions": list(responses.completions),
        "samples": [sample | {"metadata": dict(sample["metadata"])} for sample in samples],
    }
    try:
        text = json.dumps(record, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"info, samples: must be JSON values without NaN or infinity, got others ({error}); "
            "use text, finite numbers, lists and mappings"
        ) from error
    found = {}
    for part, names in _TENSORS.items():
        for name in names:
            value = ratio if name == "ratio" else getattr(getattr(experience, part) if part else experience, name)
            if value is not None:
                found[_key(part, name)] = value.detach().cpu().clone().contiguous()  # none may share memory
    content = save(found, {"format": FORMAT, "version": str(FORMAT_VERSION), "record": text})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def load_rollout(path: PathLike) -> Rollout:
    """Read what :func:`save_rollout` wrote; the file is checked, never executed.

    Raises:
        CheckpointError: missing, truncated, foreign, inconsistent, or of another version.
    """
    tensors, record = _read(path)
    try:
        tokens = [[_text(token) for token in row] for row in record["tokens"]]
        completions = tuple(_text(text) for text in record["completions"])
        samples = tuple(Sample(**sample) for sample in record["samples"])
        prompt_length, info = int(record["prompt_length"]), dict(record["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"path: must hold a complete rollout record, got {path} ({error!r}); write it again"
        ) from error
    _check_tensors(path, tensors, len(samples), prompt_length)
    shape = tuple(tensors["responses.response_mask"].shape)
    if len(completions) != shape[0] or len(tokens) != shape[0] or {len(row) for row in tokens} != {shape[1]}:
        raise CheckpointError(
            f"path: must hold text for {shape[0]} responses of {shape[1]} tokens, got another number in {path}; "
            "write it again"
        )
    parts = {part: {name: tensors.get(_key(part, name)) for name in names} for part, names in _TENSORS.items()}
    ratio = parts[""].pop("ratio")
    responses: Any = parts["responses"]
    experience: Any = parts[""]
    return Rollout(
        Experience(
            responses=Responses(samples=samples, completions=completions, prompt_length=prompt_length, **responses),
            scores=TokenScores(**parts["scores"]),  # type: ignore[arg-type]
            credit=Credit(**parts["credit"]),  # type: ignore[arg-type]
            **experience,
        ),
        tokens,
        info,
        ratio,
    )


def _key(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _read(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
        record = json.loads(metadata["record"])
        if not isinstance(record, dict):
            raise ValueError("the record is no mapping")
    except FileNotFoundError:
        raise CheckpointError(f"path: must be an existing rollout file, got {path}; check the name") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"path: must be a complete safetensors file, got {path} ({error}); it is truncated, or no rollout"
        ) from error
    except (KeyError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"path: must hold a rollout record, got {path} ({error}); write it again") from error
    return tensors, record


def _check_tensors(path: PathLike, tensors: Mapping[str, Tensor], batch: int, prompt_length: int) -> None:
    mask = tensors.get("responses.response_mask")
    width = mask.shape[-1] if mask is not None and mask.ndim else 0
    sizes = {"B": batch, "R": width, "T": prompt_length + width}
    for part, names in _TENSORS.items():
        for name, (kind, *dimensions) in names.items():
            key = _key(part, name)
            tensor = tensors.get(key)
            if tensor is None and key in _OPTIONAL:
                continue
            shape = tuple(sizes[dimension] for dimension in dimensions)
            right = tensor is not None and tuple(tensor.shape) == shape and kind == _kind(tensor)
            if not right:
                got = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                wanted = {"f": "floating point", "b": "bool", "i": "int64"}[kind]
                raise CheckpointError(
                    f"path: tensor {key!r} must be {wanted} of shape {shape}, got {got} in {path}; write it again"
                )


def _kind(tensor: Tensor) -> str:
    return "f" if tensor.is_floating_point() else {torch.bool: "b", torch.int64: "i"}.get(tensor.dtype, "?")
