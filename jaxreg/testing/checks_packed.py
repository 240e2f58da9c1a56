"""Do rows that hold several datums give what rows of one datum give?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array
from jaxreg.batch.segments import Segments, loose
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.testing.subject import Subject, difference


def with_loose_rows(term: Subject, segments: Segments) -> Subject:
    """The same example, with a row a datum, which the other checks are of."""
    batch = term.batch

    def apart(array: Array) -> Array:
        return array if array.ndim == 1 else loose(array, segments)

    rows = TokenBatch.from_arrays(mask=apart(batch.mask), weights=apart(batch.weights))
    rows = rows.with_arrays(**{name: apart(array) for name, array in batch.arrays.items()})
    return dataclasses.replace(term, x=apart(term.x), batch=rows.replace(pairs=batch.pairs))


def packed_rows(term: Subject, apart: Subject, segments: Segments) -> Iterator[str]:
    """Value, metrics and gradient of packed rows, beside those of loose ones."""
    got, want = term.answer(term.x, term.batch), apart.answer(apart.x, apart.batch)
    what = difference(got, want)
    gradient = np.asarray(loose(jnp.asarray(got.gradient[0]), segments))
    if what is None and not np.allclose(gradient, want.gradient[0], rtol=1e-4, atol=1e-6):
        what = "the gradient of the same tokens is another"
    if what:
        yield (
            f"rows may hold several datums: with the batch's rows, by its segment_ids, {what}, of a row a "
            f"datum; reduce with batch.datum_sum, batch.datum_mean and their kin, and put one number a datum "
            f"on its tokens with batch.spread"
        )
