"""Family by family: the rows are the attention that the model computed, and the model is left as it was found."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flowgraph.attention.capture import capture
from flowgraph.attention.modules import attention_modules
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.attention.rows import AttentionRows
from flowgraph.errors import CaptureError
from tests.fixtures.models import FAMILIES, LENGTHS, SINKS, WINDOW, WINDOWED, family, padded, sequences

HANDS_OUT_WEIGHTS = {"bloom", "mpt", "gpt_neo"}
"""Compute attention in plain torch and return the weights; no queries to recompute rows from."""
if Version(transformers.__version__) < Version("5.24"):  # from 5.24 on, these two use the attention interface
    HANDS_OUT_WEIGHTS |= {"gptj", "codegen"}
FUSED = {"falcon", "falcon_new", "falcon_alibi"}
"""Call torch's fused attention themselves, past transformers' attention interface."""
HYBRID_LAYERS = {
    "qwen3_next": (1, 2),
    "qwen3_5": (1, 2),
    "granite_hybrid": (1, 2),
    "jamba": (1,),
    "zamba2": (1, 2),
    "minimax": (1, 2),
    "longcat_flash": (0, 1, 2, 3),  # two attentions in each of two layers
}

every_family = pytest.mark.parametrize("name", FAMILIES)
every_recomputed_family = pytest.mark.parametrize("name", [n for n in FAMILIES if n not in HANDS_OUT_WEIGHTS])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The matrices are tiny: waking other threads takes longer than the work, far longer on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# References -----------------------------------------------------------------------------------------------


def attention_alone(model: PreTrainedModel, text: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    """``[heads, tokens, tokens]`` of each layer: ``output_attentions`` of an eager model on one text, no padding."""
    with torch.no_grad():
        found = model(
            input_ids=text[None], attention_mask=torch.ones_like(text)[None], output_attentions=True, use_cache=False
        ).attentions
    found = [weights for weights in found if weights is not None]
    if len(found) > len(layers):  # some hybrids report their linear layers too
        found = [found[index] for index in layers]
    assert [weights.shape[-1] for weights in found] == [len(text)] * len(layers)
    return [weights[0] for weights in found]


@contextmanager
def overheard(name: str, model: PreTrainedModel, *, masked: bool = True) -> Iterator[list[Tensor]]:
    """Exact weights ``[batch, heads, tokens, tokens]``, layer by layer, of a pass made inside.

    They come from the very queries and keys that the pass hands to its kernel, in float64 and as one matrix: by
    the architecture's eager function, or by the fused kernel itself applied to identity values. With ``masked``
    False all masks but plain causality are ignored.
    """
    weights: list[Tensor] = []
    interface, kernel = AttentionInterface.get_interface, nn.functional.scaled_dot_product_attention

    def get_interface(table: AttentionInterface, attn_implementation: str, default: Any) -> Any:
        function = interface(table, attn_implementation, default)

        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **options: Any):
            mask = additive(attention_mask if masked else None, q.shape[2])
            weights.append(default(module, q.double(), k.double(), v.double(), mask, **options)[1])
            return function(module, q, k, v, attention_mask, **options)

        return attention

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        identity = torch.eye(key.shape[2], dtype=torch.float64).expand(*key.shape[:2], -1, -1)
        mask = additive(attn_mask if masked else None, query.shape[2])
        grouped = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
        weights.append(kernel(query.double(), grouped, identity.expand_as(grouped @ grouped.mT), attn_mask=mask))
        return kernel(query, key, value, attn_mask=attn_mask, **options)

    def returned(module: nn.Module, inputs: Any, output: Any) -> None:
        weights.append(next(part for part in output if isinstance(part, Tensor) and part.ndim == 4).double())

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if name in HANDS_OUT_WEIGHTS:
            for module in attention_modules(model).values():
                stack.callback(module.register_forward_hook(returned).remove)
        elif name in FUSED:
            patch.setattr(nn.functional, "scaled_dot_product_attention", fused)
        else:
            patch.setattr(AttentionInterface, "get_interface", get_interface)
        yield weights


def additive(mask: Tensor | None, tokens: int) -> Tensor:
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    return mask.double()


def joined(layers: list[Tensor]) -> Tensor:
    """Mean over layers and heads; layers need not have the same number of heads."""
    return torch.stack([weights.double().mean(-3) for weights in layers]).mean(0)


def rows_of(rows: AttentionRows, item: int) -> Tensor:
    sequence = rows.sequence(item)
    return sequence.block(0, sequence.num_tokens)[0]


# The model, as it stands ----------------------------------------------------------------------------------


def standing(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that capturing could have left behind."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")
    return {
        "implementations": [
            (config._attn_implementation, str(config))
            for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        ],
        "modules": [
            (name, id(module), module.training, module.forward.__func__, [len(getattr(module, hook)) for hook in hooks])
            for name, module in model.named_modules()
        ],
        "weights": {name: id(parameter) for name, parameter in model.named_parameters()},
        "functions": {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS},
        "own functions": dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        "dispatch": AttentionInterface.get_interface,
        "modes": list(_get_current_function_mode_stack()),
    }


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


# Tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "falcon_alibi"])
def test_rows_are_the_eager_attention_of_each_text_alone(name: str):
    """Left padding, right padding and the company in a batch change nothing."""
    layers, texts = HYBRID_LAYERS.get(name, (0, 1, 2)), sequences()
    expected = [joined(attention_alone(family(name, "eager"), text, layers)) for text in texts]
    for side in ("left", "right"):
        rows = capture(family(name), *padded(side), layers="all")
        assert rows.layers == layers
        for item in range(len(texts)):
            torch.testing.assert_close(rows_of(rows, item).double(), expected[item], atol=1e-5, rtol=0)


def test_falcon_with_alibi_gives_the_rows_of_the_attention_that_ran():
    """Its eager attention adds the position bias twice, its fused one once: they are different models."""
    ids, mask = padded("right")
    eager, fused = family("falcon_alibi", "eager"), family("falcon_alibi", "sdpa")
    assert (logits(eager, ids, mask) - logits(fused, ids, mask)).abs().max() > 0.01
    of_eager, of_fused = capture(eager, ids, mask, layers="all"), capture(fused, ids, mask, layers="all")
    for item, text in enumerate(sequences()):
        expected = joined(attention_alone(eager, text, (0, 1, 2)))
        torch.testing.assert_close(rows_of(of_eager, item).double(), expected, atol=1e-5, rtol=0)
        with overheard("falcon_alibi", fused) as weights:
            logits(fused, text[None], torch.ones_like(text)[None])
        torch.testing.assert_close(rows_of(of_fused, item).double(), joined(weights)[0], atol=1e-5, rtol=0)


@every_family
def test_bfloat16_rows_are_exact_for_the_queries_and_keys_of_the_pass(name: str):
    """What a bfloat16 row should be: the softmax, in float32 or better, of the bfloat16 queries and keys.

    Neither of the model's own results is that. Its eager attention rounds each score to 8 bits, its fused kernel
    does not, so the two are different forward passes whose hidden states drift apart layer by layer; comparing
    all layers with ``output_attentions`` would need a tolerance that hides real mistakes. So the rows of one pass
    are held against float64 weights of the same queries and keys (exact, whatever the drift), and against eager
    attention only in the first softmax layer. There both start from the same embeddings, and three roundings of
    a score |s| < 10 by 2**-9 each move a weight by at most 12 %, in practice a tenth of that in the mean of heads.
    """
    model, (ids, mask) = family(name, None, torch.bfloat16), padded("left")
    rows = capture(model, ids, mask, layers="all")
    with overheard(name, model) as weights, torch.no_grad():
        positions = {} if name in ("bloom", "mpt") else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    exact = joined(weights) * mask[:, :, None]
    torch.testing.assert_close(rows.dense().double(), exact, atol=1e-6, rtol=0)
    assert name in SINKS or (rows.dense().sum(-1) - mask).abs().max() < (1e-2 if name in HANDS_OUT_WEIGHTS else 1e-5)

    if name != "falcon_alibi":  # its eager attention is another model
        first = capture(model, ids, mask, layers=[rows.layers[0]])
        for item, text in enumerate(sequences()):
            eager = attention_alone(family(name, "eager", torch.bfloat16), text, rows.layers)[0].double().mean(0)
            torch.testing.assert_close(rows_of(first, item).double(), eager, atol=0.02, rtol=0)


@every_family
def test_recording_changes_no_bit_of_the_logits_and_leaves_the_model_as_found(name: str):
    """Every family keeps its own attention implementation, so this holds without exception."""
    model, (ids, mask) = family(name), padded("right")
    before, expected = standing(model), logits(model, ids, mask)
    with AttentionRecorder(model, layers="all") as recorder:
        assert AttentionInterface.get_interface is not before["dispatch"]
        recorded = logits(model, ids, mask)
    assert torch.equal(recorded, expected)
    assert standing(model) == before
    assert recorder.rows().dense().shape == (2, max(LENGTHS), max(LENGTHS))
    capture(model, ids, mask, layers="all")
    assert standing(model) == before


@every_family
def test_an_exception_in_the_middle_leaves_the_model_as_found(name: str):
    model, (ids, mask) = family(name), padded("right")
    before = standing(model)
    last = list(attention_modules(model).values())[-1]

    def fail(module: nn.Module, inputs: Any, output: Any) -> None:
        raise RuntimeError("out of luck")

    hook = last.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            capture(model.train(), ids, mask, layers="all")
        assert all(module.training for module in model.modules())
    finally:
        hook.remove()
        model.eval()
    assert standing(model) == before


@every_family
def test_rows_are_causal_shares_and_padding_rows_are_zero(name: str):
    for side in ("left", "right"):
        ids, mask = padded(side)
        rows = capture(family(name), ids, mask, layers="all").dense()
        assert bool((rows >= 0).all())
        assert bool((rows.triu(1) == 0).all())
        assert bool((rows[mask == 0] == 0).all())
        assert bool((rows.masked_fill((mask == 1)[:, None], 0) == 0).all()), "padding is read"
        sums = rows.sum(-1)[mask == 1]
        if name in SINKS:
            assert bool((sums < 1).all())
            assert bool((sums > 0.1).all())
        else:
            torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


@every_family
def test_a_changed_token_changes_its_own_and_later_rows_only(name: str):
    text, place = sequences()[0].clone(), 11
    before = rows_of(capture(family(name), text, layers="all"), 0)
    text[place] = 3 + (text[place] - 3 + 40) % 90
    after = rows_of(capture(family(name), text, layers="all"), 0)
    moved = (after - before).abs().amax(-1)
    assert moved[:place].max() < 1e-5
    assert moved[place:].min() > 1e-5


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_windows_are_seen_and_ignoring_them_would_be_noticed(name: str):
    """Rows of a windowed layer end at the window, and plain causal rows of the same q and k lie far away."""
    model, text = family(name), sequences()[0]
    layer = {"gpt_neo": 1, "gemma3_vision": 0}.get(name, 0)
    rows = rows_of(capture(model, text, layers=[layer]), 0)
    gap = torch.arange(len(text))[:, None] - torch.arange(len(text))
    if name == "llama4_chunked":
        outside = torch.arange(len(text))[:, None] // WINDOW != torch.arange(len(text)) // WINDOW
    else:
        outside = gap >= WINDOW
    assert bool((rows[outside] == 0).all())
    assert bool((rows[~outside & (gap >= 0)] > 0).any(-1).all())
    if name not in HANDS_OUT_WEIGHTS:
        with overheard(name, model, masked=False) as weights:
            logits(model, text[None], torch.ones_like(text)[None])
        assert (rows - weights[layer][0].mean(0)).abs().max() > 0.05


@every_family
def test_value_norms_weigh_edges_wherever_values_can_be_seen(name: str):
    ids, mask = padded("right")
    if name in HANDS_OUT_WEIGHTS:
        with pytest.raises(CaptureError, match="value vectors; use edge_weight='attention'"):
            capture(family(name), ids, mask, layers="all", edge_weight="value_norm")
        return
    plain = capture(family(name), ids, mask, layers="all").dense()
    weighted = capture(family(name), ids, mask, layers="all", edge_weight="value_norm").dense()
    torch.testing.assert_close(weighted.sum(-1), plain.sum(-1), atol=1e-5, rtol=0)
    # Gemma 4 normalises its values, so there is nothing to weigh.
    assert (weighted - plain).abs().max() > 0.01 or name == "gemma4"


def test_cutting_one_attention_edge_moves_its_share_to_the_rest_of_the_row():
    model, text = family("llama"), sequences()[0]
    reader, read = 20, 5
    allowed = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    cut = allowed.clone()
    cut[reader, read] = False

    def head_rows(mask: Tensor, head: int, layer: int) -> Tensor:
        with AttentionRecorder(model, layers=[layer], heads=[head]) as recorder, torch.no_grad():
            model(input_ids=text[None], attention_mask=mask[None, None], use_cache=False)
        return rows_of(recorder.rows(), 0)

    for head in range(4):
        whole, without = head_rows(allowed, head, 0), head_rows(cut, head, 0)
        expected = whole.clone()
        expected[reader, read] = 0
        expected[reader] /= 1 - whole[reader, read]
        torch.testing.assert_close(without, expected, atol=1e-6, rtol=0)
    later = (head_rows(allowed, 0, 2) - head_rows(cut, 0, 2)).abs().amax(-1)
    assert later[:reader].max() == 0
    assert later[reader:].min() > 1e-6


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("diffllama", {}, "must run once in a pass, got a second run of DiffLlamaAttention"),
        ("hrm_text", {}, "one attention module, got L_module"),
        ("openai-gpt", {}, "returns no attention weights"),
        ("rwkv", {}, "returns no attention weights"),
        ("mamba", {}, "no attention module found in MambaForCausalLM"),
    ],
)
def test_what_cannot_be_captured_is_named(kind: str, fields: dict, message: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **fields
    )
    ids, _ = padded("right")
    with pytest.raises(CaptureError, match=message):
        capture(AutoModelForCausalLM.from_config(config).eval(), ids, layers="all")
