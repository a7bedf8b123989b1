"""The rollout file: what goes in comes out to the last bit, and nothing foreign, cut or inconsistent is read."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowgraph import InvalidInputError, OutputError
from rl import CheckpointError
from rl.reports.credit_report import report_file, report_payload
from rl.rollouts.rollout_file import load_rollout, save_rollout, token_texts
from tests.rl.reports.test_credit_report import HOSTILE, example


class ByteTokenizer:
    """Ids are bytes of UTF-8; 256 is a special token, 257 has no text; a decode strips the first space."""

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        text = b"".join(bytes([i]) if i < 256 else b"<end>" if i == 256 else b"" for i in ids)
        return text.decode(errors="replace").removeprefix(" ")

    def convert_ids_to_tokens(self, index: int) -> str | None:
        return f"byte{index}" if index < 257 else None


def test_token_texts_join_to_the_text_and_broken_bytes_get_their_names():
    tokenizer = ByteTokenizer()
    ids = [*"a 🍎é ".encode(), 256, 0xF0, 0x9F, ord("b"), 257]
    texts = token_texts(tokenizer, torch.tensor([ids]))[0]
    assert texts == ["a", " ", "🍎", "", "", "", "é", "", " ", "<end>", "byte240", "byte159", "b", "<257>"]
    whole = "zwei Äpfel – 🍎🍏".encode()
    assert "".join(token_texts(tokenizer, torch.tensor([list(whole)]))[0]).encode() == whole


@pytest.mark.unchecked
def test_token_texts_refuse_what_is_no_table_of_ids():
    for wrong in (torch.tensor([1, 2]), torch.tensor([[1.0]]), torch.tensor([[-1]])):
        with pytest.raises(InvalidInputError, match=r"input_ids: must be a \[batch, tokens\] tensor of token ids, got"):
            token_texts(ByteTokenizer(), wrong)


def same(one: object, other: object) -> bool:
    """Records that are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        names = [item.name for item in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in names)
    return one == other


@pytest.mark.parametrize("extras", [True, False])
def test_a_rollout_comes_back_as_it_was(tmp_path: Path, extras: bool):
    experience, tokens, ratio = example(2, 2, 12, HOSTILE, extras)
    info = {"title": HOSTILE[0], "settings": {"steps": 3, "lr": 1e-4, "none": None}, "broken": "\ud83d"}
    path = save_rollout(tmp_path / "a.safetensors", experience, tokens, info, ratio=ratio if extras else None)
    back = load_rollout(path)
    assert same(back.experience, experience)
    assert back.tokens == tokens
    assert back.info == info
    assert (back.ratio is None) if not extras else torch.equal(back.ratio, ratio)
    assert not same(replace(experience, advantages=experience.advantages + 1e-7), experience)


def test_the_page_of_a_loaded_rollout_is_the_page_of_the_rollout(tmp_path: Path):
    experience, tokens, ratio = example(2, 2, 12, HOSTILE)
    back = load_rollout(save_rollout(tmp_path / "a.safetensors", experience, tokens, {}, ratio=ratio))
    assert report_payload(back.experience, back.tokens, ratio=back.ratio) == report_payload(
        experience, tokens, ratio=ratio
    )


def test_a_file_without_its_end_is_refused(tmp_path: Path):
    experience, tokens, _ = example(1, 2, 6)
    whole = save_rollout(tmp_path / "a.safetensors", experience, tokens, {}).read_bytes()
    for length in (0, 1, 8, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"path: must be a complete safetensors file, got .*truncated"):
            load_rollout(tmp_path / "b.safetensors")


def test_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "foreign.safetensors"
    with pytest.raises(CheckpointError, match=r"path: must be an existing rollout file, got .*; check the name"):
        load_rollout(path)
    with pytest.raises(CheckpointError, match="path: must be"):
        load_rollout(tmp_path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"must be a flowgraph-rollout file of version 1, got None of version"):
        load_rollout(path)
    save_file({"x": torch.ones(1)}, path, {"format": "flowgraph-rollout", "version": "2", "record": "{}"})
    with pytest.raises(CheckpointError, match="of version '2' in"):
        load_rollout(path)
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="path: must be a complete safetensors file"):
        load_rollout(path)


@pytest.mark.parametrize(
    "record",
    [None, "", "[]", "{", "[" * 100_000, "{}", '{"tokens": 3}', '{"tokens": [[1]], "completions": []}'],
)
def test_unreadable_records_are_refused(tmp_path: Path, record: str | None):
    mark = {"format": "flowgraph-rollout", "version": "1"}
    save_file({"x": torch.ones(1)}, tmp_path / "a", mark | ({} if record is None else {"record": record}))
    with pytest.raises(CheckpointError, match=r"path: must hold a (complete )?rollout record, got .*; write it again"):
        load_rollout(tmp_path / "a")


def tampered(path: Path, change_tensors=None, **changes) -> Path:
    """A rollout file in which some things were changed."""
    experience, tokens, _ = example(1, 2, 6)
    whole = save_rollout(path, experience, tokens, {}).read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    tensors = load_file(path)
    (change_tensors or (lambda tensors: None))(tensors)
    header["record"] = json.dumps(json.loads(header["record"]) | changes)
    save_file(tensors, path, header)
    return path


def test_inconsistent_files_are_refused(tmp_path: Path):
    path = tmp_path / "a"
    load_rollout(tampered(path))
    cases = [
        (lambda t: t.pop("advantages"), {}, r"tensor 'advantages' must be floating point of shape \(2, 6\), got none"),
        (lambda t: t.update({"loss_mask": t["loss_mask"].long()}), {}, r"'loss_mask' must be bool of .*int64 \(2, 6\)"),
        (lambda t: t.update({"ratio": t["advantages"][:, :5].clone()}), {}, r"'ratio' must be .*float32 \(2, 5\)"),
        (
            lambda t: t.update({"responses.response_mask": torch.tensor(True)}),
            {},
            r"shape \(2, 6\), got torch.int64 \(2, 12\)",
        ),
        (None, {"prompt_length": 5}, r"'responses.input_ids' must be int64 of shape \(2, 11\), got torch.int64"),
        (None, {"samples": []}, r"must be .* of shape \(0, "),
        (None, {"samples": [{"index": 1}] * 2}, "must hold a complete rollout record"),
        (None, {"completions": ["only one"]}, "must hold text for 2 responses of 6 tokens, got another number"),
        (None, {"tokens": [["a"] * 6, ["a"] * 5]}, "must hold text for 2 responses of 6 tokens"),
        (None, {"tokens": [[1] * 6] * 2}, "1 is not text"),
    ]
    for change, record, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load_rollout(tampered(path, change, **record))


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path):
    experience, tokens, _ = example(1, 2, 6)
    for info in ({"model": object()}, {"loss": math.nan}):
        with pytest.raises(InvalidInputError, match="info, samples: must be JSON values without NaN or infinity, got"):
            save_rollout(tmp_path / "a", experience, tokens, info)
    with pytest.raises(OutputError, match="its folder must exist"):
        save_rollout(tmp_path / "none" / "a", experience, tokens, {})
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_made_from_the_file_alone(tmp_path: Path):
    experience, tokens, ratio = example(2, 2, 12)
    info = {"step": 7, "model": "tiny", "task": "chain", "credit": {"rule": "flow"}}
    path = save_rollout(tmp_path / "a.safetensors", experience, tokens, info, ratio=ratio)
    page = report_file(path, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Token credit, step 7" in page
    assert "tiny, chain" in page
    assert "credit.rule" in page
