"""Choices, wrappers, threads, gradients and messages of attention capture, on one or two tiny models."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import peft
import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flowgraph import (
    AttentionRecorder,
    AttentionRows,
    CaptureError,
    HeadSelector,
    InvalidInputError,
    MemoryLimitError,
    capture,
    context_length,
)
from flowgraph.attention import attention_rows as rows_module
from flowgraph.attention.interception import AttentionCall
from flowgraph.attention.modules import attention_modules, base_model
from tests.fixtures.models import FAMILIES, VOCABULARY, build, family, padded, sequences

LLAMA, TEXT = "llama", sequences()[0]

# peft and we use names that the oldest supported transformers has.
old_names = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The matrices are tiny: waking other threads takes longer than the work, far longer on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def eager_weights(text: Tensor = TEXT, name: str = LLAMA) -> Tensor:
    """``[layers, heads, tokens, tokens]`` from ``output_attentions`` of the eager model, and nothing of ours."""
    with torch.no_grad():
        attentions = family(name, "eager")(input_ids=text[None], output_attentions=True, use_cache=False).attentions
    return torch.stack(attentions)[:, 0]


def rows_of(rows: AttentionRows, item: int = 0) -> Tensor:
    sequence = rows.sequence(item)
    return sequence.block(0, sequence.num_tokens)[0]


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, check_dtype=False)


# Layers and heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"), [("middle", [1]), ("all", [0, 1, 2]), ("1-2", [1, 2]), ([2, 0], [0, 2]), (2, [2])]
)
def test_layers_are_averaged(layers: Any, expected: list[int]):
    rows = capture(family(LLAMA), TEXT, layers=layers)
    assert rows.layers == tuple(expected)
    assert repr(rows) == f"AttentionRows(1 x 24 tokens, layers {expected})"
    assert_same(rows_of(rows), eager_weights()[expected].mean((0, 1)))


def test_the_middle_third_of_thirty_layers():
    model = build(LLAMA, num_hidden_layers=30)
    assert AttentionRecorder(model).layers == list(range(10, 20))


def test_layers_outside_the_model():
    with pytest.raises(InvalidInputError, match=r"layers: must lie in 0\.\.2, got 1\.\.3; indices count from"):
        capture(family(LLAMA), TEXT, layers="1-3")


def test_layers_without_softmax_attention():
    model = family("jamba")  # attention in layer 1 only
    assert capture(model, TEXT, layers="0-1").layers == (1,)
    for layers in ("0-0", [0, 1]):
        with pytest.raises(CaptureError, match=r"got \[0\] without any; JambaForCausalLM has it in \[1\]"):
            capture(model, TEXT, layers=layers)


def test_heads_by_index_and_mean():
    weights = eager_weights()
    assert_same(rows_of(capture(family(LLAMA), TEXT, layers="all", heads=[0, 3])), weights[:, [0, 3]].mean((0, 1)))
    assert_same(rows_of(capture(family(LLAMA), TEXT, layers=[1], heads=[2])), weights[1, 2])


def test_the_largest_head_keeps_the_sum_of_the_row():
    largest = eager_weights().amax(1)
    expected = (largest / largest.sum(-1, keepdim=True)).mean(0)
    assert_same(rows_of(capture(family(LLAMA), TEXT, layers="all", heads="max")), expected)
    with_sink = eager_weights(name="gpt_oss")
    largest, sums = with_sink.amax(1), with_sink.sum(-1, keepdim=True).mean(1)
    expected = (largest / largest.sum(-1, keepdim=True) * sums).mean(0)
    assert_same(rows_of(capture(family("gpt_oss"), TEXT, layers="all", heads="max")), expected)


def statistic_by_hand(weights: Tensor, statistic: str) -> Tensor:
    """Of each head of one layer; plain loops."""
    tokens, scores = weights.shape[-1], []
    for head in weights.double():
        if statistic == "distance":
            scores.append(sum(head[t, s] * (t - s) for t in range(tokens) for s in range(t)) / tokens)
        else:
            received = torch.stack([head[s + 1 :, s].sum() for s in range(1, tokens)])
            spread = received - received.mean()
            scores.append((spread**4).mean() / (spread**2).mean() ** 2 - 3)
    return torch.stack(scores)


@pytest.mark.parametrize(
    ("heads", "statistic", "kept"),
    [
        ("global", "distance", lambda order: order[-1:]),
        ("local", "distance", lambda order: order[:1]),
        ("receiver", "kurtosis", lambda order: order[-1:]),
        (HeadSelector("kurtosis", "lowest", 0.5), "kurtosis", lambda order: order[:2]),
    ],
)
@pytest.mark.parametrize("name", [LLAMA, "mpt"])
def test_heads_chosen_by_a_statistic(heads: Any, statistic: str, kept: Callable, name: str):
    """Heads are selected per sequence: neither padding nor other sequences of the batch change the selection."""
    for side in ("left", "right"):
        rows = capture(family(name), *padded(side), layers="all", heads=heads)
        for item, text in enumerate(sequences()):
            layers = eager_weights(text, name)
            expected = [layer[kept(statistic_by_hand(layer, statistic).argsort())].mean(0) for layer in layers]
            assert_same(rows_of(rows, item), torch.stack(expected).mean(0))


def test_heads_are_checked_layer_by_layer_where_layers_differ(monkeypatch: pytest.MonkeyPatch):
    def differs(self: Any) -> int:
        raise RuntimeError("'num_attention_heads' is a per-layer attribute")

    model = build(LLAMA)
    config = type("Heterogeneous", (type(model.config),), {"num_attention_heads": property(differs)})
    monkeypatch.setattr(model.config, "__class__", config)
    recorder = AttentionRecorder(model, heads=[4])
    monkeypatch.undo()
    with recorder, torch.no_grad():
        model(input_ids=TEXT[None])
    with pytest.raises(InvalidInputError, match=r"heads: must lie in 0\.\.3 in every chosen layer, got 4"):
        recorder.rows()


def test_unknown_heads_and_edge_weights():
    with pytest.raises(InvalidInputError, match="heads: must be 'mean', 'max', 'global', 'local', 'receiver'"):
        capture(family(LLAMA), TEXT, heads="median")
    with pytest.raises(InvalidInputError, match=r"heads: must lie in 0\.\.3, got 7\.\.7"):
        capture(family(LLAMA), TEXT, heads=[7])
    with pytest.raises(InvalidInputError, match="edge_weight: must be 'attention' or 'value_norm', got 'gradient'"):
        capture(family(LLAMA), TEXT, edge_weight="gradient")


@pytest.mark.parametrize("heads", ["mean", "max", [1, 2]])
def test_value_norms(heads: Any):
    """Weight times the norm of the value vector it reads; query heads 0, 1 and 2, 3 share one value head each."""
    model, values = family(LLAMA), []
    hooks = [
        module.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output[0]))
        for module in attention_modules(model).values()
    ]
    rows = rows_of(capture(model, TEXT, layers="all", heads=heads, edge_weight="value_norm"))
    for hook in hooks:
        hook.remove()
    expected = []
    for weights, value in zip(eager_weights(), values, strict=True):
        norms = value.view(len(TEXT), 2, 8).norm(dim=-1).T.repeat_interleave(2, 0)  # [heads, tokens]
        weighted = weights * norms[:, None]
        chosen = weighted if isinstance(heads, str) else weighted[heads]
        layer = chosen.amax(0) if heads == "max" else chosen.mean(0)
        expected.append(layer / layer.sum(-1, keepdim=True))
    assert_same(rows, torch.stack(expected).mean(0))
    assert (rows - eager_weights().mean((0, 1))).abs().max() > 0.01


# Rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LLAMA, "mistral_sliding", "gpt_oss", "falcon_alibi", "bloom"])
def test_any_block_is_the_same_part_of_the_dense_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    ids, mask = padded("left")
    rows = capture(family(name), ids, mask, layers="all")
    dense = rows.dense()
    for start, stop in ((0, 1), (0, 24), (3, 4), (5, 18), (17, 24), (23, 24)):
        assert_same(rows.block(start, stop), dense[:, start:stop, :stop], 1e-6)
    for size in (1, 5, 7, 128):
        parts = list(rows.blocks(size))
        assert [start for start, _ in parts] == list(range(0, 24, size))
        for start, block in parts:
            stop = start + block.shape[1]
            assert_same(block, dense[:, start:stop, :stop], 1e-6)
    monkeypatch.setattr(rows_module, "_SCRATCH_BYTES", 4 * 2 * 4 * 24 * 3)  # three rows at a time
    assert_same(rows.block(2, 21), dense[:, 2:21, :21], 1e-6)


def test_texts_longer_than_a_block():
    model = build(LLAMA, max_position_embeddings=512)
    text = torch.randint(3, VOCABULARY, (300,), generator=torch.Generator().manual_seed(2))
    rows = capture(model, text, layers="all", heads="global")
    eager = build(LLAMA, "eager", max_position_embeddings=512)
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        attentions = eager(input_ids=text[None], output_attentions=True).attentions
    distance = torch.arange(300)[:, None] - torch.arange(300)
    expected = [a[0, (a[0] * distance).sum((-1, -2)).argmax()] for a in attentions]
    assert_same(rows.dense()[0], torch.stack(expected).mean(0))
    assert_same(rows.sequence().block(120, 131)[0], torch.stack(expected).mean(0)[120:131, :131])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_leaves_its_padding_behind(side: str):
    ids, mask = padded(side)
    rows = capture(family(LLAMA), ids, mask, layers="all")
    for item, text in enumerate(sequences()):
        sequence = rows.sequence(item)
        inside = mask[item].bool()
        assert sequence.num_tokens == len(text)
        assert sequence.device == torch.device("cpu")
        assert_same(sequence.block(0, len(text))[0], rows.dense()[item][inside][:, inside], 1e-6)
        assert_same(sequence.block(4, 9)[0], rows_of(rows, item)[4:9, :9], 1e-6)
    with pytest.raises(InvalidInputError, match=r"item: must lie in 0\.\.1, got 2; the batch has 2 sequences"):
        rows.sequence(2)


def test_dense_rows_that_would_not_fit(monkeypatch: pytest.MonkeyPatch):
    rows = capture(family(LLAMA), TEXT)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2000))
    with pytest.raises(MemoryLimitError, match=r"dense rows of 1 x 24 tokens: .* read them with \.blocks\(\) instead"):
        rows.dense()
    assert_same(rows.sequence().block(0, 24)[0], eager_weights()[1].mean(0))


@pytest.mark.parametrize("name", [LLAMA, "gpt_oss", "falcon", "bloom", "gemma3"])
def test_a_single_token_reads_itself(name: str):
    rows = capture(family(name), torch.tensor([[5]]), layers="all").dense()
    assert rows.shape == (1, 1, 1)
    assert float(rows) == pytest.approx(1.0) if name != "gpt_oss" else 0 < float(rows) < 1


def test_the_mask_of_the_pass_is_remembered():
    ids, mask = padded("right")
    with AttentionRecorder(family(LLAMA), layers="all") as recorder, torch.no_grad():
        family(LLAMA)(input_ids=ids, attention_mask=mask)
    assert torch.equal(recorder.rows().attention_mask, mask.bool())
    assert_same(recorder.rows().dense(), recorder.rows(mask).dense(), 0)
    with pytest.raises(
        InvalidInputError, match=r"attention_mask: must have shape \(2, 24\) like input_ids, got \(2, 9\)"
    ):
        recorder.rows(mask[:, :9])


def test_one_text_needs_no_batch_dimension():
    ids, mask = padded("right")
    rows = capture(family(LLAMA), ids[1], mask[1], layers="all")
    assert_same(rows.dense()[0, :17, :17], eager_weights(ids[1, :17]).mean((0, 1)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(dtype: torch.dtype):
    ids, mask = padded("left")
    expected = capture(family(LLAMA), ids, mask).dense()
    assert_same(capture(family(LLAMA), ids, (2 * mask).to(dtype)).dense(), expected, 0)


# Attention implementations --------------------------------------------------------------------------------


def test_eager_and_fused_attention_give_the_same_rows():
    ids, mask = padded("left")
    eager, fused = family(LLAMA, "eager"), family(LLAMA, "sdpa")
    assert (eager.config._attn_implementation, fused.config._attn_implementation) == ("eager", "sdpa")
    assert_same(capture(eager, ids, mask).dense(), capture(fused, ids, mask).dense())


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa"])
def test_masks_without_rows_are_refused(implementation: str):
    model = build(LLAMA)
    model.config._attn_implementation = implementation
    with pytest.raises(CaptureError, match=r"must have readable masks, got '(flex|paged).*set_attn_implementation"):
        capture(model, TEXT)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("padding", [False, True])
def test_flash_attention_hands_over_the_padding_instead_of_a_mask(padding: bool, monkeypatch: pytest.MonkeyPatch):
    """Its kernels need a GPU; what reaches the layers does not: a ``[batch, tokens]`` mask or none, and the window."""
    model, (ids, mask) = family("qwen3_sliding"), padded("right")
    if not padding:
        ids, mask = ids[:1], mask[:1]
    expected = capture(model, ids, mask, layers="all").dense()
    record = AttentionRecorder.record

    def flash(self: AttentionRecorder, module: nn.Module, call: AttentionCall) -> None:
        assert "sliding_window" in call.options
        record(self, module, call._replace(mask=mask if padding else None))

    monkeypatch.setattr(AttentionRecorder, "record", flash)
    assert_same(capture(model, ids, mask, layers="all").dense(), expected, 1e-6)


def test_cached_keys_are_refused():
    model = family(LLAMA)
    with AttentionRecorder(model) as recorder, torch.no_grad():
        first = model(input_ids=TEXT[None, :20], use_cache=True)
        assert_same(rows_of(recorder.rows()), eager_weights(TEXT[:20])[1].mean(0))
        cache = "cache" if "cache" in first else "past_key_values"  # the name before transformers 5.24
        with pytest.raises(CaptureError, match=r"cache \(past_key_values\): must be empty, .* use_cache=False"):
            model(input_ids=TEXT[None, 20:], **{cache: first[cache]})
    with AttentionRecorder(model), torch.no_grad(), pytest.raises(CaptureError, match=r"cache .*: must be empty"):
        model.generate(TEXT[None], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [(LLAMA, "attention dropout must be off, got 0.2"), ("bloom", "do not sum to 1; call model.eval")],
)
def test_dropout_is_refused_in_training_and_turned_off_by_capture(name: str, message: str):
    model = build(name, attention_dropout=0.2).train()
    with AttentionRecorder(model), pytest.raises(CaptureError, match=message):
        model(input_ids=TEXT[None])
    assert_same(rows_of(capture(model, TEXT, layers="all")), eager_weights(name=name).mean((0, 1)))
    assert all(module.training for module in model.modules())


def test_each_module_gets_its_own_training_flag_back():
    model = build(LLAMA).train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    capture(model, TEXT)
    assert [module.training for module in model.modules()] == flags


# Wrappers -------------------------------------------------------------------------------------------------


def lora(model: PreTrainedModel) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    return peft.get_peft_model(model, config).eval()


@old_names
def test_a_lora_adapter_is_seen():
    adapted = lora(build(LLAMA))
    rows = rows_of(capture(adapted, TEXT, layers="all"))
    merged = lora(build(LLAMA, "eager")).merge_and_unload()
    with torch.no_grad():
        attentions = merged(input_ids=TEXT[None], output_attentions=True).attentions
    assert_same(rows, torch.stack(attentions)[:, 0].mean((0, 1)))
    assert (rows - eager_weights().mean((0, 1))).abs().max() > 0.05
    with adapted.disable_adapter():
        assert_same(rows_of(capture(adapted, TEXT, layers="all")), eager_weights().mean((0, 1)))
    with AttentionRecorder(adapted, layers="all") as recorder, torch.no_grad():
        adapted(input_ids=TEXT[None])
    assert_same(rows_of(recorder.rows()), rows, 1e-6)


@old_names
def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(
        CaptureError, match=r"got prompt learning \(PromptTuningConfig\); its virtual tokens stand outside"
    ):
        capture(peft.get_peft_model(build(LLAMA), config), TEXT)


def test_compiled_models_run_uncompiled_while_they_are_recorded():
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        compilations.append(graph)
        return graph.forward

    model = torch.compile(build(LLAMA, num_hidden_layers=1), backend=backend)
    with torch.no_grad():
        eager = build(LLAMA, "eager", num_hidden_layers=1)
        weights = eager(input_ids=TEXT[None], output_attentions=True).attentions[0][0].mean(0)
        expected = model(input_ids=TEXT[None], use_cache=False).logits
        done = len(compilations)
        assert done > 0
        assert_same(rows_of(capture(model, TEXT, layers="all")), weights)
        with AttentionRecorder(model, layers="all") as recorder:
            model(input_ids=TEXT[None], use_cache=False)
        assert_same(rows_of(recorder.rows()), weights)
        assert_same(model(input_ids=TEXT[None], use_cache=False).logits, expected, 0)
    assert len(compilations) == done, "compiled again"
    assert base_model(model) is model._orig_mod


def test_distributed_wrappers(tmp_path: Any):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build(LLAMA))
        assert_same(rows_of(capture(wrapped, TEXT, layers="all")), eager_weights().mean((0, 1)))
    finally:
        torch.distributed.destroy_process_group()


def first_sinks(model: Any) -> Tensor:
    return model.model.layers[0].self_attn.sinks


def test_offloaded_weights():
    """Rows are read when the layers, with the learned sinks in them, have left memory again."""
    import accelerate

    model = accelerate.cpu_offload(build("gpt_oss"), execution_device=torch.device("cpu"))
    assert first_sinks(model).device.type == "meta"
    rows = capture(model, TEXT, layers="all")
    assert first_sinks(model).device.type == "meta"
    assert_same(rows_of(rows), eager_weights(name="gpt_oss").mean((0, 1)))


# Riding on other people's forward passes ------------------------------------------------------------------


def loss_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss


@old_names
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [LLAMA, "gpt_oss", "falcon", "bloom"])
def test_gradients_are_the_same_to_the_last_bit(name: str, checkpointing: bool):
    ids, mask = padded("right")
    gradients, rows = [], []
    for recorded in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        recorder = AttentionRecorder(model, layers="all")
        with recorder if recorded else nullcontext():
            loss_of(model, ids, mask).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        rows.append(recorder)
    for parameter, gradient in gradients[0].items():
        assert gradient is None if gradients[1][parameter] is None else torch.equal(gradient, gradients[1][parameter])
    assert_same(rows[1].rows(mask).dense(), capture(family(name), ids, mask, layers="all").dense(), 1e-6)
    assert not rows[1].rows(mask).dense().requires_grad


def test_rows_survive_an_optimizer_step():
    ids, mask = padded("right")
    model = build("gpt_oss").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with AttentionRecorder(model, layers="all") as recorder:
        loss_of(model, ids, mask).backward()
    optimizer.step()
    assert not torch.equal(first_sinks(model), first_sinks(family("gpt_oss")))
    assert_same(recorder.rows().dense(), capture(family("gpt_oss"), ids, mask, layers="all").dense(), 1e-6)


def test_an_exception_inside_an_attention_layer_comes_through():
    model = family("falcon")

    def fail(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("out of luck")

    hook = model.get_submodule("transformer.h.1.self_attention.dense").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        capture(model, TEXT)
    hook.remove()
    assert_same(rows_of(capture(model, TEXT, layers="all")), eager_weights(name="falcon").mean((0, 1)))


def test_the_last_pass_counts_and_a_failed_one_leaves_nothing():
    model = family(LLAMA)
    recorder = AttentionRecorder(model, layers="all")
    with pytest.raises(CaptureError, match=r"layers \[0, 1, 2\] was not seen; make one forward pass inside"):
        recorder.rows()
    with recorder, torch.no_grad():
        model(input_ids=TEXT[None, ::2])
        model(input_ids=TEXT[None])
    assert_same(rows_of(recorder.rows()), eager_weights().mean((0, 1)))

    def fail(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("out of luck")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with recorder, pytest.raises(RuntimeError, match="out of luck"):
        model(input_ids=TEXT[None])
    hook.remove()
    with pytest.raises(CaptureError, match=r"layers \[1, 2\] was not seen"):
        recorder.rows()
    with recorder, torch.no_grad():
        model(input_ids=TEXT[None])
    assert_same(rows_of(recorder.rows()), eager_weights().mean((0, 1)))


def test_recorders_nest_and_stay_apart():
    """Two on one model, a third on another, and a model without a listener."""
    llama, falcon = family(LLAMA), family("falcon")
    with AttentionRecorder(llama, layers=[0]) as first, torch.no_grad():
        with AttentionRecorder(llama, layers=[0, 2]) as second, AttentionRecorder(falcon, layers="all") as third:
            llama(input_ids=TEXT[None])
            falcon(input_ids=TEXT[None])
            family("gpt2")(input_ids=TEXT[None])
        falcon(input_ids=TEXT[None, :9])
        llama(input_ids=TEXT[None, :9])
    assert_same(rows_of(first.rows()), eager_weights(TEXT[:9])[0].mean(0))
    assert_same(rows_of(second.rows()), eager_weights()[[0, 2]].mean((0, 1)))
    assert_same(rows_of(third.rows()), eager_weights(name="falcon").mean((0, 1)))


def test_threads_with_a_model_each():
    names = (LLAMA, "falcon", "bloom", "gemma2")
    models = {name: family(name) for name in names}  # built here: threads share the random generator
    expected = {name: eager_weights(name=name).mean((0, 1)) for name in names}
    failures: list[str] = []

    def work(name: str) -> None:
        for _ in range(15):
            rows = rows_of(capture(models[name], TEXT, layers="all"))
            if (rows - expected[name]).abs().max() > 1e-5:
                failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_passes_at_once_through_one_model_are_refused():
    model = family(LLAMA)

    def recurse(module: nn.Module, inputs: Any) -> None:
        model(input_ids=TEXT[None, :3])

    hook = model.model.layers[1].register_forward_pre_hook(recurse)
    with pytest.raises(CaptureError, match="one forward pass at a time while recorded, got two at once"):
        capture(model, TEXT)
    hook.remove()


# Verification ---------------------------------------------------------------------------------------------


def wrong_scaling(call: AttentionCall) -> AttentionCall:
    return call._replace(options=call.options | {"scaling": 1.1 * call.options["scaling"]})


def no_softcap(call: AttentionCall) -> AttentionCall:
    return call._replace(options=call.options | {"softcap": None})


def no_mask(call: AttentionCall) -> AttentionCall:
    return call._replace(mask=None, options=call.options | {"sliding_window": None})


def wrong_window(call: AttentionCall) -> AttentionCall:
    return call._replace(mask=None, options=call.options | {"sliding_window": 6})


def keys_without_rotation(call: AttentionCall) -> AttentionCall:
    return call._replace(key=call.key.roll(1, 2))


def no_bias(call: AttentionCall) -> AttentionCall:
    return call._replace(mask=call.mask.clamp_max(-1).masked_fill(call.mask > -1e4, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        (LLAMA, wrong_scaling),
        ("gpt_neox", wrong_scaling),
        ("gemma2", no_softcap),
        ("mistral_sliding", no_mask),
        ("mistral_sliding", wrong_window),
        ("qwen3_sliding", no_mask),
        ("llama4_chunked", no_mask),
        ("gpt_oss", no_mask),
        (LLAMA, keys_without_rotation),
        ("deepseek_v3", wrong_scaling),
        ("falcon_alibi", no_bias),
    ],
)
def test_mistakes_are_caught(name: str, mistake: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    record = AttentionRecorder.record
    monkeypatch.setattr(AttentionRecorder, "record", lambda self, module, call: record(self, module, mistake(call)))
    with pytest.raises(CaptureError, match=r"differs from what the layer computed by .* its rows would be wrong"):
        capture(family(name, None, dtype), TEXT, layers="all")


def output_only(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
    output = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=options["scaling"], enable_gqa=True)
    return output.transpose(1, 2), None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "block-sparse"}, r"mask of its attention implementation \(str\) cannot be read; call model.set_attn"),
        ({"eager": output_only}, "eager attention of LlamaAttention returned no weights for a block of queries"),
    ],
)
def test_layers_that_hide_their_weights_are_refused(change: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    record = AttentionRecorder.record
    monkeypatch.setattr(
        AttentionRecorder, "record", lambda self, module, call: record(self, module, call._replace(**change))
    )
    with pytest.raises(CaptureError, match=message):
        capture(family(LLAMA), TEXT, layers="all").dense()


def test_a_missing_padding_mask_is_caught(monkeypatch: pytest.MonkeyPatch):
    record = AttentionRecorder.record
    monkeypatch.setattr(AttentionRecorder, "record", lambda self, module, call: record(self, module, no_mask(call)))
    with pytest.raises(CaptureError, match="differs from what the layer computed"):
        capture(family(LLAMA), *padded("left"), layers="all")


def test_masks_that_look_ahead_are_refused():
    model = family(LLAMA)
    ahead = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril(1)
    with AttentionRecorder(model), torch.no_grad(), pytest.raises(CaptureError, match="reads future tokens"):
        model(input_ids=TEXT[None], attention_mask=ahead)
    bypassing = family("mpt")
    with AttentionRecorder(bypassing), torch.no_grad(), pytest.raises(CaptureError, match="and reads future tokens"):
        bypassing(input_ids=TEXT[None], attention_mask=(~ahead).float() * -1e30)
    model = build(LLAMA)
    for module in attention_modules(model).values():
        module.is_causal = False
    with pytest.raises(CaptureError, match="must be causal, got LlamaAttention, which is not"):
        capture(model, TEXT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sharp_attention_in_half_precision_raises_no_false_alarm(implementation: str):
    """Scores of hundreds: bfloat16 eager rounds them to integers, so only the same rounding agrees."""
    model = build(LLAMA, implementation, torch.bfloat16)
    for module in attention_modules(model).values():
        module.get_parameter("q_proj.weight").data *= 30
    assert_same(capture(model, TEXT, layers="all").dense().sum(-1), torch.ones(1, 24))


def test_autocast():
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with AttentionRecorder(family(LLAMA), layers="all") as recorder, torch.no_grad(), autocast:
        family(LLAMA)(input_ids=TEXT[None])
    assert_same(rows_of(recorder.rows()), eager_weights().mean((0, 1)), 0.05)


def test_float64_models():
    assert_same(rows_of(capture(family(LLAMA, None, torch.float64), TEXT, layers="all")), eager_weights().mean((0, 1)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_float64_models(side: str):
    """Eager functions take the softmax in float32, where the minimum of a float64 mask is -inf."""
    model = family(LLAMA, None, torch.float64)
    blank = torch.zeros(3, dtype=TEXT.dtype)
    order = [blank, TEXT] if side == "left" else [TEXT, blank]
    padded = torch.cat(order)[None]
    is_real = torch.cat([torch.full_like(part, int(part is TEXT)) for part in order])[None]
    rows = capture(model, padded, is_real, layers="all")
    assert bool(rows.dense().isfinite().all())
    own = rows.dense()[0][is_real[0].bool()][:, is_real[0].bool()]
    assert_same(own, rows_of(capture(model, TEXT, layers="all")))


def test_a_layer_that_computes_nan_is_named():
    """transformers' eager attention in float64 is undefined beside left padding."""
    model = family(LLAMA, "eager", torch.float64)
    padded = torch.cat([torch.zeros(3, dtype=TEXT.dtype), TEXT])[None]
    with pytest.raises(CaptureError, match=r"LlamaAttention must compute finite outputs, got NaN .* in float64"):
        capture(model, padded, (torch.arange(padded.shape[1]) >= 3).long()[None])


# Messages -------------------------------------------------------------------------------------------------


def tiny(kind: str, auto: Any, **fields: Any) -> PreTrainedModel:
    common = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    return auto.from_config(AutoConfig.for_model(kind, **(common | {"intermediate_size": 48} | fields))).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "must be a Hugging Face PreTrainedModel, got Linear; load it with AutoModelForCausalLM",
        ),
        (
            lambda: tiny("t5", AutoModelForSeq2SeqLM, d_model=32, d_kv=8, d_ff=48),
            "must be decoder-only, got the encoder-decoder T5ForConditionalGeneration",
        ),
        (lambda: tiny("bert", AutoModelForMaskedLM), "must be a causal language model, got BertForMaskedLM"),
        (lambda: tiny("bert", AutoModelForCausalLM), "must be a causal language model, got BertLMHeadModel"),
        (lambda: tiny("llama", AutoModel), "must be a causal language model, got LlamaModel"),
        (
            lambda: tiny("llama", AutoModelForSequenceClassification),
            "must be a causal language model, got LlamaForSequenceClassification",
        ),
    ],
)
def test_models_that_are_no_causal_language_models(make: Callable, message: str):
    with pytest.raises(CaptureError, match=f"model: {message}"):
        capture(make(), TEXT)


def test_a_bert_told_to_be_a_decoder_is_one():
    model = tiny("bert", AutoModelForCausalLM, is_decoder=True)
    assert bool((capture(model, TEXT, layers="all").dense().triu(1) == 0).all())


IDS, MASK = padded("right")
GAP = MASK.clone()
GAP[1, 3] = 0
EMPTY = MASK.clone()
EMPTY[1] = 0


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (
            "abc",
            None,
            "input_ids: must be a tensor or list of numbers, or an array, got 'abc'; tokenize with return_te",
        ),
        (
            [[5, 6], [7]],
            None,
            "input_ids: must be a tensor or list of numbers, or an array, got [[5, 6], [7]] (expected",
        ),
        (IDS[:, :0], None, "input_ids: must be integers of shape [batch, tokens], at least one, got torch.int64"),
        (IDS[None], None, "of shape (1, 2, 24); pass the tokenizer's input_ids"),
        (IDS.float(), None, "got torch.float32 of shape (2, 24)"),
        (IDS > 5, None, "got torch.bool of shape (2, 24)"),
        (IDS + 1000, None, "input_ids: must lie in 0..98, got 1000.."),
        (IDS - 1, MASK, "input_ids: must lie in 0..98, got -1.."),
        (
            IDS.repeat(1, 3),
            None,
            "input_ids: must fit the model's context of 64 tokens, got 72; shorten the prompt or the response",
        ),
        (IDS, MASK[:1], "attention_mask: must have the shape of input_ids (2, 24), got (1, 24)"),
        (IDS, GAP, "attention_mask: padding must be on the left or on the right, got a gap inside row 1"),
        (IDS, EMPTY, "attention_mask: every sequence needs at least one token, got a row of padding only (row 1)"),
    ],
)
def test_bad_inputs(ids: Any, mask: Tensor | None, message: str):
    with pytest.raises(InvalidInputError) as error:
        capture(family(LLAMA), ids, mask)
    assert message in str(error.value)


def test_padding_may_exceed_the_context_where_positions_are_counted_from_the_mask():
    ids, mask = torch.zeros(1, 80, dtype=torch.long), torch.zeros(1, 80, dtype=torch.long)
    ids[0, -24:], mask[0, -24:] = TEXT, 1
    assert_same(rows_of(capture(family("gpt2"), ids, mask)), rows_of(capture(family("gpt2"), TEXT)))
    with pytest.raises(InvalidInputError, match="context of 64 tokens, got 80"):
        capture(family("gpt2"), ids.flip(-1), mask.flip(-1))


def test_models_that_count_positions_their_own_way_take_right_padding_only():
    """RoBERTa starts at padding_idx + 1: positions counted by us from 0 would silently be others."""
    model = tiny("roberta", AutoModelForCausalLM, is_decoder=True, initializer_range=0.3, max_position_embeddings=64)
    rows = capture(model, *padded("right"), layers="all")
    for item, text in enumerate(sequences()):
        assert_same(rows_of(rows, item), rows_of(capture(model, text, layers="all")))
    with pytest.raises(CaptureError, match=r"must pad on the right for RobertaForCausalLM.*padding_side = 'right'"):
        capture(model, *padded("left"), layers="all")


def test_every_family_is_known_to_the_registry():
    assert all(callable(make) for make in FAMILIES.values())


# Scaled rotary embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "linear", "factor": 3.0}, 192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 64),
        ({"rope_type": "default"}, 64),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_the_context_of_scaled_rotary_embeddings(rope: dict[str, Any], wanted: int):
    """transformers#33783: Qwen2.5 with YaRN reads 4 times its ``max_position_embeddings``."""
    config = Qwen2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e6, **rope},
    )
    model = Qwen2ForCausalLM(config).eval()
    assert context_length(model) == wanted

    ids = torch.randint(3, 99, (1, wanted), generator=torch.Generator().manual_seed(0))
    rows = capture(model, ids).block(0, wanted)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        right = model(ids, output_attentions=True).attentions[1].mean(1)
    assert torch.allclose(rows, right, atol=1e-6)
    with pytest.raises(InvalidInputError, match=f"must fit the model's context of {wanted} tokens, got {wanted + 1}"):
        capture(model, torch.cat([ids, ids[:, :1]], dim=1))


def test_the_context_of_rotary_embeddings_per_type_of_layer():
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e6,
        },
    }
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    model.config.max_position_embeddings = 64
    model.config.rope_parameters = rope
    assert context_length(model) == 256
    # Gemma 3 states the scaled length already.
    model.config.model_type = "gemma3_text"
    model.config.rope_parameters = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    assert context_length(model) == 64
