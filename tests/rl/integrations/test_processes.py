"""What the processes of a launch are compared by, in one process; test_trl_processes runs two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rl.config import CreditConfig
from rl.errors import ConfigError, CreditError
from rl.integrations import processes
from rl.integrations.processes import (
    check_parallelism,
    described_setting,
    fail_together,
    require_same,
    settings_of,
)
from tests.fixtures.policies import tiny_policy


def with_others(monkeypatch: pytest.MonkeyPatch, *values: Any) -> None:
    """Let other processes answer with these values."""
    monkeypatch.setattr(processes, "_of_all_processes", lambda value: [value, *values])


def test_one_process_agrees_with_itself():
    require_same(settings_of(CreditConfig.recommended()))
    fail_together(None)
    with pytest.raises(CreditError, match="no digit"):
        fail_together(CreditError("no digit"))


def test_settings_that_differ_are_refused_by_both_values(monkeypatch):
    own = settings_of(CreditConfig(rule="flow", share=0.4))
    same = {name: described_setting(value) for name, value in own.items()}
    with_others(monkeypatch, same, same)
    require_same(own)
    with_others(monkeypatch, same, same | {"credit.share": "0.2"})
    with pytest.raises(ConfigError) as refusal:
        require_same(own)
    assert str(refusal.value) == (
        "credit.share: must be the same in all processes, got 0.4 in process 0 and 0.2 in process 2; start every "
        "process with the same script, settings and data"
    )


def test_an_error_elsewhere_is_told(monkeypatch):
    with_others(monkeypatch, None, "rewards: must be finite, got nan; check the reward")
    with pytest.raises(CreditError) as refusal:
        fail_together(None)
    assert str(refusal.value).startswith(
        "process 2: must give credit to its sequences, got an error: rewards: must be finite, got nan; check the "
        "reward; correct it there"
    )
    with pytest.raises(ConfigError, match="its own"):
        fail_together(ConfigError("its own"))


def test_every_credit_setting_is_compared():
    assert set(settings_of(CreditConfig())) == {f"credit.{name}" for name in CreditConfig.__dataclass_fields__}


@pytest.mark.parametrize(
    ("fsdp_version", "sizes", "text"),
    [
        (1, {}, r"fsdp_version: must be 2, got 1, whose wrapper hides the layers.*; set fsdp_version: 2"),
        (2, {"tp_size": 2}, "tp_size: must be 1, so that each process has every head and token.*got 2; shard the"),
        (2, {"cp_size": 4}, "cp_size: must be 1.*got 4; shard the weights with FSDP2 or DeepSpeed ZeRO"),
        (None, {"cp_size": 1, "sp_size": 2}, "sp_size: must be 1.*got 2"),
    ],
)
def test_parallelism_that_splits_sequences_or_heads_is_refused(fsdp_version, sizes, text):
    plugin = None if fsdp_version is None else SimpleNamespace(fsdp_version=fsdp_version)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=SimpleNamespace(**sizes) if sizes else None
    )
    with pytest.raises(ConfigError, match=text):
        check_parallelism(accelerator, tiny_policy())


def test_layers_that_transformers_has_split_are_refused():
    accelerator = SimpleNamespace(state=SimpleNamespace(), parallelism_config=None)
    check_parallelism(accelerator, SimpleNamespace(tp_size=None))
    config = {"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}}
    accelerator.state.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    with pytest.raises(ConfigError, match=r"autotp_size: must be 1.*got 2"):
        check_parallelism(accelerator, SimpleNamespace(tp_size=None))
    config.pop("tensor_parallel")
    check_parallelism(accelerator, SimpleNamespace(tp_size=None))
    with pytest.raises(ConfigError, match=r"tp_size: must be 1.*got 4"):
        check_parallelism(accelerator, SimpleNamespace(tp_size=4))


def test_settings_are_written_alike_in_every_process():
    assert described_setting({"b": [1, 2.5], "a": None}) == "{'a': None, 'b': [1, 2.5]}"
    assert described_setting(described_setting) == "rl.integrations.processes.described_setting"
    # The text of an object may hold its address, which differs between processes.
    assert described_setting(object()) == "builtins.object"
