"""What a term on token data keeps: padding, wherever it stands, weights of 0, and the datums' order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.testing.subject import Answer, Subject, difference, finite, shaped, where

_GARBAGE = (7.5, -np.inf, np.nan)


def padding(term: Subject) -> Iterator[str]:
    """What stands where the mask is False is not read, and gets no gradient."""
    x, batch = term.x, term.batch
    mask = np.asarray(batch.mask)
    if mask.all():
        return
    plain = term.answer(x, batch)
    leaked = (plain.gradient[0] != 0).reshape(*mask.shape, -1).any(-1) & ~mask
    if leaked.any():
        yield (
            f"no gradient into padding: it is not 0 {where(leaked)}, where the mask is False; mask it, with "
            f"batch.where(x) or batch.mean(...)"
        )
    for garbage in _GARBAGE:
        got = term.answer(_fill(x, mask, garbage), batch)
        if what := difference(got, plain):
            yield f"padding of x changes nothing: with {garbage} in it {what}"
            break
        if not finite(got.gradient[0]).all():
            yield (
                f"padding of x changes nothing: with {garbage} in it the gradient is not finite "
                f"{where(~finite(got.gradient[0]))}; mask x before, not only after: batch.where(x)"
            )
            break
    for garbage in _GARBAGE:
        arrays = {name: _fill(array, mask, garbage) for name, array in batch.arrays.items()}
        if what := difference(term.answer(x, batch.replace(arrays=arrays)), plain):
            yield f"padding of the batch changes nothing: with {garbage} there {what}"
            break
    longer = jax.tree.map(lambda array: _extend(array, mask.shape), batch)
    if what := difference(term.answer(_extend(x, mask.shape), longer), plain):
        yield f"more padding changes nothing: with twice as much {what}"


def order(term: Subject) -> Iterator[str]:
    """The datums are a set."""
    groups = term.groups()
    moved = term.rng.permutation(len(groups))
    rows = groups[np.roll(moved, 1) if (moved == np.arange(len(moved))).all() else moved].reshape(-1)
    got = term.answer(term.x[rows], jax.tree.map(lambda a: a[rows], term.batch))
    if what := difference(got, term.answer(term.x, term.batch)):
        yield f"the order of datums changes nothing: as {rows.tolist()} {what}"


def layout(term: Subject) -> Iterator[str]:
    """The same tokens in the same order are the same answer, wherever the padding stands."""
    mask = np.asarray(term.batch.mask)
    length = mask.shape[1]
    ranks = [np.flatnonzero(row) for row in mask]
    places = {
        "on the right": [np.arange(len(r)) for r in ranks],
        "on the left": [np.arange(length - len(r), length) for r in ranks],
        "between the tokens": [2 * np.arange(len(r)) + 1 for r in ranks],
    }
    # Between the tokens there is room in a batch of twice the size, as `padding` tries: one program for both.
    answers = {
        name: _moved(term, ranks, to, times=2 if name == "between the tokens" else 1)
        for name, to in places.items()
    }
    want = answers.pop("on the right")
    for name, got in answers.items():
        what = difference(got, want)
        if what is None and not np.allclose(got.gradient[0], want.gradient[0], rtol=1e-4, atol=1e-6):
            what = "the gradient of the same tokens is another"
        if what:
            yield (
                f"where padding stands changes nothing: with it {name} {what}; find a datum's tokens by "
                f"batch.mask, not by their position or by batch.lengths. A term that reads positions on "
                f"purpose: check_term(..., layout=False)"
            )
            break


def weightless_tokens(term: Subject) -> Iterator[str]:
    """A real token of weight 0, such as a prompt's, is no part of the answer."""
    counted = _counted(term.batch)
    light = np.zeros_like(counted)
    for row, several in enumerate(counted.sum(1) > 1):
        if several:
            light[row, term.rng.choice(np.flatnonzero(counted[row]))] = True
    if not light.any():
        return
    batch = _reweighted(term.batch, light)
    plain = term.answer(term.x, batch)
    remedy = (
        "take its weight from batch.weights, as batch.mean, batch.sum and batch.datum_mean do, in the "
        "metrics, too. A term that counts every real token on purpose: check_term(..., weights=False)"
    )
    leaked = (plain.gradient[0] != 0).reshape(*light.shape, -1).any(-1) & light
    if leaked.any():
        yield f"a token of weight 0 is no part of the answer: its gradient is not 0 {where(leaked)}; {remedy}"
        return

    def other(array: Any) -> Any:
        """Other numbers there, below the old ones: logprobs stay logprobs."""
        if jnp.shape(array)[:2] != light.shape or not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            return array
        change = 1 + np.abs(term.rng.normal(size=jnp.shape(array)))
        return jnp.asarray(array - shaped(light, jnp.ndim(array)) * change, jnp.result_type(array))

    arrays = {name: other(array) for name, array in batch.arrays.items()}
    got = term.answer(other(term.x), batch.replace(arrays=arrays))
    if what := difference(got, plain):
        yield (
            f"a token of weight 0 is no part of the answer: with other numbers {where(light)}, where the "
            f"weight is 0, {what}; {remedy}"
        )


def weightless_datums(term: Subject) -> Iterator[str]:
    """A datum whose tokens all have weight 0 is as good as absent."""
    groups = term.groups()
    alive = np.asarray(_counted(term.batch).any(1))[groups].all(1)
    if alive.sum() < 2:
        return
    chosen = np.flatnonzero(alive)[0]
    light = np.zeros(np.shape(term.batch.mask), bool)
    light[groups[chosen]] = True
    batch = _reweighted(term.batch, light)
    # Absent as padding is, which `padding` tried: no program of another shape.
    mask = jnp.asarray(np.asarray(batch.mask) & ~light)
    lengths = jnp.where(jnp.any(mask, axis=1), batch.lengths, 0)
    without = term.answer(term.x, batch.replace(mask=mask, lengths=lengths))
    got = term.answer(term.x, batch)
    what = difference(got, without)
    if what is None and (got.gradient[0][groups[chosen]] != 0).any():
        what = "it has a gradient"
    if what:
        yield (
            f"a datum of weight 0 is as if it were not there: with one {what}; divide by what counts, as "
            f"batch.mean and batch.datum_mean of values [B, T] do, not by len(x) or the rows of the mask. A "
            f"term that counts every real token on purpose: check_term(..., weights=False)"
        )


def _counted(batch: TokenBatch) -> np.ndarray:
    """[B, T]: real, and of some weight."""
    weights = np.asarray(batch.weights)
    return np.asarray(batch.mask) & (weights != 0).reshape(*batch.shape, -1).any(-1)


def _reweighted(batch: Any, light: np.ndarray) -> Any:
    weights = np.asarray(batch.weights)
    light = shaped(light, weights.ndim)
    return batch.replace(weights=jnp.asarray(np.where(light, np.zeros_like(weights), weights)))


def _moved(term: Subject, ranks: list[np.ndarray], to: list[np.ndarray], times: int) -> Answer:
    """The answer with every datum's real tokens at other places, its gradient back at the first ones.

    In a batch of `times` as many rows and tokens; the added ones are padding.
    """
    rows = np.repeat(np.arange(len(ranks)), [len(r) for r in ranks])
    old, new = (rows, np.concatenate(ranks)), (rows, np.concatenate(to))
    shape = term.batch.shape

    def move(array: Any) -> Array:
        values = np.asarray(array)
        wide = np.asarray(_extend(values, shape)) if times == 2 else values
        if values.shape[:2] != shape:
            return jnp.asarray(wide)
        moved = np.zeros_like(wide)
        moved[new] = values[old]
        return jnp.asarray(moved)

    batch = term.batch
    arrays = {name: move(array) for name, array in batch.arrays.items()}
    plain = TokenBatch.from_arrays(mask=move(batch.mask), weights=move(batch.weights))
    moved = plain.with_arrays(**arrays)
    answer = term.answer(move(term.x), moved)
    gradient = np.zeros(term.x.shape, answer.gradient[0].dtype)
    gradient[old] = answer.gradient[0][new]
    return answer._replace(gradient=[gradient])


def _fill(array: Any, mask: np.ndarray, garbage: float) -> Any:
    """The array with garbage where the mask is False; integers get an unlikely number instead."""
    if jnp.shape(array)[:2] != mask.shape:
        return array
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        garbage = 3
    values = np.asarray(array)
    return jnp.asarray(np.where(shaped(mask, values.ndim), values, np.asarray(garbage, values.dtype)))


def _extend(array: Any, shape: tuple[int, ...]) -> Any:
    """Twice the rows and twice the tokens, by zeros."""
    if jnp.shape(array)[:2] != shape[: jnp.ndim(array)]:
        return array
    pads = [(0, n) for n in shape[: jnp.ndim(array)]] + [(0, 0)] * (jnp.ndim(array) - 2)
    return jnp.asarray(np.pad(np.asarray(array), pads))
