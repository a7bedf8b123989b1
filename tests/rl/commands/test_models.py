"""``flowgraph-rl merge``: plain libraries read the merged model and the adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures.policies import alphabet
from tests.fixtures.rl_commands import invoke


def test_merge_and_adapter_are_what_plain_libraries_read(trained_run: Path, saved_model: Path, tmp_path: Path):
    out = tmp_path / "deep" / "merged"
    assert f"wrote {out}" in "".join(
        invoke("merge", trained_run, "--model", saved_model, "--out", out).output.split("\n")
    )
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    ids = torch.tensor([alphabet()("a=1;b=a+2;b?")["input_ids"]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(saved_model)
        untouched = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(trained_run / "checkpoint-000002" / "policy"))(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - untouched).abs().max() > 1e-3
