"""What a term is: the whole contract in one file.

A **term** is a pure function of the differentiated value and the batch::

    def term(x, batch):            # -> scalar, or (scalar, {metric name: scalar})
        ...

It may ask for more with keyword-only arguments of these names, and gets nothing it did not ask for:

- ``key``: its own random key, the ``key=`` of the call folded with the CRC-32 of the term's name;
- ``state``: its own state from the last step. Such a term is an object with an ``init()`` method that
  gives the first state, and returns ``(value, metrics, next_state)``. With a method ``remember(state, *,
  value, metrics, params)`` it returns ``(value, metrics)``, and the next state is what that gives, once a
  step and of the whole batch, in however many parts it came;
- ``params``: what the objective is a function of, without a gradient: the params, of one with a ``forward``.

A term that is meaningful on parameters only (weight decay) says so with an attribute ``place = "params"``,
which is then the default of its spec's ``on``.

What becomes of a term where the batch is a part of one, it says with an attribute ``additive``, or its spec
does; and of its metrics, with an attribute ``metric_kinds``, from their names to ``"sum"``, ``"max"``,
``"min"``, ``"root"`` (of the sum of squares), ``"same"`` or ``("exp", name)``, exp of another one.

A term that holds arrays (a starting point, a Fisher diagonal) is a registered pytree: its arrays then
travel with the objective as arguments of the compiled program and are never baked into it.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.numbers import widened
from jaxreg.base.types import Array, ArrayLike, Place, PyTree, Schedule, TermFn
from jaxreg.core.notes import add_place

NUMERIC = (jax.Array, np.ndarray, np.generic, float, int, complex)
Additive: TypeAlias = bool | Literal["same", "approximate"]
OPTIONAL_ARGUMENTS = ("key", "state", "params")
RESERVED_METRICS = ("value", "weight", "contribution", "grad_norm", "grad_norm_weighted")
BASE = "base_loss"
TOTAL = "loss_total"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegularizerSpec:
    """One named, weighted term of an objective.

    Args:
      name: unique in its objective; it names the term in every report. Printable, without ``/`` and
        ``:`` (they separate the parts of the flat metric names).
      fn: the term, ``fn(x, batch) -> value`` or ``(value, metrics)``; it may ask for ``key`` and ``state``.
      weight: a finite number ≥ 0, a scalar array, or a schedule ``step -> weight`` such as optax's.
        Where a schedule goes below 0 by more than rounding (1e-6), the term's weight is NaN, and the
        output names it among what is not finite.
      on: what ``x`` is, when the objective has a ``forward``: what the model produced
        (``"outputs"``) or what the optimizer moves (``"params"``). **None**: the term's own place, which is
        ``"params"`` for those on parameters (`WeightL2`, ...), else ``"outputs"``. Without ``forward`` every
        term gets x, and only terms on parameters may say ``"params"``.

      additive: what becomes of the term where the batch is a part of one (micro-batches, shards, several
        requests). True: the parts' values add up to the whole's, as those of sums do, and of
        ``batch.mean``, which divides by the whole's totals. ``"same"``: it reads no batch, so each part has
        the whole's, and counts for its share of the datums. ``"approximate"``: the parts' own values,
        weighted by their datums, marked in ``out.approximate``. False: a part is refused. **None**: what the
        term says itself (its attribute ``additive``), and where it says nothing, a part is refused.

    Raises:
      TypeError, ValueError: naming the term, when any of these is not so.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> spec = jr.RegularizerSpec(name="l1", fn=lambda x, batch: jnp.abs(x).sum(), weight=0.01)
      >>> spec.name, spec.weight, spec.on
      ('l1', 0.01, 'outputs')
    """

    name: str
    fn: TermFn
    weight: ArrayLike | Schedule
    on: Place | None = None
    additive: Additive | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        check_term(self.fn, f"term {self.name!r}")
        if not callable(self.weight):
            check_weight(self.weight, self.name)
        if self.on not in (None, "outputs", "params"):
            raise ValueError(f"term {self.name!r}: on must be 'outputs' or 'params', got {self.on!r}")
        check_additive(self.additive, f"term {self.name!r}")
        own = own_place(self.fn)
        if self.on == "outputs" and own == "params":
            raise ValueError(
                f"term {self.name!r}: {type(self.fn).__name__} is a term on parameters and means nothing "
                f"on outputs: leave on= out, or say on='params'; outputs have their own (L1, L2, ...)"
            )
        object.__setattr__(self, "on", self.on or own)


class MakesSpec(Protocol):
    """A term that is more than a spec, such as a `jaxreg.host.HostRegularizer`."""

    def as_spec(self) -> RegularizerSpec:
        """The term as the objective takes it."""


Regularizer: TypeAlias = RegularizerSpec | Mapping[str, Any] | MakesSpec


def as_spec(spec: Regularizer) -> RegularizerSpec:
    """The spec itself, what a host term makes of itself, or a mapping's with fn, weight, name (and on)."""
    if isinstance(spec, RegularizerSpec):
        return spec
    make = getattr(spec, "as_spec", None)
    if callable(make):
        return cast(RegularizerSpec, make())
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"a regularizer is a RegularizerSpec or a mapping with the keys fn, weight and name; "
            f"got {type(spec).__name__}"
        )
    optional = {"on", "additive"}
    fields = {"name", "fn", "weight"} | optional
    missing, unknown = fields - optional - set(spec), set(spec) - fields
    if missing or unknown:
        raise ValueError(
            f"regularizer {spec.get('name', '(no name)')!r}: "
            + "; ".join(
                f"{what} {sorted(map(str, keys))}"
                for what, keys in (("missing", missing), ("unknown", unknown))
                if keys
            )
            + f"; a mapping has the keys {sorted(fields)}, of which 'on' and 'additive' may be left out"
        )
    return RegularizerSpec(**spec)


def check_additive(additive: object, who: str) -> None:
    """Refuse what says nothing about the parts of a batch."""
    if not (additive is None or isinstance(additive, bool) or additive in ("same", "approximate")):
        raise ValueError(f"{who}: additive is True, False, 'same' or 'approximate', got {additive!r}")


def check_name(name: object) -> None:
    """Refuse a name that could not stand in the flat metric names."""
    if not isinstance(name, str):
        raise TypeError(f"a term's name is a string, got {name!r} ({type(name).__name__})")
    if not name.strip() or name != name.strip():
        raise ValueError(f"a term's name is not empty and has no space around it, got {name!r}")
    if not name.isprintable() or "/" in name or ":" in name:
        raise ValueError(
            f"term {name!r}: a name has no '/', ':' or unprintable character, since it would collide "
            f"in the flat names (reg/<name>/value); try {_plain(name)!r}"
        )
    if name in (BASE, TOTAL):
        raise ValueError(f"term {name!r}: this name means something else in the reports; choose another")


def check_weight(weight: Any, name: str) -> None:
    """Refuse a weight that is no finite scalar ≥ 0. A traced weight shows its shape and dtype only."""
    who = f"term {name!r}"
    if isinstance(weight, bool) or not isinstance(weight, NUMERIC):
        raise TypeError(
            f"{who}: a weight is a real number, a scalar array or a schedule (step -> weight), got {weight!r}"
        )
    shape, dtype = jnp.shape(weight), jnp.result_type(weight)
    if shape != ():
        raise ValueError(f"{who}: a weight is a scalar, got an array of shape {shape}")
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{who}: a weight is a real number, got dtype {dtype}")
    if isinstance(weight, jax.core.Tracer):
        return
    with np.errstate(over="ignore"):
        number = float(np.asarray(weight, jnp.result_type(float)))  # as the program will see it
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"{who}: a weight is finite (in {jnp.result_type(float)}) and ≥ 0, got {weight}"
            + ("; to reward what the term measures, negate its value in fn" if number < 0 else "")
        )


def check_term(fn: object, who: str) -> None:
    """Refuse what cannot be called as ``fn(x, batch, *, key=..., state=...)`` or cannot be hashed."""
    if not callable(fn):
        raise TypeError(f"{who}: fn is a function of (x, batch), got {type(fn).__name__}")
    if inspect.isclass(fn):
        raise TypeError(f"{who}: fn is the class itself; make a term of it: {fn.__name__}(...)")
    split_arrays(fn, who)
    check_order(fn, who, "params" if who == "forward" else "x")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # A builtin without a signature: the first trace will tell.
    for name in ("key", "state"):  # the first argument may well be called params
        if name in signature.parameters and name not in requested_arguments(fn):
            raise TypeError(
                f"{who}: it takes {name!r} by position, and would never get it; make it keyword-only: "
                f"fn(x, batch, *, {name})"
            )
    asked = requested_arguments(fn)
    try:
        signature.bind(object(), object(), **dict.fromkeys(asked))
    except TypeError as error:
        raise TypeError(
            f"{who}: fn is called as fn(x, batch), with key= or state= if it has keyword-only "
            f"arguments of these names; its signature {signature} does not fit ({error}). Bind other "
            f"arguments first, with functools.partial or a frozen dataclass"
        ) from None
    if "state" in asked and not callable(getattr(fn, "init", None)):
        raise TypeError(
            f"{who}: fn asks for state, so it must be an object with an init() method that gives the "
            f"first state"
        )


def check_order(fn: object, who: str, first: str) -> None:
    """Refuse a function whose arguments' names say that it takes the batch first."""
    try:
        names = list(inspect.signature(cast(Any, fn)).parameters)[:2]
    except (TypeError, ValueError):
        return
    if names[:1] == ["batch"] and names[1:] and names[1] in ("x", "params", "outputs", "logits", "logprobs"):
        raise ValueError(
            f"{who}: it is called with ({first}, batch), but takes ({', '.join(names)}): swap them"
        )


def own_place(fn: object) -> Place:
    """Where a term says that it belongs: its attribute ``place``, **"outputs"** where it has none."""
    return "params" if getattr(fn, "place", None) == "params" else "outputs"


def requested_arguments(fn: TermFn) -> tuple[str, ...]:
    """Those of ``key``, ``state`` and ``params`` that fn takes by keyword only."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return ()
    return tuple(
        name
        for name in OPTIONAL_ARGUMENTS
        if name in parameters and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    )


def remembers(fn: TermFn) -> bool:
    """Whether the term's next state is made of the whole step, and not by its call."""
    return callable(getattr(fn, "remember", None))


def has_default(fn: TermFn, argument: str) -> bool:
    """Whether fn can do without one of the arguments that it asks for."""
    return inspect.signature(fn).parameters[argument].default is not inspect.Parameter.empty


class _Hole(enum.Enum):
    ARRAY = "array"  # an enum's members stay themselves when they are pickled


_ARRAY = _Hole.ARRAY


@dataclasses.dataclass(frozen=True)
class StaticPart:
    """A callable without its arrays: hashable, and equal to that of an equal callable."""

    fn: Any  # the callable itself, or None where `treedef` rebuilds it
    treedef: Any = None
    others: tuple[Hashable, ...] = ()

    def with_arrays(self, arrays: tuple[Any, ...]) -> TermFn:
        """The callable, whole again."""
        if self.treedef is None:
            return self.fn
        rest = iter(arrays)
        leaves = [next(rest) if other is _ARRAY else other for other in self.others]
        return jax.tree.unflatten(self.treedef, leaves)

    def __reduce__(self) -> Any:
        # The callable with holes, not its treedef: that would not fit a later release's arguments.
        holey = self.fn if self.treedef is None else jax.tree.unflatten(self.treedef, self.others)
        return _static, (holey,)


def _static(holey: Any) -> StaticPart:
    """What `StaticPart` pickles, split again."""
    return split_arrays(holey, "a pickled objective")[0]


def split_arrays(fn: Any, who: str) -> tuple[StaticPart, tuple[Any, ...]]:
    """Part a callable into what is static and the arrays that it holds, if it is a pytree."""
    leaves, treedef = jax.tree.flatten(fn)
    if jax.tree_util.treedef_is_leaf(treedef):
        static, arrays = StaticPart(fn), ()
    else:
        is_array = [
            leaf is _ARRAY or isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves
        ]
        arrays = tuple(leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes)
        others = tuple(_ARRAY if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True))
        static = StaticPart(None, treedef, others)
    try:
        hash(static)
    except TypeError as error:
        raise TypeError(
            f"{who}: fn must be hashable, so that an equal objective finds its compiled program "
            f"({error}). Make it a frozen dataclass, and a registered pytree (flax.struct.dataclass, "
            f"jax.tree_util.register_dataclass, equinox.Module) if it holds arrays"
        ) from None
    return static, arrays


def call_term(
    fn: TermFn, x: PyTree, batch: PyTree, extra: Mapping[str, Any], who: str
) -> tuple[Array, dict[str, Array], PyTree]:
    """Run a term and check what it gave: its value, its metrics, and its next state (or None)."""
    try:
        result = fn(x, batch, **extra)
    except Exception as error:
        add_place(error, f"the {who} of the objective", x=x, batch=batch)
        raise
    stateful = "state" in extra and not remembers(fn)
    contract = "(value, metrics, next_state)" if stateful else "value or (value, metrics)"
    metrics: Any = {}
    state = None
    if stateful:
        if not (isinstance(result, tuple) and len(result) == 3):
            raise TypeError(f"{who}: it asks for state, so it returns {contract}; got {_kind(result)}")
        value, metrics, state = result
    elif isinstance(result, tuple):
        if len(result) != 2:
            raise TypeError(f"{who}: a term returns {contract}, got a tuple of {len(result)}")
        value, metrics = result
    else:
        value = result
    return _checked_value(value, who, contract), _checked_metrics(metrics, who), state


def _checked_value(value: Any, who: str, contract: str) -> Array:
    if not isinstance(value, NUMERIC):
        raise TypeError(f"{who}: a term returns {contract}, got {_kind(value)}")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{who}: a term's value is a scalar, got shape {jnp.shape(value)}; reduce it, with "
            f"batch.mean(...), batch.sum(...) or batch.datum_mean(...) for token data"
        )
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{who}: a term's value is a real floating-point number, got dtype {dtype}, which has no gradient"
            + ("; take jnp.abs or jnp.real of it" if jnp.issubdtype(dtype, jnp.complexfloating) else "")
        )
    return widened(value)


def _checked_metrics(metrics: Any, who: str) -> dict[str, Array]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{who}: metrics are a mapping from name to scalar, got {_kind(metrics)}")
    checked = {}
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{who}: a metric's name is a string that is not empty, got {name!r}")
        if name in RESERVED_METRICS:
            raise ValueError(
                f"{who}: the metric {name!r} would collide with jaxreg's own reg/<name>/{name}; rename it"
            )
        if not isinstance(metric, NUMERIC):
            raise TypeError(f"{who}: metric {name!r} is a scalar, got {_kind(metric)}")
        shape, dtype = jnp.shape(metric), jnp.result_type(metric)
        if shape != ():
            raise ValueError(f"{who}: metric {name!r} is a scalar, got shape {shape}")
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{who}: metric {name!r} is a real number, got dtype {dtype}")
        checked[name] = jax.lax.stop_gradient(widened(metric))
    return checked


def _kind(value: Any) -> str:
    return "None (is a return missing?)" if value is None else type(value).__name__


def _plain(name: str) -> str:
    return "".join("_" if c in "/:" or not c.isprintable() else c for c in name)
