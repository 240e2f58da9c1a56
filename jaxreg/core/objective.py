"""The objective that compose makes: a pure function and a pytree."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxreg.base import html, releases
from jaxreg.base.events import listening
from jaxreg.base.names import did_you_mean
from jaxreg.base.shown import called, never_fails
from jaxreg.base.types import Array, ArrayLike, PyTree
from jaxreg.core import step
from jaxreg.core.aggregate import refuse_nonfinite
from jaxreg.core.calls import calling
from jaxreg.core.explain import explain, refuse_deleted
from jaxreg.core.output import CustomLossOutput
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.restore import restored
from jaxreg.core.shown import objective_rest, objective_rows, text_columns, weight_text
from jaxreg.core.spec import check_weight
from jaxreg.core.state import first_state, none_if_empty
from jaxreg.core.weights import weight_leaf, weights_at

NO_NORMS = (
    "norms are tracked, but jax.grad and jax.value_and_grad see one function and no terms, so they come back "
    "None: call objective.value_and_grad(...), or compose without track_grad_norms="
)


class NormsNotComputedWarning(UserWarning):
    """An objective that tracks norms was differentiated by `jax.grad`, which leaves them None."""


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

    leaves: Leaves
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
          key: a random key; needed by terms, and a ``forward``, that ask for one only. Each gets its own,
            folded with its name; see `compose`.

        Returns:
          ``(loss_total, CustomLossOutput)``.
        """
        if self.plan.norms is not None and self.plan.aggregator is None and is_differentiated(x):
            warnings.warn(NO_NORMS, NormsNotComputedWarning, stacklevel=2)
        return self._run(step.call, x, batch, none_if_empty(state), key)

    def value_and_grad(
        self, x: PyTree, batch: PyTree = None, *, state: PyTree = None, key: Array | None = None
    ) -> tuple[tuple[Array, CustomLossOutput], PyTree]:
        """The total loss, every term's report, and the gradient, from one compiled pass.

        Where norms are tracked the report has them. Arguments as for calling the objective.

        Returns:
          ``((loss_total, CustomLossOutput), gradient with the structure of x)``.
        """
        done = self._run(step.value_and_grad, x, batch, none_if_empty(state), key)
        if self.plan.aggregator is not None and not isinstance(done[0][0], jax.core.Tracer):
            refuse_nonfinite(self.plan.combiner(self.leaves), done[0][1])
        return done  # type: ignore[no-any-return]

    def eval_shape(
        self, x: PyTree, batch: PyTree = None, *, state: PyTree = None, key: Array | None = None
    ) -> tuple[tuple[Array, CustomLossOutput], PyTree]:
        """What `value_and_grad` would return, in `jax.ShapeDtypeStruct`: nothing is computed or compiled.

        Every term sees the shapes and the names, so what it refuses, it refuses here. Arguments as for
        calling the objective.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> (loss, _), grads = jr.compose(lambda x, batch: jnp.sum(x)).eval_shape(jnp.ones(3))
          >>> loss.shape, grads.shape
          ((), (3,))
        """
        arguments = (x, batch, none_if_empty(state), key)
        self._check_one()
        try:
            return self.plan.compiled(step.value_and_grad).eval_shape(self.leaves, *arguments)
        except Exception as error:
            if better := explain(error, self.plan, self.leaves, arguments, traced=False):
                raise better from better.__cause__
            raise

    def init(self) -> PyTree:
        """The first state: what schedules and stateful terms carry from step to step.

        An empty dict where nothing needs one; else pass it as ``state=`` and carry ``out.state``. Of a
        `stack` the states are stacked.
        """
        if self.stacked is not None:
            return jax.vmap(functools.partial(first_state, self.plan))(self.leaves)
        return first_state(self.plan, self.leaves)

    def restored(self, saved: PyTree) -> PyTree:
        """A state that was saved, as this objective takes it, though terms were added or dropped since.

        A term that is new begins with its first state, one that is gone is left out, and both are said
        (`StateChangedWarning`). Whatever fits comes back bit for bit.

        Args:
          saved: ``out.state`` as it was, or as a checkpoint gives it back: dicts and arrays, of NumPy or JAX.

        Raises:
          TypeError, ValueError: it is of another objective (it says what differs), or of a newer release.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr, optax
          >>> fade = optax.linear_schedule(1.0, 0.0, 10)
          >>> term = dict(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=fade)
          >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [term])
          >>> _, out = objective(jnp.ones(2), state=objective.init())
          >>> saved = {name: leaf.tolist() for name, leaf in out.state.items()}  # a file, say
          >>> objective.restored(saved)["step"]
          Array(1, dtype=int32)
        """
        return restored(self.init(), saved)

    @property
    def stacked(self) -> int | None:
        """How many settings a `stack` holds, or None where this is one objective."""
        shapes = [jnp.shape(weight) for weight in self.leaves.constants.values()]
        return int(shapes[0][0]) if shapes and shapes[0] else None

    @property
    def constants(self) -> dict[str, Array]:
        """Every regularizer's constant weight by name (0 for one that follows a schedule)."""
        return self.leaves.constants

    @property
    def names(self) -> tuple[str, ...]:
        """The regularizers' names, in order."""
        return self.plan.names[1:]

    def weights(self, state: PyTree = None) -> dict[str, Array]:
        """Every regularizer's weight by name; schedules are read at the state's step."""
        weights = zip(self.names, weights_at(self.plan, self.leaves, state)[1:], strict=True)
        return {name: weight for name, weight in weights if weight is not None}

    def with_weights(self, weights: Mapping[str, ArrayLike]) -> CompositeLoss:
        """The same objective with other weights, running the program that is already compiled.

        A weight that follows a schedule becomes the constant given here.

        Raises:
          KeyError: a name that the objective does not have; the nearest one is suggested.
          TypeError, ValueError: a weight that is no finite scalar ≥ 0.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"with_weights takes a mapping from names to weights, {{'l1': 0.1}}; got "
                f"{type(weights).__name__}"
            )
        for name, weight in weights.items():
            self._check_known(name)
            if callable(weight):
                raise TypeError(
                    f"term {name!r}: with_weights takes numbers; a schedule is part of the program, "
                    f"so give it to compose"
                )
            check_weight(weight, name)
        leaves = self.leaves._replace(
            constants=self.leaves.constants | {n: weight_leaf(w) for n, w in weights.items()},
            held=self.leaves.held | {n: jnp.asarray(True) for n in weights if n in self.leaves.held},
        )
        return self.replace(leaves=leaves)  # type: ignore[attr-defined]

    def without(self, *names: str) -> CompositeLoss:
        """The same objective with these terms switched off, at weight 0: ``without("l1", "kl")``.

        They are still evaluated and reported, by the same compiled program, and add exactly nothing
        to the total: the cheapest ablation. To be rid of their cost too, compose without them. With
        norms tracked, the gradient of a term at weight 0 is left out though it be NaN; without them
        the gradient is that of the sum as it is written, where 0 · NaN is NaN.
        """
        self._check_names(names)
        return self.with_weights(dict.fromkeys(names, 0.0))

    def only(self, *names: str) -> CompositeLoss:
        """The same objective with every regularizer but these switched off."""
        self._check_names(names)
        return self.without(*(name for name in self.names if name not in names))

    @never_fails
    def __repr__(self) -> str:
        fns = self.plan.fns(self.leaves)
        lines = [f"base: {called(fns[0])}"]
        for name, place, fn in zip(self.names, self.plan.places[1:], fns[1:], strict=True):
            on = " (on params)" if place == "params" else ""
            lines.append(f"{name}: {weight_text(self.plan, self.leaves, name)} · {called(fn)}{on}")
        kind = (
            "CompositeLoss"
            if self.stacked is None
            else f"a stack of {self.stacked} settings of CompositeLoss"
        )
        return f"{kind}(\n  " + ",\n  ".join([*lines, *objective_rest(self.plan, self.leaves)]) + "\n)"

    @never_fails
    def _repr_html_(self) -> str:
        title = ", ".join(["CompositeLoss", *objective_rest(self.plan, self.leaves)])
        rows = objective_rows(self.plan, self.leaves)
        return html.table(title, rows, left=text_columns(rows))

    def _run(self, body: Callable[..., Any], *arguments: Any) -> Any:
        """The compiled program, or its own body where somebody else is tracing already."""
        self._check_one()
        releases.warn_once()
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self.leaves, arguments)))
        run = functools.partial(body, self.plan) if traced else self.plan.compiled(body)
        try:
            if traced:
                refuse_deleted(self.plan, self.leaves)
            if not listening():
                return run(self.leaves, *arguments)
            with calling(self.plan, (self.leaves, *arguments), traced):
                return run(self.leaves, *arguments)
        except Exception as error:
            if better := explain(error, self.plan, self.leaves, arguments, traced):
                raise better from better.__cause__
            raise

    def _check_one(self) -> None:
        if (count := self.stacked) is not None:
            raise ValueError(
                f"this objective is a stack of {count} settings, over which jax.vmap runs: "
                f"jax.vmap(lambda objective, x: objective.value_and_grad(x, batch))(stacked, xs)"
            )

    def _check_names(self, names: tuple[str, ...]) -> None:
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"names of terms are strings, one an argument: 'a', 'b'; got {name!r}")
            self._check_known(name)

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            hint = did_you_mean(name, self.names)
            raise KeyError(f"no term is named {name!r}; {hint}the terms are {list(self.names)}")


def is_differentiated(x: PyTree) -> bool:
    """Whether somebody differentiates with respect to x. A jit in between hides it."""
    kinds = {kind.__name__ for leaf in jax.tree.leaves(x) for kind in type(leaf).__mro__}
    return not kinds.isdisjoint(("JVPTracer", "LinearizeTracer"))
