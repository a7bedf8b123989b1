"""A version names one adapter, and a request is scored by the adapter of its version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.errors import CheckpointError, ConfigError, ServiceError
from rl.serving.adapters import AdapterRegistry, PolicyVersions, read_adapter
from tests.fixtures.policies import tiny_policy
from tests.fixtures.serving import write_adapter


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[4, 5, 6, 7]])).logits


def test_each_version_is_its_own_policy_and_the_base_is_left_as_it_was(tmp_path: Path):
    plain = logits(tiny_policy())
    policies = PolicyVersions(tiny_policy(), kept=1)
    adapters = [read_adapter(step, write_adapter(tmp_path / str(step), seed=step)) for step in (1, 2)]
    expected = []
    for adapter in adapters:
        fresh = PolicyVersions(tiny_policy(), kept=1)
        with fresh.active(adapter) as model:
            expected.append(logits(model))
    assert not torch.equal(expected[0], expected[1])
    # The first one is dropped for the second, and loaded again.
    for number in (0, 1, 0):
        with policies.active(adapters[number]) as model:
            assert torch.equal(logits(model), expected[number])
        with policies.active(None) as model:
            assert torch.equal(logits(model), plain)


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path):
    plain = logits(tiny_policy())
    good = read_adapter("good", write_adapter(tmp_path / "good", seed=1))
    foreign = read_adapter("foreign", write_adapter(tmp_path / "foreign", seed=1, family="gpt2"))
    more_layers = read_adapter("more", write_adapter(tmp_path / "more", seed=1, layers=3))
    weights = load_file(write_adapter(tmp_path / "lacking", seed=1) / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "lacking" / "adapter_model.safetensors")
    lacking = read_adapter("lacking", tmp_path / "lacking")
    policies = PolicyVersions(tiny_policy(), kept=2)
    for first in (None, good):
        with policies.active(first) as model:
            before = logits(model)
        for wrong in (foreign, more_layers, lacking):
            with (
                pytest.raises(
                    CheckpointError, match=r"adapter: must be a PEFT folder that fits the model, got .*; start"
                ),
                policies.active(wrong),
            ):
                pass
        with policies.active(first) as model:
            assert torch.equal(logits(model), before)
    with policies.active(None) as model:
        assert torch.equal(logits(model), plain)


def test_files_that_changed_under_a_version_are_refused(tmp_path: Path):
    folder = write_adapter(tmp_path / "a", seed=1)
    adapter = read_adapter("1", folder)
    shutil.rmtree(folder)
    write_adapter(folder, seed=2)
    with pytest.raises(CheckpointError, match=r"adapter: files of a version must not change, got others in .*;"):
        PolicyVersions(tiny_policy(), kept=1).active(adapter).__enter__()


def test_a_version_names_one_adapter_also_after_it_was_dropped(tmp_path: Path):
    first, second, third = [read_adapter(step, write_adapter(tmp_path / str(step), seed=step)) for step in (1, 2, 3)]
    registry = AdapterRegistry(kept=2)
    assert registry.resolve(None) is None
    for adapter in (first, second, third):
        registry.add(adapter)
    registry.add(third)
    assert registry.versions() == ["base", "2", "3"]
    assert registry.resolve(None) == third
    assert registry.resolve("2") == second
    assert registry.resolve("base") is None
    with pytest.raises(
        ServiceError, match=r"adapter_version: must be .* loaded, got '1'; loaded are 'base', '2', '3', a"
    ):
        registry.resolve("1")
    with pytest.raises(
        ServiceError, match=r"version: must name one adapter, got '1' for .*; give every adapter"
    ) as told:
        registry.check(read_adapter("1", tmp_path / "2"))
    assert told.value.status == 409
    registry.check(read_adapter("1", tmp_path / "1"))


@pytest.mark.parametrize("version", ["", "x" * 129, "a\nb", None, 1.5, True, ["1"]])
def test_an_invalid_version_is_refused(tmp_path: Path, version: object):
    with pytest.raises(ConfigError, match=r"adapter_version: must be an integer or 1 to 128 printable .*, got .*; use"):
        read_adapter(version, tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path):
    folder = write_adapter(tmp_path / "a", seed=1)
    with pytest.raises(ConfigError, match=r"version: must differ from 'base', .* got 'base'; use the number"):
        read_adapter("base", folder)
    for wrong in (tmp_path / "none", tmp_path, Path("a\0b")):
        with pytest.raises(
            CheckpointError, match=r"adapter: must be a PEFT folder with adapter_config.json and .*; save"
        ):
            read_adapter("1", wrong)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    with pytest.raises(
        CheckpointError, match=r"adapter: must be a LoRA adapter, got peft_type 'PROMPT_TUNING' in .*; m"
    ):
        read_adapter("1", folder)
    for text in ("{", "[]", "3"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"adapter: adapter_config.json must be JSON with a peft_type, got .*;"
        ):
            read_adapter("1", folder)
