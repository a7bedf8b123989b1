"""``randomized_copy``: a model whose weights say nothing, for the parameter-randomization test of explanations."""

from __future__ import annotations

import copy
import hashlib
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn

from flowgraph.attention.layers_and_heads import LayerRule, resolve_layers
from flowgraph.attention.modules import base_model, decoder_blocks, text_decoder
from flowgraph.errors import InvalidInputError
from flowgraph.memory import require_memory

Model = TypeVar("Model", bound=nn.Module)


def randomized_copy(model: Model, seed: int = 0, layers: LayerRule = "all", *, embeddings: bool = False) -> Model:
    r"""Copy a model and put the entries of each weight of the chosen layers in random order.

    .. math:: W'_{i} = W_{\pi(i)}, \qquad \pi \text{ a random permutation of all entries of } W

    So every weight keeps its mean, its spread and its outliers, and what was learned is gone. An explanation of the
    model must change with it; one that stays the same reads the text and not the model.

    Args:
        model: a causal LM of any family, or one inside PEFT or compile wrappers; it is not changed.
        seed: of the permutations. Each weight has one of its own, by its name: layer 3 is the same whether it is
            randomized alone or with others, so that a cascade from the last layer down changes one layer a step.
        layers: blocks of the decoder, as in :func:`flowgraph.capture`: ``"all"``, ``"upper"``, ``"20-"`` or indices.
        embeddings: also the embeddings, the final norm and the output head: every weight outside the blocks.

    Returns:
        The copy, on the same device, in the same mode, without gradients. Tied weights stay tied and are permuted
        once; a weight that a chosen layer shares with another layer changes in both.

    Raises:
        InvalidInputError: weights that are no floating-point numbers (quantized ones), or without values (meta), or an
            invalid seed or choice of layers.
        CaptureError: not a causal language model of transformers.
        MemoryLimitError: the copy would not fit.

    Cost: a second model in memory; the time of one random permutation of its weights.

    Source: Adebayo et al. 2018, Sanity Checks for Saliency Maps, arXiv 1810.03292, section 3; that paper draws new
    weights, which for a trained language model changes the size of every activation as well.

    Example:
        >>> from flowgraph.evaluation.planted_models import planted_model
        >>> model, _ = planted_model("copy")
        >>> randomized = randomized_copy(model, seed=1)
        >>> before = model.transformer.h[1].attn.c_attn.weight
        >>> after = randomized.transformer.h[1].attn.c_attn.weight
        >>> bool((before == after).all()), bool((before.flatten().sort()[0] == after.flatten().sort()[0]).all())
        (False, True)
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InvalidInputError(f"seed: must be an integer, got {seed!r}; 0 is the default")
    chosen = _chosen_names(model, layers, embeddings)
    _check_weights(model, chosen)
    tensors = [*model.parameters(), *model.buffers()]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    require_memory(num_bytes, "model", "close other programs, or use a smaller model", tensors[0].device)

    copied = copy.deepcopy(model)
    with torch.no_grad():
        # Tied weights have several names; this lists each weight once, under its first name.
        for name, parameter in copied.named_parameters():
            parameter.grad = None
            if name in chosen:
                parameter.copy_(_permuted(parameter, int(seed), name))
    return copied


def _chosen_names(model: nn.Module, layers: LayerRule, embeddings: bool) -> set[str]:
    """List the weights of the chosen layers, each under its first name in the model."""
    blocks = decoder_blocks(text_decoder(base_model(model)))
    chosen_layers = resolve_layers(layers, len(blocks))

    # Weights are compared by identity, because a shared weight has the name of its first module only.
    in_any_block: set[int] = set()
    in_chosen: set[int] = set()
    for index, block in enumerate(blocks):
        of_block = {id(parameter) for parameter in block.parameters()}
        in_any_block |= of_block
        if index in chosen_layers:
            in_chosen |= of_block

    names = set()
    for name, parameter in model.named_parameters():
        is_outside = id(parameter) not in in_any_block
        if id(parameter) in in_chosen or (embeddings and is_outside):
            names.add(name)
    return names


def _check_weights(model: nn.Module, chosen: set[str]) -> None:
    """Reject weights whose entries have no meaning of their own, or no value.

    Raises:
        InvalidInputError: quantized or meta weights.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InvalidInputError(
                f"model: must hold its weights, got {name} on the meta device; load it without offloading"
            )
        if name in chosen and not (parameter.is_floating_point() and parameter.element_size() >= 2):
            raise InvalidInputError(
                f"model: must have floating-point weights of 16 bits or more, got {parameter.dtype} in {name}; load it "
                "without quantization"
            )


def _permuted(weight: Tensor, seed: int, name: str) -> Tensor:
    """Put the entries of a weight in an order that depends on seed and name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    own_seed = int.from_bytes(digest[:8], "little") >> 1
    generator = torch.Generator().manual_seed(own_seed)
    # Drawn on the CPU, so that every device has the same order.
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    entries = weight.detach().flatten()
    return entries[order].view(weight.shape)
