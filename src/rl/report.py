"""The token-credit report: one HTML page for a rollout, and the file that a run keeps so the page can be made later.

The page makes no request of any kind and opens from disk. Token text is data in it: it travels as JSON with every
markup character escaped, the page's script writes it by ``textContent`` only, and a Content-Security-Policy names
this one script and this one style sheet by their hashes. The rollout file is safetensors with a JSON record: nothing
is ever unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flowgraph import InvalidInputError, atomic_write
from rl.errors import CheckpointError
from rl.records import Credit, Experience, Responses, Sample, TokenScores

PathLike = str | os.PathLike[str]
Tokens = Sequence[Sequence[str]]

PAGE_SCHEMA = "flowgraph-credit-report/1"
FORMAT, FORMAT_VERSION = "flowgraph-rollout", 1
_BINS = 30
_UTF8_LENGTH = 4
"""A character has at most four bytes, so at most four tokens share one."""
_CREDIT_TENSORS = {"scores": "fBR", "scored": "bBR", "weights": "fBR"}
_TENSORS = {
    "responses": (
        {"input_ids": "iBT", "attention_mask": "bBT", "response_mask": "bBR", "truncated": "bB", "groups": "iB"}
        | {"rewards": "fB", "question": "bBT", "answer": "bBT", "oracle": "bBR"}
    ),
    "scores": dict.fromkeys(("logprobs", "entropy", "ref_logprobs", "values"), "fBR"),
    "credit": _CREDIT_TENSORS,
    "": {"advantages": "fBR", "returns": "fBR", "loss_mask": "bBR", "policy_weights": "fBR", "ratio": "fBR"},
}
"""Tensors of the file by their record: kind (float, bool, int64) and dimensions (batch, all tokens, response)."""
_OPTIONAL = {"responses.oracle", "scores.ref_logprobs", "scores.values", "returns", "ratio"}


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


@dataclass(frozen=True, eq=False)
class _Quantity:
    """One number per token, and how the page colours it."""

    name: str
    note: str
    scale: str  # "signed" about a centre, "ratio" (logarithmic about 1), "root", "linear" or "falling" from 0
    values: Float[Tensor, "batch response"]
    where: Bool[Tensor, "batch response"]  # tokens that have this number
    centre: float = 0.0

    def described(self) -> dict[str, Any]:
        """Name, note and scale; full colour from the 99th percentile, so that one outlier does not pale the rest."""
        values = self.values[self.where].double()
        values = values[torch.isfinite(values)]
        if self.scale == "ratio":
            values = values.clamp(min=1e-6).log()
        sizes = (values - self.centre).abs()
        size = sizes.numel()
        bound = float(sizes.kthvalue(math.ceil(0.99 * size)).values) if size else 0.0
        exceeded = [bool((side > bound).any()) for side in (self.centre - values, values - self.centre)] if size else []
        rest = {"centre": self.centre, "bound": _short(bound), "exceeded": exceeded or [False, False]}
        return {"name": self.name, "note": self.note, "scale": self.scale, **rest}


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


def report_payload(
    experience: Experience,
    tokens: Tokens,
    *,
    ratio: Float[Tensor, "batch response"] | None = None,
    title: str = "Token credit",
    subtitle: str = "",
    settings: Mapping[str, Any] | None = None,
    groups: Sequence[int] | None = None,
    right_at: float = 1.0,
) -> dict[str, Any]:
    """All that the page shows, as plain JSON values in the schema ``flowgraph-credit-report/1``.

    Args:
        experience: the rollout.
        tokens: B lists of R readable token strings; see :func:`token_texts`.
        ratio: ``[B, R]`` new over old probability of each token, where an update has measured it.
        title: heading of the page.
        subtitle: line below it, such as model, task and step.
        settings: how the rollout was made; nested mappings are flattened.
        groups: numbers of the prompt groups to show, all of them by default; the summary is of those shown.
        right_at: a response counts as right from this reward on.

    Returns:
        Summary, scales and per group its responses, the best rewarded first. Numbers have four digits and are None
        where they are not finite; padding at the end of a response is counted, not listed.

    Raises:
        InvalidInputError: tokens or ratio of another shape, or an unknown group.
    """
    shape = tuple(experience.responses.response_mask.shape)
    lengths = sorted({len(row) for row in tokens})
    if shape[0] == 0 or len(tokens) != shape[0] or lengths != [shape[1]]:
        raise InvalidInputError(
            f"tokens: must be {shape[0]} lists of {shape[1]} strings for at least one response, got {len(tokens)} "
            f"lists of {lengths}; pass token_texts(tokenizer, input_ids[:, prompt_length:])"
        )
    if ratio is not None and tuple(ratio.shape) != shape:
        raise InvalidInputError(f"ratio: must have shape {shape}, got {tuple(ratio.shape)}; give one per token")
    numbers = experience.responses.groups.tolist()
    if groups is not None:
        unknown = [number for number in groups if number not in numbers]
        if unknown or not groups:
            raise InvalidInputError(
                f"groups: must name groups of this rollout, got {list(groups)!r}; there are {sorted(set(numbers))}"
            )
        rows = [row for row, number in enumerate(numbers) if number in groups]
        experience, tokens = experience.select(rows), [tokens[row] for row in rows]
        ratio = None if ratio is None else ratio[rows]
    quantities = list(_quantities(experience, ratio))
    shown = [_response(experience, tokens, quantities, row, right_at) for row in range(len(tokens))]
    return {
        "schema": PAGE_SCHEMA,
        "title": title,
        "subtitle": subtitle,
        "settings": [list(pair) for pair in _flattened(settings or {})],
        "right_at": right_at,
        "quantities": [quantity.described() for quantity in quantities],
        "summary": _summary(experience, right_at),
        "groups": list(_groups(experience.responses, shown)),
    }


def write_report(
    path: PathLike,
    experience: Experience,
    tokens: Tokens,
    *,
    ratio: Float[Tensor, "batch response"] | None = None,
    title: str = "Token credit",
    subtitle: str = "",
    settings: Mapping[str, Any] | None = None,
    groups: Sequence[int] | None = None,
    right_at: float = 1.0,
) -> Path:
    """Write the report of a rollout as one HTML page, atomically; arguments as in :func:`report_payload`.

    Raises:
        InvalidInputError: as there.
        OutputError: the path cannot be written.

    Cost: about 80 bytes per token and quantity shown, 10 at most.
    """
    payload = report_payload(
        experience, tokens, ratio=ratio, title=title, subtitle=subtitle,
        settings=settings, groups=groups, right_at=right_at,
    )  # fmt: skip
    page = render_report(payload).encode("utf-8", "replace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(page)
    return Path(path)


def render_report(payload: Mapping[str, Any]) -> str:
    """The page of a payload of :func:`report_payload`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = _printable
    environment.filters["number"] = lambda value: "\N{EN DASH}" if value is None else f"{value:.3g}"
    template = environment.from_string((files("rl") / "report.html.jinja").read_text(encoding="utf-8"))

    def source_of(block: str) -> str:
        """What a Content-Security-Policy calls exactly this inline content."""
        content = "".join(template.blocks[block](template.new_context()))
        return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")

    drawn = {name: payload[name] for name in ("quantities", "groups", "right_at")}
    text = json.dumps(drawn, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # U+2028, U+2029, controls and lone surrogates are ASCII escapes already
        text = text.replace(character, f"\\u{ord(character):04x}")
    hashes = {"style_hash": source_of("style"), "script_hash": source_of("script")}
    return template.render(page_data=Markup(text), page=payload, **hashes)


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


def _quantities(experience: Experience, ratio: Tensor | None) -> Iterator[_Quantity]:
    scores, credit, chosen = experience.scores, experience.credit, experience.responses.response_mask
    scored, weights = credit.scored, experience.policy_weights
    yield _Quantity("weight", "1 changes nothing", "signed", credit.weights, scored, 1.0)
    yield _Quantity("score", "what the rule gave (flow: throughput)", "root", credit.scores, scored)
    yield _Quantity("advantage", "before the weight", "signed", experience.advantages, chosen)
    product, update = "advantage \N{MULTIPLICATION SIGN} weight", experience.advantages * weights
    yield _Quantity(product, "what enters the policy loss", "signed", update, chosen)
    if not torch.equal(weights[chosen], credit.weights[chosen]):
        yield _Quantity("loss weight", "weight of the policy loss itself", "signed", weights, chosen, 1.0)
    if ratio is not None:
        yield _Quantity("ratio", "new over old probability", "ratio", ratio, chosen)
    yield _Quantity("entropy", "of the distribution it was drawn from, in nats", "linear", scores.entropy, chosen)
    yield _Quantity("log-probability", "under the policy that wrote it", "falling", scores.logprobs, chosen)
    if scores.ref_logprobs is not None:
        kl = scores.logprobs - scores.ref_logprobs
        yield _Quantity("KL to the reference", "log-probability minus the reference's (k1)", "signed", kl, chosen)
    if scores.values is not None:
        yield _Quantity("value", "the critic's, before the token", "signed", scores.values, chosen)
    if experience.returns is not None:
        yield _Quantity("return", "the critic's target", "signed", experience.returns, chosen)


def _response(
    experience: Experience, tokens: Tokens, quantities: Sequence[_Quantity], row: int, right_at: float
) -> dict[str, Any]:
    responses, chosen = experience.responses, experience.responses.response_mask[row]
    length = int(chosen.nonzero().max()) + 1 if bool(chosen.any()) else 0
    masks = [chosen, experience.credit.scored[row], responses.answer_in_response[row], experience.loss_mask[row]]
    if responses.oracle is not None:
        masks.append(responses.oracle[row])
    flags = sum(mask[:length].long() << bit for bit, mask in enumerate(masks))
    reward = float(responses.rewards[row])
    return {
        "row": row,
        "reward": _short(reward),
        "right": reward >= right_at,
        "truncated": bool(responses.truncated[row]),
        "in_loss": bool(masks[3].any()),
        "padding": chosen.numel() - length,
        "tokens": list(tokens[row][:length]),
        "flags": torch.as_tensor(flags).tolist(),  # bits: chosen, scored, answer, in the loss, known to be decisive
        "numbers": [
            [_short(value) if has else None for value, has in zip(values, where, strict=True)]
            for values, where in ((q.values[row, :length].tolist(), q.where[row, :length].tolist()) for q in quantities)
        ],
    }


def _groups(responses: Responses, shown: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    numbers = responses.groups.tolist()
    for number in dict.fromkeys(numbers):
        rows = [row for row, group in enumerate(numbers) if group == number]
        sample, rewards = responses.samples[rows[0]], responses.rewards[rows]
        prompt = [["", sample.prompt]] if isinstance(sample.prompt, str) else sample.prompt
        yield {
            "group": number,
            "problem": sample.index,
            "prompt": [
                [str(part.get("role", "")), str(part.get("content", ""))] if isinstance(part, Mapping) else part
                for part in prompt
            ],
            "answer": sample.answer,
            "same_reward": bool((rewards == rewards[0]).all()),
            "responses": [shown[row] for row in sorted(rows, key=lambda row: -float(responses.rewards[row]))],
        }


def _summary(experience: Experience, right_at: float) -> dict[str, Any]:
    responses, scored = experience.responses, experience.credit.scored
    rewards, numbers = responses.rewards.double(), responses.groups
    groups = [rewards[numbers == number] for number in numbers.unique()]
    weights, in_loss = experience.credit.weights.double(), experience.loss_mask
    means = (weights * scored).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    raised = (weights > means + 1e-6 * means.abs()) & scored  # float32 weights that are all equal raise none
    return {
        "num_groups": len(groups),
        "num_responses": responses.num_sequences,
        "num_tokens": int(responses.response_mask.sum()),
        "num_scored": int(scored.sum()),
        "reward": _short(float(rewards.mean())),
        "right": _short(float((rewards >= right_at).double().mean())),
        "truncated": _short(float(responses.truncated.double().mean())),
        "without_variance": _short(sum(bool((group == group[0]).all()) for group in groups) / len(groups)),
        "weight": _mean(weights, scored),
        "loss_weight": _mean(experience.policy_weights.double(), in_loss),
        "selected": _mean(raised.double(), scored),
        "histogram": _histogram(weights[scored]),
    }


def _mean(values: Tensor, mask: Tensor) -> float | None:
    return _short(float(values[mask].mean())) if bool(mask.any()) else None


def _histogram(weights: Float[Tensor, " tokens"]) -> dict[str, Any]:
    weights = weights[torch.isfinite(weights)]
    low, high = min(0.0, *weights.tolist(), 0.0), max(1.0, *weights.tolist(), 1.0)
    counts = torch.histc(weights, _BINS, low, high) if weights.numel() else torch.zeros(_BINS)
    return {"low": _short(low), "high": _short(high), "counts": [int(count) for count in counts]}


def _short(value: float) -> float | None:
    """Four significant digits; None where there is no number to show. Whole numbers are shorter without a point."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", "none" if value is None else str(value)


def _printable(text: str) -> str:
    """Text whose invisible and direction-changing characters show as replacement characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))
