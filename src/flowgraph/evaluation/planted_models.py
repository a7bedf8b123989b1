r"""Transformers with weights set by hand, so that which tokens and edges decide the answer is known and not measured.

Every model is a :class:`transformers.GPT2LMHeadModel` without trained weights. Its residual stream is divided into
named subspaces of unit vectors (features). A feature is stored twice, once with each sign, so that the mean that
LayerNorm subtracts is 0; every position that matters has the same number of features, so that LayerNorm divides by a
known constant. A head compares the query subspace of the reader with the key subspace of the token that is read,

.. math:: \text{score} = S \, [\text{the features are equal}] + \tfrac{S}{2} \, [\text{the token is the first}],
   \qquad S = 240,

and copies the value subspace of the token to another subspace. Softmax of such scores is one token in float32 exactly:
the match, or the first token (an attention sink) where nothing matches. The other heads are idle: they read all tokens
alike and write nothing, as most heads of a trained model do for a given answer.

Source: induction heads, Olsson et al. 2022, arXiv 2209.11895; weights set by hand, as in Tracr, Lindner et al. 2023,
arXiv 2301.05062.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from flowgraph.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

PlantedKind = Literal["copy", "induction", "two_hop", "generated_hop"]
"""A lookup in one layer; an induction over two layers; a lookup whose content was itself looked up a layer before, by a
token of the prompt or by a generated token."""

FIRST = "<s>"
"""The first token of every text: heads that find nothing read it. It is also what a model answers then."""

KEYS = "abcdefghij"
LINKS = "abcdefgh"
LEAVES = "mnopqrst"
VALUES = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SO = "so"

_SCORE = 240.0
"""S: e^{-S/2} is below the smallest float32, so that the attention of a match is exactly 1."""
_MARGIN = 8.0
"""Logit of the answer above all others: a probability of .95 or more, whose gradient is not rounded away."""
_NUM_HEADS = 4
_POSITIONS = 48
_NORM_EPSILON = 1e-12
_COPIES = 2
"""A feature is stored with both signs."""


@dataclass(frozen=True)
class _Head:
    """One head that is set by hand.

    Attributes:
        layer: its layer.
        head: its number within the layer.
        query: subspace of the reader that is compared.
        key: subspace of the token that is read.
        value: subspace that is copied.
        write: subspace that it is copied to.
        shift: the query's feature i asks for the key's feature i - shift.
    """

    layer: int
    head: int
    query: str
    key: str
    value: str
    write: str
    shift: int = 0


@dataclass(frozen=True)
class _Design:
    """A model: its vocabulary, and what each token and head does.

    Attributes:
        sizes: number of features of each subspace.
        tokens: for each token its features, as subspace to number.
        heads: the heads that do something.
        output: the subspace whose features are answers.
        answers: the token that each feature of the output represents.
        successors: tokens that follow a feature of a token, as (subspace, feature, token); they come before answers.
        position: the subspace of positions; None: the model does not know positions.
    """

    sizes: Mapping[str, int]
    tokens: Mapping[str, Mapping[str, int]]
    heads: Sequence[_Head]
    output: str
    answers: Sequence[str]
    successors: Sequence[tuple[str, int, str]] = ()
    position: str | None = None


def planted_model(kind: PlantedKind) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Build a model of known mechanism with its tokenizer.

    ============= ====================================== ============================================================
    kind          text and answer                        what decides
    ============= ====================================== ============================================================
    copy          ``<s> c=3 a=7 b=1 a?`` -> ``7``        layer 1: ``a?`` reads ``a=7``
    induction     ``<s> f a k c a`` -> ``k``             layer 0: ``k`` reads ``a``; layer 1: last ``a`` reads ``k``
    two_hop       ``<s> m=5 n=2 b>n a>m a?`` -> ``5``    layer 0: ``a>m`` reads ``m=5``; layer 1: ``a?`` reads ``a>m``
    generated_hop ``<s> c=3 a=7 a?`` -> ``a* so 7``      layer 0: ``a*`` reads ``a=7``; layer 1: ``so`` reads ``a*``
    ============= ====================================== ============================================================

    Args:
        kind: one of the table.

    Returns:
        The model in evaluation mode, float32, and a tokenizer of whole words.

    Raises:
        InvalidInputError: another kind.

    Cost: milliseconds; up to 1.2 million weights.

    Example:
        >>> import torch
        >>> model, tokenizer = planted_model("copy")
        >>> ids = tokenizer("<s> c=3 a=7 b=1 a?", return_tensors="pt").input_ids
        >>> tokenizer.decode(model(ids).logits[0, -1].argmax())
        '7'
    """
    if kind not in get_args(PlantedKind):
        raise InvalidInputError(f"kind: must be one of {', '.join(get_args(PlantedKind))}, got {kind!r}; choose one")
    design = _DESIGNS[kind]()
    return _model(design), _tokenizer(list(design.tokens))


# Designs -------------------------------------------------------------------------------------------------------------


def _copy() -> _Design:
    """Design a lookup by content: a query reads the pair of its key, and answers the pair's value."""
    nothing = len(VALUES)
    tokens: dict[str, dict[str, int]] = {FIRST: {"sink": 0, "value": nothing}}
    for number, key in enumerate(KEYS):
        tokens[f"{key}?"] = {"query": number, "filler": 0}
        for digit, value in enumerate(VALUES):
            tokens[f"{key}={value}"] = {"key": number, "value": digit}
    tokens |= {value: {"filler": 0, "spoken": digit} for digit, value in enumerate(VALUES)}
    sizes = {
        "sink": 1,
        "filler": 1,
        "key": len(KEYS),
        "query": len(KEYS),
        "value": nothing + 1,
        "spoken": len(VALUES),
        "found": nothing + 1,
    }
    # The layer below is idle, as the first layers of a trained model are for a lookup.
    lookup = _Head(layer=1, head=2, query="query", key="key", value="value", write="found")
    return _Design(sizes, tokens, [lookup], "found", [*VALUES, FIRST])


def _induction() -> _Design:
    """Design an induction: find the token after the earlier occurrence of the last token."""
    words = [FIRST, *LETTERS]
    tokens: dict[str, dict[str, int]] = {word: {"token": number} for number, word in enumerate(words)}
    tokens[FIRST]["sink"] = 0
    # The other tokens have a feature in the place of the sink's, so that all have as many.
    for word in LETTERS:
        tokens[word]["filler"] = 0
    sizes = {
        "sink": 1,
        "filler": 1,
        "position": _POSITIONS,
        "token": len(words),
        "previous": len(words),
        "found": len(words),
    }
    heads = [
        _Head(layer=0, head=1, query="position", key="position", value="token", write="previous", shift=1),
        _Head(layer=1, head=2, query="token", key="previous", value="token", write="found"),
    ]
    return _Design(sizes, tokens, heads, "found", words, position="position")


def _two_hop() -> _Design:
    """Design a lookup of a lookup: a link fetches the value of the leaf it names, a query the value of its link."""
    nothing = len(VALUES)
    no_leaf = len(LEAVES)
    fillers = {"filler": 0, "second_filler": 0}
    tokens: dict[str, dict[str, int]] = {FIRST: {"sink": 0, "value": nothing, **fillers}}
    for number, link in enumerate(LINKS):
        # In layer 0 a query reads itself, so that what it answers never depends on the first token.
        tokens[f"{link}?"] = {"query": number, "names": no_leaf, "leaf": no_leaf, "value": nothing}
        for leaf_number, leaf in enumerate(LEAVES):
            tokens[f"{link}>{leaf}"] = {"link": number, "names": leaf_number, **fillers}
    for leaf_number, leaf in enumerate(LEAVES):
        for digit, value in enumerate(VALUES):
            tokens[f"{leaf}={value}"] = {"leaf": leaf_number, "value": digit, **fillers}
    tokens |= {value: {"spoken": digit, **fillers} for digit, value in enumerate(VALUES)}
    sizes = {
        "sink": 1,
        "filler": 1,
        "second_filler": 1,
        "query": len(LINKS),
        "link": len(LINKS),
        "names": no_leaf + 1,
        "leaf": no_leaf + 1,
        "value": nothing + 1,
        "spoken": len(VALUES),
        "carried": nothing + 1,
        "found": nothing + 1,
    }
    heads = [
        _Head(layer=0, head=2, query="names", key="leaf", value="value", write="carried"),
        _Head(layer=1, head=1, query="query", key="link", value="carried", write="found"),
    ]
    return _Design(sizes, tokens, heads, "found", [*VALUES, FIRST])


def _generated_hop() -> _Design:
    """Design a lookup through a generated token: it fetches the value, and the token after it reads it there."""
    nothing = len(VALUES)
    no_key = len(KEYS)
    fillers = {"filler": 0, "second_filler": 0}
    tokens: dict[str, dict[str, int]] = {FIRST: {"sink": 0, "value": nothing, **fillers}}
    successors = []
    for number, key in enumerate(KEYS):
        tokens[f"{key}?"] = {"query": number, "third_filler": 0, **fillers}
        tokens[f"{key}*"] = {"recall": number, "recalled": 0, **fillers}
        successors.append(("query", number, f"{key}*"))
        for digit, value in enumerate(VALUES):
            tokens[f"{key}={value}"] = {"key": number, "value": digit, **fillers}
    # In layer 0 it reads itself, so that what it answers never depends on the first token.
    tokens[SO] = {"asks": 0, "recall": no_key, "key": no_key, "value": nothing}
    successors.append(("recalled", 0, SO))
    tokens |= {value: {"spoken": digit, "third_filler": 0, **fillers} for digit, value in enumerate(VALUES)}
    sizes = {
        "sink": 1,
        "filler": 1,
        "second_filler": 1,
        "third_filler": 1,
        "query": len(KEYS),
        "recall": no_key + 1,
        "recalled": 1,
        "asks": 1,
        "key": no_key + 1,
        "value": nothing + 1,
        "spoken": len(VALUES),
        "carried": nothing + 1,
        "found": nothing + 1,
    }
    heads = [
        _Head(layer=0, head=2, query="recall", key="key", value="value", write="carried"),
        _Head(layer=1, head=1, query="asks", key="recalled", value="carried", write="found"),
    ]
    return _Design(sizes, tokens, heads, "found", [*VALUES, FIRST], successors)


_DESIGNS = {"copy": _copy, "induction": _induction, "two_hop": _two_hop, "generated_hop": _generated_hop}


# Weights -------------------------------------------------------------------------------------------------------------


def _model(design: _Design) -> GPT2LMHeadModel:
    """Build the model of a design: all weights 0, then embeddings, heads and output."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # A head needs one dimension for each feature that it reads, and one more for the sink. Heads are equally wide, and
    # the stream, which is as wide as all of them, holds every signed feature.
    most_read = 0
    for head in design.heads:
        for subspace in (head.query, head.key, head.value):
            most_read = max(most_read, design.sizes[subspace])
    num_features = sum(design.sizes.values())
    share_of_stream = math.ceil(_COPIES * num_features / _NUM_HEADS)
    head_width = max(most_read + 1, share_of_stream)
    config = GPT2Config(
        vocab_size=len(design.tokens),
        n_positions=_POSITIONS,
        n_embd=head_width * _NUM_HEADS,
        n_layer=1 + max(head.layer for head in design.heads),
        n_head=_NUM_HEADS,
        n_inner=8,
        layer_norm_epsilon=_NORM_EPSILON,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    names = list(design.tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = ".ln_" in name and name.endswith("weight")
            parameter.fill_(1.0 if is_norm_weight else 0.0)

        # Embeddings of tokens and positions: the sum of the vectors of all features.
        vectors = _Vectors(design.sizes, config.n_embd)
        for number, features in enumerate(design.tokens.values()):
            for subspace, feature in features.items():
                model.transformer.wte.weight[number] += vectors.write(subspace)[feature]
        if design.position is not None:
            model.transformer.wpe.weight += vectors.write(design.position)

        # Each layer reads tokens with the features of their embedding and one more for each layer below.
        num_features_read = len(design.tokens[FIRST]) + (design.position is not None)
        for layer, block in enumerate(model.transformer.get_submodule("h").children()):
            deviation = _deviation(num_features_read, config.n_embd)
            for head in design.heads:
                if head.layer == layer:
                    _set_head(block.get_submodule("attn"), head, vectors, deviation, head_width)
                    num_features_read += 1

        # The output gives the margin to the answer of the feature that was found. LayerNorm divides by the deviation,
        # so the weights multiply by it.
        deviation = _deviation(num_features_read, config.n_embd)
        answers = torch.tensor([names.index(answer) for answer in design.answers])
        model.lm_head.weight[answers] = _MARGIN * deviation * vectors.read(design.output)
        for subspace, feature, successor in design.successors:
            # Twice the margin: where a successor is due, no answer is.
            gain = 2 * _MARGIN * deviation
            model.lm_head.weight[names.index(successor)] = gain * vectors.read(subspace)[feature]
    return model


class _Vectors:
    """The vectors of the features of each subspace in the residual stream."""

    def __init__(self, sizes: Mapping[str, int], width: int) -> None:
        """Give each subspace its dimensions, and their negatives as many dimensions further on."""
        self._sizes = sizes
        self._width = width
        self._starts: dict[str, int] = {}
        start = 0
        for name, size in sizes.items():
            self._starts[name] = start
            start += size
        self._half = start

    def write(self, subspace: str) -> Tensor:
        """Return ``[features, width]``: what is added to the stream for each feature."""
        size = self._sizes[subspace]
        vectors = torch.zeros(size, self._width)
        features = torch.arange(size)
        dimensions = features + self._starts[subspace]
        vectors[features, dimensions] = 1
        vectors[features, dimensions + self._half] = -1
        return vectors

    def read(self, subspace: str) -> Tensor:
        """Return ``[features, width]``: the dual vectors, whose product with a stream is 1 where it has the feature."""
        return self.write(subspace) / 2


def _deviation(num_features: int, width: int) -> float:
    """Compute the standard deviation of a stream with so many features, as LayerNorm does."""
    return math.sqrt(2 * num_features / width + _NORM_EPSILON)


def _set_head(attention: nn.Module, head: _Head, vectors: _Vectors, deviation: float, head_width: int) -> None:
    """Set the weights of one head of a GPT-2 attention module (weights ``[in, out]``; queries, keys, values joined)."""
    weight = attention.get_parameter("c_attn.weight")
    bias = attention.get_parameter("c_attn.bias")
    output = attention.get_parameter("c_proj.weight")

    # The first column of this head's queries, keys and values, and its first row of the output projection.
    width = weight.shape[0]
    first_query = head.head * head_width
    first_key = width + first_query
    first_value = 2 * width + first_query

    # Query i of the reader asks for key i - shift. The gain makes the score of a match S, after the division by the
    # square root of the head's width.
    gain = deviation * math.sqrt(_SCORE * math.sqrt(head_width))
    queries = vectors.read(head.query)[head.shift :]
    keys = vectors.read(head.key)
    weight[:, first_query : first_query + len(queries)] = gain * queries.T
    weight[:, first_key : first_key + len(keys)] = gain * keys.T

    # Every reader asks for the first token with half the score, in a dimension of its own.
    last_dimension = head_width - 1
    bias[first_query + last_dimension] = gain / deviation / 2
    weight[:, first_key + last_dimension] = gain * vectors.read("sink")[0]

    # What is read is copied with its size before LayerNorm.
    values = vectors.read(head.value)
    weight[:, first_value : first_value + len(values)] = deviation * values.T
    output[first_query : first_query + len(values)] = vectors.write(head.write)


@cache
def _tokenizer_of(words: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """Build a tokenizer whose tokens are words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=FIRST))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=FIRST)


def _tokenizer(words: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a vocabulary; models of one design share it."""
    return _tokenizer_of(tuple(words))
