"""Do the parts of a batch add up to the whole?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.kinds import KINDS
from jaxreg.base.types import Array
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.core.part_metrics import merged, whole_metrics
from jaxreg.core.parted import kinds_of
from jaxreg.testing.subject import Answer, Subject, close

PARTS = 2
X = "x of check_term"


def parts(term: Subject, of_tokens: bool) -> Iterator[str]:
    """Value, gradient and known metrics of parts of unequal weight, beside the whole's."""
    if not isinstance(term.batch, TokenBatch):
        yield "additive=True: the batch is no TokenBatch, so it cannot be split; give one"
        return
    named = getattr(term.fn, "reweighted", ())
    whole = term.answer(term.x, term.batch)
    batch = term.batch.with_arrays(**{X: term.x}) if of_tokens else term.batch
    found = [
        term.answer(part[X] if of_tokens else term.x, _without_x(part))
        for part in batch.split(PARTS, rows_together=term.rows_together, reweighted=named)
    ]
    value = sum(answer.value for answer in found)
    if not close(value, whole.value):
        yield (
            f"parts that add up: {PARTS} parts give {value}, and the whole {whole.value}; reduce with "
            f"batch.mean, batch.sum or batch.datum_mean, which divide by the whole's totals"
        )
    for i, (path, want) in enumerate(zip(term.paths(), whole.gradient, strict=True)):
        own = [answer.gradient[i] for answer in found]
        got = np.concatenate(own)[: len(want)] if of_tokens else sum(own[1:], start=own[0])
        if not np.allclose(got, want, rtol=1e-4, atol=1e-5 * float(np.max(np.abs(want), initial=1e-30))):
            at = f" at {path!r}" if path else ""
            yield f"parts that add up: the gradient of the parts{at} is not the whole's"
    yield from _metrics(term, whole, found)


def _metrics(term: Subject, whole: Answer, found: list[Answer]) -> Iterator[str]:
    kinds = kinds_of(term.fn)
    added: dict[str, Array] = {}
    for name in whole.metrics:
        if kinds.get(name) in KINDS:
            first, *others = (jnp.asarray(answer.metrics[name]) for answer in found)
            for other in others:
                first = merged(first, other, kinds[name])
            added[name] = first
    for name, metric in jax.tree.map(float, whole_metrics(added, kinds)).items():
        if name in whole.metrics and not close(metric, whole.metrics[name]):
            yield (
                f"parts that add up: the metric {name!r} is of kind {kinds[name]!r}, by which the parts give "
                f"{metric}, and the whole {whole.metrics[name]}"
            )


def _without_x(part: TokenBatch) -> Any:
    arrays = {name: array for name, array in part.arrays.items() if name != X}
    return part.replace(arrays=arrays)
