"""Terms in, one pure function out."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from jaxreg.gradients import Differentiated, GradNorms, Norms, differentiate, evaluate, weighted
from jaxreg.output import BaseLossOutput, CustomLossOutput, RegularizerOutput
from jaxreg.spec import (
    BASE,
    Array,
    ArrayLike,
    Place,
    PyTree,
    RegularizerSpec,
    Schedule,
    StaticPart,
    TermFn,
    as_spec,
    call_term,
    check_term,
    check_weight,
    has_default,
    requested_arguments,
    split_arrays,
)


def compose(
    loss_fn: TermFn,
    regularizers: Iterable[RegularizerSpec | Mapping[str, Any]] = (),
    *,
    forward: Callable[..., PyTree] | None = None,
    track_grad_norms: bool | GradNorms = False,
) -> CompositeLoss:
    """Compose one base loss and any number of weighted terms into one objective.

    ``loss_total = base + Σ weightᵢ·valueᵢ``.

    Args:
      loss_fn: the base loss, ``fn(x, batch) -> value`` or ``(value, metrics)``.
      regularizers: `RegularizerSpec`s, or mappings with the keys ``fn``, ``weight`` and ``name``.
      forward: the model, ``forward(params, batch) -> outputs``; the objective then takes params, the
        base loss and the terms on ``"outputs"`` get the outputs, those on ``"params"`` the params. It
        may take ``key`` by keyword, for dropout.
      track_grad_norms: True for the L2 norm of every term's gradient with respect to the argument
        that is differentiated, or a `GradNorms` that says more.

    Returns:
      A `CompositeLoss`: a pure function and a pytree, compiled when it is called eagerly.

    Raises:
      TypeError, ValueError: naming the term and the remedy.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> def nll(logprobs, batch):
      ...     return -jnp.mean(logprobs)
      >>> def l1(logprobs, batch):
      ...     return jnp.mean(jnp.abs(logprobs)), {"max": jnp.max(jnp.abs(logprobs))}
      >>> objective = jr.compose(
      ...     nll, [jr.RegularizerSpec(name="l1", fn=l1, weight=0.5)], track_grad_norms=True)
      >>> (loss, out), grads = objective.value_and_grad(jnp.array([-1.0, -3.0]))
      >>> loss.item(), out.regularizers["l1"].value.item(), grads.tolist()
      (3.0, 2.0, [-0.75, -0.75])
    """
    if not callable(loss_fn):
        raise TypeError(
            f"compose needs a base loss first, a function of (x, batch), then the regularizers; got "
            f"{'None' if loss_fn is None else type(loss_fn).__name__}"
        )
    check_term(loss_fn, "base loss")
    specs = tuple(as_spec(spec) for spec in _as_iterable(regularizers))
    _check_names(specs)
    norms = _as_grad_norms(track_grad_norms)
    _check_spaces(specs, forward, norms)

    parts, arrays = [], []
    names = [BASE, *(spec.name for spec in specs)]
    for name, fn in zip(names, [loss_fn, *(spec.fn for spec in specs)], strict=True):
        static, held = split_arrays(fn, _who(name))
        parts.append(static)
        arrays.append(held)
    model, model_arrays = (None, ()) if forward is None else split_arrays(forward, "forward")
    places: tuple[Place, ...] = ("outputs", *(spec.on for spec in specs))
    schedules = (None, *(s.weight if callable(s.weight) else None for s in specs))
    plan = _shared(Plan, tuple(names), tuple(parts), places, schedules, model, norms)
    return CompositeLoss(
        constants={s.name: _weight_leaf(0.0 if callable(s.weight) else s.weight) for s in specs},
        held={s.name: jnp.asarray(False) for s in specs if callable(s.weight)},
        arrays=(tuple(arrays), model_arrays),
        plan=plan,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of an objective that is not an array: equal plans share their compiled programs."""

    names: tuple[str, ...]  # the base loss first
    parts: tuple[StaticPart, ...]
    places: tuple[Place, ...]
    schedules: tuple[Schedule | None, ...]
    model: StaticPart | None
    norms: GradNorms | None

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self)))

    @functools.cached_property
    def programs(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The compiled call and value_and_grad.

        They belong to the plan, so that what terms and forward close over (frozen weights, say) is freed
        with the objective: the cache of a jit at the module's level would keep it for ever.
        """

        def call(parts: Any, *arguments: Any) -> Any:
            constants, held, arrays = parts
            return _call(CompositeLoss(constants, held, arrays, self), *arguments)

        def value_and_grad(parts: Any, *arguments: Any) -> Any:
            constants, held, arrays = parts
            return _value_and_grad(CompositeLoss(constants, held, arrays, self), *arguments)

        return jax.jit(call), jax.jit(value_and_grad)

    def __reduce__(self) -> Any:
        return _shared, (Plan, *(getattr(self, f.name) for f in dataclasses.fields(self)))

    def __hash__(self) -> int:
        return self._hash  # jit asks at every call

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan) or hash(self) != hash(other):
            return False
        return all(getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(self))


_PLANS: weakref.WeakKeyDictionary[Plan, weakref.ref[Plan]] = weakref.WeakKeyDictionary()


def _shared(make: type[Plan], *fields: Any) -> Plan:
    """The one plan among equal ones, which has the compiled programs."""
    plan = make(*fields)
    found = _PLANS.get(plan)
    known = None if found is None else found()
    if known is None:
        _PLANS[plan] = weakref.ref(plan)
        return plan
    return known


@flax.struct.dataclass(eq=False)  # hashed by identity, so that jax.jit(objective) works
class CompositeLoss:
    """An objective: ``base + Σ weightᵢ·valueᵢ`` as a pure function and a pytree.

    Made by `compose`. Its leaves are the weights and the arrays that its terms hold, so it can be an
    argument of a jitted function, and changing a weight compiles nothing. Called eagerly it compiles
    itself; inside ``jit``, ``grad``, ``vmap``, ``scan`` and ``jax.checkpoint`` it becomes a part of
    what is traced.

    Example:
      >>> import jax, jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(
      ...     lambda x, batch: jnp.sum(x),
      ...     [jr.RegularizerSpec(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=1.0)])
      >>> x = jnp.array([1.0, 2.0])
      >>> loss, out = objective(x)
      >>> (loss, out), grads = jax.value_and_grad(objective, has_aux=True)(x)
      >>> grads.tolist(), objective.only().value_and_grad(x)[1].tolist()
      ([3.0, 5.0], [1.0, 1.0])
    """

    constants: dict[str, Array]
    held: dict[str, Array]  # by scheduled term: whether its constant stands in for the schedule
    arrays: tuple[tuple[tuple[Any, ...], ...], tuple[Any, ...]]
    plan: Plan = flax.struct.field(pytree_node=False)

    def __call__(
        self, x: PyTree, batch: PyTree = None, *, state: PyTree = None, key: Array | None = None
    ) -> tuple[Array, CustomLossOutput]:
        """The total loss and every term's report, without gradients.

        Args:
          x: the differentiated value: logprobs, logits, any pytree of floating-point arrays; the
            params where the objective has a ``forward``.
          batch: whatever the terms read besides.
          state: ``objective.init()`` or the last step's ``out.state``; needed by schedules and
            stateful terms only.
          key: a random key; needed by terms that ask for one only.

        Returns:
          ``(loss_total, CustomLossOutput)``.
        """
        return self._run(0, x, batch, state or None, key)

    def value_and_grad(
        self, x: PyTree, batch: PyTree = None, *, state: PyTree = None, key: Array | None = None
    ) -> tuple[tuple[Array, CustomLossOutput], PyTree]:
        """The total loss, every term's report, and the gradient, from one compiled pass.

        Where norms are tracked the report has them. Arguments as for calling the objective.

        Returns:
          ``((loss_total, CustomLossOutput), gradient with the structure of x)``.
        """
        return self._run(1, x, batch, state or None, key)

    def init(self) -> PyTree:
        """The first state: what schedules and stateful terms carry from step to step.

        An empty dict where nothing needs one; else pass it as ``state=`` and carry ``out.state``.
        """
        terms = {
            name: jax.tree.map(_state_leaf, cast(Any, fn).init())
            for name, fn in zip(self.plan.names, self._fns(), strict=True)
            if "state" in requested_arguments(fn)
        }
        state: dict[str, Any] = {}
        if any(self.plan.schedules):
            state["step"] = jnp.zeros((), jnp.int32)
        if terms:
            state["terms"] = terms
        return state

    @property
    def names(self) -> tuple[str, ...]:
        """The regularizers' names, in order."""
        return self.plan.names[1:]

    def weights(self, state: PyTree = None) -> dict[str, Array]:
        """Every regularizer's weight by name; schedules are read at the state's step."""
        weights = zip(self.names, self._weights(state)[1:], strict=True)
        return {name: weight for name, weight in weights if weight is not None}

    def with_weights(self, weights: Mapping[str, ArrayLike]) -> CompositeLoss:
        """The same objective with other weights, running the program that is already compiled.

        A weight that follows a schedule becomes the constant given here.

        Raises:
          KeyError: a name that the objective does not have; the nearest one is suggested.
          TypeError, ValueError: a weight that is no finite scalar ≥ 0.
        """
        for name, weight in weights.items():
            self._check_known(name)
            if callable(weight):
                raise TypeError(
                    f"term {name!r}: with_weights takes numbers; a schedule is part of the program, "
                    f"so give it to compose"
                )
            check_weight(weight, name)
        return self.replace(  # type: ignore[attr-defined]
            constants=self.constants | {n: _weight_leaf(w) for n, w in weights.items()},
            held=self.held | {n: jnp.asarray(True) for n in weights if n in self.held},
        )

    def without(self, *names: str) -> CompositeLoss:
        """The same objective with these terms switched off, at weight 0: ``without("l1", "kl")``.

        They are still evaluated and reported, by the same compiled program, and add exactly nothing
        to the total: the cheapest ablation. To be rid of their cost too, compose without them. With
        norms tracked, the gradient of a term at weight 0 is left out though it be NaN; without them
        the gradient is that of the sum as it is written, where 0 · NaN is NaN.
        """
        return self.with_weights(dict.fromkeys(names, 0.0))

    def only(self, *names: str) -> CompositeLoss:
        """The same objective with every regularizer but these switched off."""
        for name in names:
            self._check_known(name)
        return self.without(*(name for name in self.names if name not in names))

    def __repr__(self) -> str:
        terms = "".join(
            f",\n  {name}: {_shown(self, name, schedule)}{' (on params)' if place == 'params' else ''}"
            for name, schedule, place in zip(
                self.names, self.plan.schedules[1:], self.plan.places[1:], strict=True
            )
        )
        return f"CompositeLoss(\n  base{terms}\n)"

    def _run(self, which: int, *arguments: Any) -> Any:
        """The compiled program, or its own body where somebody else is tracing already."""
        leaves = jax.tree.leaves((self, arguments))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return (_call, _value_and_grad)[which](self, *arguments)
        return self.plan.programs[which]((self.constants, self.held, self.arrays), *arguments)

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            near = difflib.get_close_matches(str(name), self.names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise KeyError(f"no term is named {name!r}; {hint}the terms are {list(self.names)}")

    def _fns(self) -> list[TermFn]:
        parts = zip(self.plan.parts, self.arrays[0], strict=True)
        return [part.with_arrays(arrays) for part, arrays in parts]

    def _weights(self, state: PyTree) -> list[Array | None]:
        weights: list[Array | None] = [None]
        for name, schedule in zip(self.names, self.plan.schedules[1:], strict=True):
            weight = self.constants[name]
            if schedule is not None:
                step = _step(state, name)
                try:
                    scheduled = jnp.asarray(schedule(step), weight.dtype)
                except Exception as error:
                    error.add_note(
                        f"This happened in the schedule of term {name!r}, whose step is traced: it takes "
                        f"jnp.where(step < n, a, b) where Python has `a if step < n else b`."
                    )
                    raise
                if scheduled.shape != ():
                    raise ValueError(
                        f"term {name!r}: its schedule gives shape {scheduled.shape}, not a scalar"
                    )
                # No weight is negative, but a linear schedule to 0 may end at -2e-8 by rounding.
                weight = jnp.where(self.held[name], weight, jnp.maximum(scheduled, 0))
            weights.append(weight)
        return weights


def _bind(
    objective: CompositeLoss, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[list[Differentiated], Callable[[PyTree], PyTree] | None]:
    """Close every term, and the model, over all but the value that is differentiated."""
    plan = objective.plan
    terms = []
    for name, fn, place, weight in zip(
        plan.names, objective._fns(), plan.places, objective._weights(state), strict=True
    ):
        who = _who(name)
        asked = requested_arguments(fn)
        extra: dict[str, Any] = {}
        if "key" in asked and (key is not None or not has_default(fn, "key")):
            extra["key"] = _own_key(key, name, who)
        if "state" in asked:
            extra["state"] = _own_state(state, name, who)

        def call(
            x: PyTree, fn: TermFn = fn, extra: dict[str, Any] = extra, who: str = who
        ) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
            with jax.named_scope(who.replace(" ", "_")):
                value, metrics, next_state = call_term(fn, x, batch, extra, who)
            return value, (metrics, next_state)

        terms.append(Differentiated(call, weight, place == "params"))
    if plan.model is None:
        return terms, None
    model = plan.model.with_arrays(objective.arrays[1])
    extra = {}
    if "key" in requested_arguments(model):
        extra["key"] = _own_key(key, "/forward", "forward")  # a name that no term may have

    def forward(params: PyTree) -> PyTree:
        with jax.named_scope("forward"):
            return model(params, batch, **extra)

    return terms, forward


def _call(
    objective: CompositeLoss, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[Array, CustomLossOutput]:
    terms, forward = _bind(objective, batch, state, key)
    total, (values, extras) = evaluate(terms, forward, x)
    return total, _report(objective, terms, total, values, extras, None, state)


def _value_and_grad(
    objective: CompositeLoss, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[tuple[Array, CustomLossOutput], PyTree]:
    terms, forward = _bind(objective, batch, state, key)
    values, extras, gradient, norms = differentiate(terms, forward, x, objective.plan.norms)
    total = values[0]
    for term, value in zip(terms[1:], values[1:], strict=True):
        total = total + weighted(term.weight, value)
    return (total, _report(objective, terms, total, values, extras, norms, state)), gradient


def _report(
    objective: CompositeLoss,
    terms: list[Differentiated],
    total: Array,
    values: list[Array],
    extras: list[tuple[dict[str, Array], PyTree]],
    norms: Norms | None,
    state: PyTree,
) -> CustomLossOutput:
    none = [None] * len(terms)
    grad_norms, per_datum = (norms.terms, norms.per_datum) if norms else (none, none)
    regularizers = OrderedDict()
    regularizer_total = jnp.zeros_like(total)
    for i, name in enumerate(objective.names, start=1):
        weight, norm = terms[i].weight, grad_norms[i]
        assert weight is not None
        contribution = weighted(weight, values[i])
        regularizer_total = regularizer_total + contribution
        regularizers[name] = RegularizerOutput(
            name=name,
            value=values[i],
            weight=weight,
            contribution=contribution,
            grad_norm=norm,
            grad_norm_weighted=None if norm is None else weighted(weight, norm),
            custom=extras[i][0],
            grad_norm_per_datum=per_datum[i],
        )
    return CustomLossOutput(
        loss_total=total,
        base_loss=BaseLossOutput(values[0], grad_norms[0], extras[0][0], per_datum[0]),
        regularizers=regularizers,
        regularizer_total=regularizer_total,
        total_grad_norm=norms.total if norms else None,
        state=_next_state(objective, state, extras),
    )


def _next_state(
    objective: CompositeLoss, state: PyTree, extras: list[tuple[dict[str, Array], PyTree]]
) -> PyTree:
    if not state:
        return {}
    following = dict(state)
    if "step" in state:
        following["step"] = state["step"] + 1
    if "terms" in state:
        by_name = dict(zip(objective.plan.names, extras, strict=True))
        following["terms"] = {
            name: _checked_state(last, by_name[name][1], _who(name)) for name, last in state["terms"].items()
        }
    return jax.lax.stop_gradient(following)


def _checked_state(last: PyTree, following: PyTree, who: str) -> PyTree:
    def described(state: PyTree) -> tuple[Any, list[tuple[Any, Any]]]:
        leaves, treedef = jax.tree.flatten(state)
        return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    if described(last) != described(following):
        raise TypeError(
            f"{who}: its next state differs from its last one in structure, shape or dtype: "
            f"{described(last)} became {described(following)}"
        )
    return following


def _step(state: PyTree, name: str) -> Array:
    if not isinstance(state, Mapping) or "step" not in state:
        raise ValueError(
            f"term {name!r}: its weight is a schedule, which needs to know the step: pass "
            f"state=objective.init() first and state=out.state from then on"
        )
    return state["step"]


def _own_state(state: PyTree, name: str, who: str) -> PyTree:
    if not isinstance(state, Mapping) or name not in (state.get("terms") or {}):
        raise ValueError(
            f"{who}: it asks for state: pass state=objective.init() first and state=out.state from then on"
        )
    return state["terms"][name]


def _own_key(key: Array | None, name: str, who: str) -> Array:
    """A key of the term's own, which adding or dropping another term does not change."""
    if key is None:
        raise ValueError(f"{who}: it asks for a random key: pass key=jax.random.key(seed)")
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def _state_leaf(leaf: Any) -> Array:
    """A copy (so that donating the state is safe), and no weak type (so that nothing compiles twice)."""
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)


def _weight_leaf(weight: ArrayLike) -> Array:
    return jnp.asarray(weight, jnp.result_type(float))


def _shown(objective: CompositeLoss, name: str, schedule: Schedule | None) -> str:
    constant = objective.constants[name]
    try:
        if schedule is not None and not bool(objective.held[name]):
            return "schedule"
        return f"{float(constant):g}"
    except (TypeError, ValueError):  # traced, stacked by vmap, or no array at all
        return str(constant)


def _who(name: str) -> str:
    return "base loss" if name == BASE else f"term {name!r}"


def _as_iterable(regularizers: Any) -> Iterable[Any]:
    if not isinstance(regularizers, Iterable) and not isinstance(regularizers, RegularizerSpec):
        raise TypeError(f"regularizers is a sequence of RegularizerSpecs, got {type(regularizers).__name__}")
    if isinstance(regularizers, RegularizerSpec) or (
        isinstance(regularizers, Mapping) and "fn" in regularizers
    ):
        raise TypeError("regularizers is a sequence of terms; put this one term into a list")
    return regularizers


def _check_names(specs: Sequence[RegularizerSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ValueError(f"two terms are named {spec.name!r}; every term needs its own name")
        seen.add(spec.name)


def _as_grad_norms(track: bool | GradNorms) -> GradNorms | None:
    if isinstance(track, GradNorms):
        return track
    if not isinstance(track, bool):
        raise TypeError(f"track_grad_norms is a bool or a GradNorms, got {type(track).__name__}")
    return GradNorms() if track else None


def _check_spaces(specs: Sequence[RegularizerSpec], forward: object, norms: GradNorms | None) -> None:
    if forward is not None:
        if not callable(forward):
            raise TypeError(f"forward is a function of (params, batch), got {type(forward).__name__}")
        check_term(forward, "forward")
        if norms is not None and norms.per_datum and norms.wrt is None:
            raise ValueError(
                "GradNorms: with forward the norms are of the params' gradient, which no datum owns; "
                "for norms a datum say GradNorms(wrt='outputs', per_datum=True)"
            )
        return
    for spec in specs:
        if spec.on == "params":
            raise ValueError(
                f"term {spec.name!r}: on='params' needs to know what is params and what outputs: "
                f"give compose the model, forward=apply_fn"
            )
    if norms is not None and (norms.wrt == "params" or norms.params is not None):
        raise ValueError(
            "GradNorms of params needs to know the model: give compose forward=apply_fn; without "
            "it all norms are of d(value)/d(x), which is track_grad_norms=True"
        )
