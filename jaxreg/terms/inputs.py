"""From x and a batch to what terms are made of: sampled tokens' logprobs, or whole distributions.

A term on distributions takes logits (or logprobs) of any leading axes, [..., V]: [B, T, V] of a language
model, [B, V] of a classifier, with labels, weights and mask of the leading axes. They are folded to [B, T,
V], with T = 1 for a classifier, and the batch with them; what the term reads is folded by `read_folded` then.

A term on sampled tokens takes their logprobs [B, T]; or, with ``inputs="logits"``, logits [..., V] and the
tokens by the name ``targets``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch, as_token_batch
from jaxreg.batch.totals import taken_totals
from jaxreg.terms.masked import counts, real_values
from jaxreg.terms.term import Source, named, needs, read

Inputs: TypeAlias = Literal["logprobs", "logits"]
INPUTS = ("logprobs", "logits")
_TOLERANCE = 1e-3  # a logprob may be this much above 0, by rounding
_LABELS = ("labels", "label", "target_tokens")


def token_rows(batch: PyTree, x: Array, who: str, inputs: Inputs, *, per_token: bool = True) -> TokenBatch:
    """The batch as a TokenBatch [B, T], with the leading axes of logits x [..., V] folded to B and T.

    Args:
      batch: a TokenBatch, or a mapping, whose ``mask`` and ``weights`` (all 1 by default) then have x's
        leading axes.
      x: logprobs [B, T] or [B, T, K]; logits [..., V].
      who: the term's name.
      inputs: what x is.
      per_token: the term has one number a token, so weights [B, T, K] do not fit it.

    Raises:
      ValueError: shapes that do not fit; x that looks like a classifier's logits but is declared logprobs.
    """
    if inputs == "logprobs":
        _refuse_a_classifier(batch, x, who)
        tokens = as_token_batch(batch, x, who)
        fits = jnp.shape(x)[:2] == tokens.shape
    else:
        tokens = _folded(batch, x, who)
        fits = _fold(jnp.shape(x)[:-1]) == tokens.shape
    if not fits:
        raise ValueError(
            f"{who}: x is {'logits [B, T, V]' if inputs == 'logits' else 'logprobs [B, T]'} with (B, T) = "
            f"{tokens.shape} as in the batch, whose arrays are {sorted(tokens)}, got {jnp.shape(x)}"
        )
    if per_token:
        check_weights(tokens, tokens.shape, who)
    return tokens


def check_weights(tokens: TokenBatch, shape: tuple[int, ...], who: str) -> None:
    """Refuse weights [B, T, K] for values of another shape, and say how to get weights [B, T]."""
    weights = tokens.weights.shape
    if len(weights) == 3 and shape != weights:
        raise ValueError(
            f"{who}: its values are {shape}, but the batch's weights are [B, T, K] = {weights}; to weight "
            f"each token by their sum over K, give the term as lambda x, batch: term(x, "
            f"batch.replace(weights=batch.weights.sum(-1)))"
        )


def kind_of(x: PyTree, inputs: Inputs | None, who: str) -> Inputs:
    """What x is, of a term that takes both: what ``inputs`` says, or what x's axes do.

    Raises:
      ValueError: x has one axis, and inputs is None. TypeError: x is no array.
    """
    if not isinstance(x, jax.Array | np.ndarray):
        as_token_batch(None, x, who)  # says what it is
    if inputs is not None:
        return inputs
    if x.ndim < 2:
        raise ValueError(
            f"{who}: x is sampled-token logprobs [B, T] or whole distributions [..., V], got {x.shape}; say "
            f"inputs='logits' if it is one distribution [V]"
        )
    return "logprobs" if x.ndim == 2 else "logits"


def distributions(batch: PyTree, x: Array, who: str) -> tuple[TokenBatch, Array]:
    """The batch as [B, T], and logits x [..., V] as [B, T, V] in float32, 0 where nothing counts."""
    if jnp.ndim(x) < 1:
        raise ValueError(f"{who}: expected whole distributions, logits or logprobs [..., V], got shape ()")
    tokens = token_rows(batch, x, who, "logits")
    return tokens, real_values(tokens, fold(x, tokens, 1), who)


def token_logprobs(tokens: TokenBatch, x: Array, who: str, inputs: Inputs, targets: str) -> Array:
    """[B, T] logprobs of the sampled tokens, in float32, 0 where nothing counts; x is what inputs says.

    Logprobs [B, T, K] pass as they are.

    Raises:
      ValueError: a positive logprob, or a target that is no word, where the numbers are concrete (where they
        are traced that token's logprob is NaN). KeyError, TypeError: no such targets, or no integers.
    """
    if inputs == "logprobs":
        return negative(real_values(tokens, x, who), who)
    wide = real_values(tokens, fold(x, tokens, 1), who)
    index, valid = target_index(tokens, targets, jnp.shape(x), who)
    chosen = jnp.take_along_axis(wide, index[..., None], axis=-1)[..., 0]
    return jnp.where(valid, chosen - jax.nn.logsumexp(wide, axis=-1), jnp.nan)


def sampled(
    batch: PyTree, x: PyTree, who: str, inputs: Inputs, targets: str, what: str = "sampled-token"
) -> tuple[TokenBatch, Array]:
    """`token_rows` and `token_logprobs` of a term on one logprob a token."""
    if inputs == "logprobs":
        needs(x, 2, who, f"logits (with inputs='logits') or {what} logprobs [B, T]")
    tokens = token_rows(batch, x, who, inputs)
    return tokens, token_logprobs(tokens, x, who, inputs, targets)


def read_folded(
    source: Source,
    tokens: TokenBatch,
    shape: tuple[int, ...],
    who: str,
    what: str,
    *,
    trailing: int = 0,
    per_datum: bool = False,
) -> Array:
    """What a source stands for, of x's own shape (the last ``trailing`` axes are not folded), as
    `real_values`.

    With per_datum one number a datum [B] stands for all of its tokens.
    """
    array = read(source, tokens, who, what)
    if per_datum and array.ndim == 1 and tokens.segments is not None and array.shape == (tokens.datums,):
        array = tokens.spread(array)
    elif per_datum and array.shape == shape[:1]:
        array = jnp.broadcast_to(array.reshape(-1, *[1] * (len(shape) - 1)), shape)
    if array.shape != shape:
        raise ValueError(f"{who}: {named(source, what)} has shape {array.shape}, but x has {shape}")
    return real_values(tokens, fold(array, tokens, trailing), who)


def fold(array: Array, tokens: TokenBatch, trailing: int) -> Array:
    """[..., *trailing axes] as [B, T, *trailing axes]."""
    kept = jnp.shape(array)[jnp.ndim(array) - trailing :]
    return jnp.reshape(array, (*tokens.shape, *kept))


def negative(logprobs: Array, who: str) -> Array:
    """The logprobs, if none is positive.

    Raises:
      ValueError: one is, and the numbers are concrete. Where they are traced it becomes NaN.
    """
    if isinstance(logprobs, jax.core.Tracer):
        return jnp.where(logprobs > _TOLERANCE, jnp.nan, logprobs)
    if logprobs.size and float(jnp.max(logprobs)) > _TOLERANCE:
        raise ValueError(
            f"{who}: logprobs are ≤ 0, but x holds {float(jnp.max(logprobs)):.4g}; if x holds logits, say "
            f"inputs='logits'; if these are probabilities, take their logarithm"
        )
    return logprobs


def target_index(tokens: TokenBatch, targets: str, shape: tuple[int, ...], who: str) -> tuple[Array, Array]:
    """[B, T] targets within 0 … V−1 (0 where nothing counts), and where they were so already."""
    if targets not in tokens:
        raise KeyError(f"{who}: the batch has no target tokens {targets!r}; it has {sorted(tokens)}")
    given = jnp.asarray(tokens[targets])
    if given.shape not in (shape[:-1], tokens.shape):
        raise ValueError(
            f"{who}: inputs='logits' takes x [..., V] and {targets!r} of x's leading axes, [B, T, V] and "
            f"[B, T] or [B, V] and [B]; got {shape} and {given.shape}"
        )
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"{who}: {targets!r} are token numbers, so integers; got dtype {given.dtype}")
    # Wide first: 256 does not fit into the uint8 that byte-level targets may come in.
    wide = given if given.dtype.itemsize >= 4 else given.astype(jnp.int32)
    index = jnp.where(counts(tokens), wide.reshape(tokens.shape), 0)
    valid = (index >= 0) & (index < shape[-1])
    if not isinstance(valid, jax.core.Tracer) and not bool(jnp.all(valid)):
        wrong = int(index.reshape(-1)[jnp.argmin(valid.reshape(-1))])
        raise ValueError(
            f"{who}: {targets!r} holds {wrong} at a token that counts, but x has {shape[-1]} words, 0 … "
            f"{shape[-1] - 1}; give tokens without a target (such as −100) weight 0, or mask them"
        )
    return jnp.where(valid, index, 0), valid


def _folded(batch: PyTree, x: Array, who: str) -> TokenBatch:
    lead = jnp.shape(x)[:-1]
    if isinstance(batch, TokenBatch) or len(lead) == 2 or not (batch is None or isinstance(batch, Mapping)):
        return as_token_batch(batch, x, who)
    arrays = dict(batch or {})
    given: dict[str, Any] = {name: arrays.pop(name, None) for name in ("mask", "weights")}
    totals = taken_totals(arrays)
    for name, array in given.items():
        if array is not None and jnp.shape(array) != lead:
            raise ValueError(
                f"{who}: {name} has shape {jnp.shape(array)}, but x, logits [..., V], has {jnp.shape(x)}"
            )
    shape = _fold(lead)
    mask = jnp.ones(shape, bool) if given["mask"] is None else jnp.reshape(given["mask"], shape)
    weights = None if given["weights"] is None else jnp.reshape(given["weights"], shape)
    made = TokenBatch.from_arrays(mask=mask, weights=weights)
    return made.replace(arrays=arrays).of_whole(totals)


def _fold(lead: tuple[int, ...]) -> tuple[int, int]:
    if len(lead) < 2:
        return (lead[0] if lead else 1), 1
    return lead[0], math.prod(lead[1:])


def _refuse_a_classifier(batch: PyTree, x: Any, who: str) -> None:
    """Labels [B] beside x [B, N]: read as [B, T] the logits of a classifier give a plausible wrong number."""
    if jnp.ndim(x) != 2 or isinstance(batch, TokenBatch) or not isinstance(batch, Mapping):
        return
    for name in _LABELS:
        labels = batch.get(name)
        if labels is not None and jnp.shape(labels) == jnp.shape(x)[:1] and jnp.shape(x)[1] > 1:
            raise ValueError(
                f"{who}: x {jnp.shape(x)} beside {name!r} {jnp.shape(labels)} looks like a classifier's "
                f"logits [B, V], but is declared logprobs [B, T]; say inputs='logits', or rename {name!r}"
            )
