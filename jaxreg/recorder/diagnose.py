"""Where a step went wrong: which term, which datum, which token, in the order in which numbers flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.paths import leaf_paths
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.core.bind import bind_forward, bind_terms
from jaxreg.core.plan import who
from jaxreg.core.weights import weights_at
from jaxreg.events.log import Inputs
from jaxreg.host.part import part


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One place where a number is not finite.

    Attributes:
      where: ``"x"``, ``"batch"``, ``"outputs"``, or of a term ``"weight"`` (a schedule that is negative
        makes it NaN), ``"value"`` or ``"gradient"``.
      term: the term's name, ``"base_loss"``, or None before any term.
      name: which array of the batch or of x, or "".
      datum: its number, or None where no datum alone is to blame, or data has no datums.
      at: the index in the datum's array (or in the whole array), the token first; None for a value.
      number: what stands there.
    """

    where: str
    term: str | None
    name: str
    datum: int | None
    at: tuple[int, ...] | None
    number: float

    def __str__(self) -> str:
        what = {
            "x": "what is differentiated",
            "batch": "the data",
            "outputs": "what forward returns",
            "weight": "the weight",
            "value": "the value",
            "gradient": "the gradient",
        }[self.where]
        of = "" if self.term is None else f" of the {who(self.term)}"
        name = f" {self.name!r}" if self.name else ""
        place = ""
        if self.datum is not None:
            place = f", datum {self.datum}"
            if self.at:
                place += f", token {self.at[0]}" + (f", {list(self.at[1:])}" if self.at[1:] else "")
        elif self.at is not None:
            place = f", at {list(self.at)}"
        return f"{what}{of}{name}{place}: {self.number}"


def diagnose(inputs: Inputs) -> list[Finding]:
    """Everything of a step that is not finite, the first cause first; empty where all is well.

    It looks at the data and at what is differentiated (where −inf is left out: a logprob may be it), at
    what the model returns, and at every term's value and gradient, the base loss first. Where only a
    value is not finite, each datum of a `TokenBatch` is evaluated alone. Host terms are left out. It
    compiles a program a term, so it is for afterwards.

    Args:
      inputs: what the step was computed from.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(lambda x, batch: -batch.mean(x), [
      ...     dict(name="log", fn=lambda x, batch: batch.mean(jnp.log(batch["p"])), weight=0.1)])
      >>> batch = jr.TokenBatch.pack([{"p": [0.5, 0.5]}, {"p": [0.5, -0.5, 0.5]}])
      >>> for finding in jr.telemetry.diagnose(jr.telemetry.Inputs(objective, jnp.zeros(batch.shape), batch)):
      ...     print(finding)
      the value of the term 'log', datum 1: nan
    """
    return list(_findings(inputs))


def _findings(inputs: Inputs) -> Iterator[Finding]:
    objective, _ = part(inputs.objective)
    plan, leaves, batch = objective.plan, objective.leaves, inputs.batch
    x = as_arrays(inputs.x, batch)
    yield from _in_tree("batch", _named(batch), batch)
    yield from _in_tree("x", x, batch, infinite=False)
    outputs = x
    if (forward := bind_forward(plan, leaves, batch, inputs.key)) is not None:
        outputs, _ = jax.jit(forward)(x)
        yield from _in_tree("outputs", outputs, batch, infinite=False)
    weights = jax.jit(lambda leaves, state: weights_at(plan, leaves, state)[1:])(leaves, inputs.state)
    for name, weight in zip(objective.names, weights, strict=True):
        if not np.isfinite(weight):
            yield Finding("weight", name, "", None, None, float(weight))
    for i, name in enumerate(plan.names):
        at = x if plan.places[i] == "params" else outputs
        value_of = _value_of(plan, leaves, i, inputs.state, inputs.key, x)
        value, slope = _value_and_slope(value_of, at, batch)
        if not np.isfinite(value):
            guilty = _guilty_datums(value_of, at, batch) if plan.places[i] != "params" else []
            for datum in guilty or [None]:
                yield Finding("value", name, "", datum, None, float(value))
        yield from _in_tree("gradient", slope, batch, term=name)


@jax.jit
def _value_and_slope(value_of: Callable[[PyTree, PyTree], Array], x: PyTree, batch: PyTree) -> Any:
    return jax.value_and_grad(value_of)(x, batch)


def as_arrays(x: PyTree, batch: PyTree) -> PyTree:
    """What is differentiated, padded as the batch is where it came as one array a datum."""
    if not (isinstance(x, list) and isinstance(batch, TokenBatch)):
        return x
    lengths = [int(n) for n in np.asarray(batch.lengths) if n]
    if not all(isinstance(values, np.ndarray) for values in x) or [len(v) for v in x] != lengths:
        raise ValueError("x is not one array a datum, of the datum's length")
    return batch.repack(x)


def _value_of(
    plan: Any, leaves: Any, i: int, state: PyTree, key: Array | None, params: PyTree
) -> Callable[[PyTree, PyTree], Array]:
    def value(state: PyTree, x: PyTree, batch: PyTree) -> Array:
        return bind_terms(plan, leaves, batch, state, key, params)[i].fn(x)[0]

    return jax.tree_util.Partial(value, state)  # traced with the rest, as the step traces it


def _guilty_datums(value_of: Callable[[PyTree, PyTree], Array], x: PyTree, batch: PyTree) -> list[Any]:
    """The datums of which each alone, all others masked, makes the value what it is."""
    if not isinstance(batch, TokenBatch):
        return []
    rows = np.flatnonzero(np.asarray(batch.lengths))
    numbers = jnp.arange(batch.datums)

    @jax.jit
    def alone(row: Array) -> Array:
        here = batch.spread(numbers == row)
        weights = jnp.asarray(batch.weights)
        kept = here if weights.ndim == 2 else here[..., None]
        single = batch.replace(
            mask=batch.mask & here,
            weights=jnp.where(kept, weights, 0),
            lengths=batch.lengths * (numbers == row),
            totals=batch.totals,  # a share of the whole is as finite
        )
        return value_of(x, single)

    guilty = [datum for datum, row in enumerate(rows) if not np.isfinite(alone(row))]
    return guilty if len(guilty) < len(rows) or len(rows) == 1 else []


def _in_tree(
    where: str, tree: PyTree, batch: PyTree, *, term: str | None = None, infinite: bool = True
) -> Iterator[Finding]:
    """The first number of each leaf that is not finite; with ``infinite=False``, −inf is."""
    for name, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        array = np.asarray(leaf, np.float64)
        bad = ~np.isfinite(array) if infinite else ~np.isfinite(array) & ~np.isneginf(array)
        by_datum = (
            isinstance(batch, TokenBatch) and array.ndim > 0 and array.shape[:2] == batch.shape[: array.ndim]
        )
        for datum, (numbers, wrong) in enumerate(
            zip(batch.unpack(array), batch.unpack(bad), strict=True) if by_datum else [(array, bad)]
        ):
            if wrong.any():
                at = tuple(int(i) for i in np.argwhere(wrong)[0]) if np.ndim(wrong) else None
                number = float(numbers[at] if at is not None else numbers)
                yield Finding(where, term, name, datum if by_datum else None, at, number)


def _named(batch: PyTree) -> PyTree:
    """The arrays of a batch by their own names."""
    if not isinstance(batch, TokenBatch):
        return batch
    return {**batch.arrays, "weights": batch.weights}
