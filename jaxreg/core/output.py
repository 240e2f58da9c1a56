"""What comes back: one record a term, and the schema that every tracker and language reads."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.struct
import jax
import numpy as np

from jaxreg.base import html
from jaxreg.base.shown import columns, never_fails
from jaxreg.base.types import Array, PyTree
from jaxreg.core.conflicts import Conflict, conflicts_of, host_cosines
from jaxreg.core.gramian import cosines
from jaxreg.core.shown import output_rows, output_title, term_text, text_columns
from jaxreg.core.spec import BASE, RESERVED_METRICS, TOTAL


@flax.struct.dataclass
class BaseLossOutput:
    """What the base loss did.

    Attributes:
      value: its scalar.
      grad_norm: L2 norm of d(value)/d(x), or None where norms are not tracked.
      custom: its own metrics.
      grad_norm_per_datum: [B], with ``GradNorms(per_datum=True)``.
      grad_abs_max: the largest magnitude in d(value)/d(x), with ``GradNorms(absolutes=True)``.
      grad_abs_mean: the mean magnitude in d(value)/d(x), with ``GradNorms(absolutes=True)``.
    """

    value: Array
    grad_norm: Array | None = None
    custom: dict[str, Array] = flax.struct.field(default_factory=dict)
    grad_norm_per_datum: Array | None = None
    grad_abs_max: Array | None = None
    grad_abs_mean: Array | None = None

    __repr__ = never_fails(term_text)


@flax.struct.dataclass
class RegularizerOutput:
    """What one regularizer did.

    Attributes:
      name: the term's name.
      value: its own scalar, unweighted.
      weight: the weight of this step.
      contribution: ``weight · value``, what it adds to the total.
      grad_norm: L2 norm of d(value)/d(x), unweighted, or None where norms are not tracked.
      grad_norm_weighted: ``weight · grad_norm``.
      custom: its own metrics.
      grad_norm_per_datum: [B], unweighted, with ``GradNorms(per_datum=True)``.
      grad_abs_max: the largest magnitude in d(value)/d(x), unweighted, with ``GradNorms(absolutes=True)``.
      grad_abs_mean: the mean magnitude in d(value)/d(x), unweighted, with ``GradNorms(absolutes=True)``.
    """

    name: str = flax.struct.field(pytree_node=False)
    value: Array
    weight: Array
    contribution: Array
    grad_norm: Array | None = None
    grad_norm_weighted: Array | None = None
    custom: dict[str, Array] = flax.struct.field(default_factory=dict)
    grad_norm_per_datum: Array | None = None
    grad_abs_max: Array | None = None
    grad_abs_mean: Array | None = None

    __repr__ = never_fails(term_text)


@flax.struct.dataclass
class AggregationOutput:
    """What the aggregator of an objective did.

    Attributes:
      coefficients: name -> what the term's weighted gradient was multiplied by, of the terms that are
        combined, the base loss (``"base_loss"``) first.
      metrics: the aggregator's own numbers, such as the residual of its program (``"kkt_residual"``).
    """

    coefficients: dict[str, Array]
    metrics: dict[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class CustomLossOutput:
    """What the objective did: a pytree of arrays, so it passes through jit, vmap and scan.

    Attributes:
      loss_total: ``base + Σ weightᵢ·valueᵢ``.
      base_loss: a `BaseLossOutput`.
      regularizers: name -> `RegularizerOutput`, in the order of the objective; a name that it does not have
        is a KeyError with the nearest one.
      regularizer_total: ``Σ weightᵢ·valueᵢ``.
      total_grad_norm: L2 norm of the whole objective's gradient in the tracked space, or None.
      state: the state for the next step. Empty where nothing needs one, and of a part of a batch where rules
        or terms that remember go by the whole's numbers: `accumulate` and `merge_outputs` give it.
      aux: what ``forward`` returned beside its outputs, with ``compose(..., has_aux=True)``, or None.
      gramian: [K, K], the inner products of the terms' weighted gradients in the tracked space, the base loss
        first, with ``GradNorms(gramian=True)`` or an aggregator, or None.
      norms_age: int32, how many steps ago the norms were measured, with ``GradNorms(every=n)``; None where
        every step's are its own.
      aggregation: an `AggregationOutput`, what the aggregator did; None without one.
      approximate: the terms whose part of a batch is no share of the whole's value, which is ``additive=
        "approximate"`` in their spec (static).
      gramian_terms: the terms that the rows of ``gramian`` belong to (static).

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> base = lambda x, batch: -jnp.sum(x)
      >>> objective = jr.compose(base, [dict(name="l2", fn=lambda x, b: jnp.sum(x**2), weight=0.5)])
      >>> _, out = objective(jnp.array([3.0, 4.0]))
      >>> out.regularizers["l2"].contribution.item()
      12.5
      >>> out.to_dict()["loss_total"]
      5.5
      >>> sorted(out.to_flat_dict())[:3]
      ['loss/base', 'loss/regularizer_total', 'loss/total']
      >>> out  # in a notebook, the same as a table
      CustomLossOutput
        term       value  weight  contribution
        base loss     -7                    -7
        l2            25     0.5          12.5
        total                              5.5
    """

    loss_total: Array
    base_loss: BaseLossOutput
    regularizers: OrderedDict[str, RegularizerOutput]
    regularizer_total: Array
    total_grad_norm: Array | None = None
    state: PyTree = flax.struct.field(default_factory=dict)
    aux: PyTree = None
    gramian: Array | None = None
    norms_age: Array | None = None
    aggregation: AggregationOutput | None = None
    gramian_terms: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    approximate: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def cosines(self) -> Array:
        """[K, K]: the cosines of the angles between the terms' weighted gradients, of ``gramian_terms``.

        −1 where two pull against each other, 0 beside a gradient that is 0 (a term at weight 0). It may be
        traced.

        Raises:
          ValueError: the output has no Gramian.
        """
        return cosines(self._gramian())

    def conflicts(self, below: float = 0.0) -> list[Conflict]:
        """The pairs of terms whose gradients' cosine is less than ``below``, the worst first.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> objective = jr.compose(
          ...     lambda x, batch: jnp.sum(x),
          ...     [dict(name="l2", fn=lambda x, batch: jnp.sum(x**2) / 2, weight=1.0)],
          ...     track_grad_norms=jr.GradNorms(gramian=True))
          >>> (_, out), _ = objective.value_and_grad(jnp.array([-1.0, -1.0]))
          >>> out.conflicts()
          [Conflict(first='base_loss', second='l2', cosine=-1.0)]

        Raises:
          ValueError: the output has no Gramian.
          TypeError: it is traced, so there are no numbers yet.
        """
        return conflicts_of(self.gramian_terms, self._gramian(), below)

    def _gramian(self) -> Array:
        if self.gramian is None:
            raise ValueError(
                "this output has no Gramian: compose with track_grad_norms=GradNorms(gramian=True), or with "
                "an aggregator, and call objective.value_and_grad(...)"
            )
        return self.gramian

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for JSON: floats, None where there is no number, names in order.

        Numbers that are not finite become None; the names of the terms that made them are then
        listed under ``"nonfinite"`` (``"base_loss"`` for the base loss, ``"loss_total"`` where only a
        sum overflowed). ``"cosines"`` (by the first term of a pair, then by the second), ``"norms_age"``,
        ``"aggregation"`` and ``"approximate"`` (names of terms) are there only where the step has them.

        Raises:
          ValueError: the output holds more than one step (it went through vmap or scan).
        """
        host = self.on_host()
        nonfinite = _nonfinite(host)
        return _nested(host, _number) | ({"nonfinite": nonfinite} if nonfinite else {})

    def to_flat_dict(self) -> dict[str, float]:
        """Flat metric names to floats, for trackers; a norm that is not tracked is left out.

        ``loss/total``, ``loss/base``, ``loss/regularizer_total``, ``grad_norm/total``,
        ``grad_norm/base``, ``loss/base/<metric>``, and for each term ``reg/<name>/value``,
        ``…/weight``, ``…/contribution``, ``…/grad_norm``, ``…/grad_norm_weighted`` and
        ``…/<metric>``. With a Gramian also ``cosine/<term>/<term>``, a pair in the order of the terms; with
        norms now and then ``norms/age``; with an aggregator ``aggregation/coefficient/<term>`` and
        ``aggregation/<metric>``. Numbers that are not finite stay as they are.
        """
        numbers = flat(_nested(self.on_host(), lambda number: number))
        return {name: number for name, number in numbers.items() if number is not None}

    def on_host(self) -> CustomLossOutput:
        """The same with floats for scalars and NumPy arrays for others, and without state and aux.

        It waits for the device, once.
        """
        if isinstance(cast(Any, self.loss_total), float):
            return self
        # State and aux may be as large as the model, and are no metrics: they stay where they are.
        leaves, structure = jax.tree.flatten(self.replace(state={}, aux=None))  # type: ignore[attr-defined]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise TypeError(
                "to_dict() and to_flat_dict() read numbers, which do not exist while JAX traces; "
                "return the output from the jitted function and call them outside"
            )
        if np.ndim(self.loss_total) != 0:
            raise ValueError(
                f"this output holds {np.shape(self.loss_total)} steps (it went through vmap or "
                f"scan); take one first: jax.tree.map(lambda a: a[i], out)"
            )
        return jax.tree.unflatten(structure, [_plain(leaf) for leaf in _copied(leaves)])

    @never_fails
    def __repr__(self) -> str:
        rows = output_rows(self)
        return f"{output_title(self)}\n{columns(rows, left=text_columns(rows))}"

    @never_fails
    def _repr_html_(self) -> str:
        rows = output_rows(self)
        return html.table(output_title(self), rows, left=text_columns(rows))


def _nested(host: CustomLossOutput, number: Callable[[Any], float | None]) -> dict[str, Any]:
    """The schema, with every number as ``number`` makes it."""
    base = host.base_loss
    return {
        "loss_total": number(host.loss_total),
        "base_loss": {
            "value": number(base.value),
            "grad_norm": number(base.grad_norm),
            "custom": {name: number(metric) for name, metric in base.custom.items()},
        },
        "regularizers": {
            name: {
                "name": name,
                **{key: number(getattr(term, key)) for key in RESERVED_METRICS},
                "custom": {key: number(metric) for key, metric in term.custom.items()},
            }
            for name, term in host.regularizers.items()
        },
        "regularizer_total": number(host.regularizer_total),
        "total_grad_norm": number(host.total_grad_norm),
        **_nested_rest(host, number),
    }


def _nested_rest(host: CustomLossOutput, number: Callable[[Any], float | None]) -> dict[str, Any]:
    """What only some steps have."""
    rest: dict[str, Any] = {}
    if host.approximate:
        rest["approximate"] = list(host.approximate)
    if host.gramian is not None:
        names, values = host.gramian_terms, host_cosines(host.gramian)
        rest["cosines"] = {
            first: {names[j]: number(values[i, j].item()) for j in range(i + 1, len(names))}
            for i, first in enumerate(names[:-1])
        }
    if host.norms_age is not None:
        rest["norms_age"] = number(host.norms_age)
    if host.aggregation is not None:
        rest["aggregation"] = {
            "coefficients": {name: number(own) for name, own in host.aggregation.coefficients.items()},
            "metrics": {name: number(own) for name, own in host.aggregation.metrics.items()},
        }
    return rest


def flat(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of ``to_dict()`` by the names of ``to_flat_dict()``; None where there is none.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> _, out = jr.compose(lambda x, batch: jnp.sum(x))(jnp.ones(3))
      >>> flat(out.to_dict())["loss/total"], flat(out.to_dict())["grad_norm/total"]
      (3.0, None)
    """
    base = report["base_loss"]
    numbers = {
        "loss/total": report["loss_total"],
        "loss/base": base["value"],
        "loss/regularizer_total": report["regularizer_total"],
        "grad_norm/total": report["total_grad_norm"],
        "grad_norm/base": base["grad_norm"],
    }
    numbers |= {f"loss/base/{name}": metric for name, metric in base["custom"].items()}
    for name, term in report["regularizers"].items():
        numbers |= {f"reg/{name}/{key}": term[key] for key in RESERVED_METRICS}
        numbers |= {f"reg/{name}/{key}": metric for key, metric in term["custom"].items()}
    for first, others in report.get("cosines", {}).items():
        numbers |= {f"cosine/{first}/{second}": cosine for second, cosine in others.items()}
    if "norms_age" in report:
        numbers["norms/age"] = report["norms_age"]
    if aggregation := report.get("aggregation"):
        numbers |= {f"aggregation/coefficient/{n}": own for n, own in aggregation["coefficients"].items()}
        numbers |= {f"aggregation/{n}": own for n, own in aggregation["metrics"].items()}
    return numbers


def _copied(leaves: list[Any]) -> list[Any]:
    """The leaves, all on their way to the host where they are elsewhere: one wait in place of a hundred."""
    first = leaves[0]
    if isinstance(first, jax.Array) and next(iter(first.devices())).platform != "cpu":
        for leaf in leaves:
            leaf.copy_to_host_async()
    return leaves


def _plain(leaf: Any) -> float | np.ndarray:
    array = np.asarray(leaf)
    return array if array.ndim else float(array.item())


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _nonfinite(host: CustomLossOutput) -> list[str]:
    """Names of the terms with a number that is not finite; 'loss_total' if only a sum overflowed."""
    named: dict[str, BaseLossOutput | RegularizerOutput] = {BASE: host.base_loss} | dict(host.regularizers)
    names = [name for name, term in named.items() if not all(map(_is_finite, _numbers(term)))]
    if host.gramian is not None:
        squares = zip(host.gramian_terms, np.diagonal(host.gramian), strict=True)
        known = set(names) | {name for name, square in squares if not np.isfinite(square)}
        names = [name for name in named if name in known]
    totals = (host.loss_total, host.regularizer_total, host.total_grad_norm)
    if not names and not all(map(_is_finite, totals)):
        names.append(TOTAL)
    return names


def _numbers(term: BaseLossOutput | RegularizerOutput) -> list[Any]:
    """Everything that a term reported, without the price of flattening a pytree."""
    fields = [value for name, value in vars(term).items() if name not in ("name", "custom")]
    return [*fields, *term.custom.values()]


def _is_finite(value: Any) -> bool:
    if value is None:
        return True
    return math.isfinite(value) if isinstance(value, float) else bool(np.isfinite(value).all())
