"""Many settings of one objective at once: their leaves stacked, for `jax.vmap`."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.paths import leaf_paths
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.plan import Plan, who


def stack(objectives: Iterable[CompositeLoss]) -> CompositeLoss:
    """Several settings of one objective as one, over whose first axis `jax.vmap` runs, in one program.

    Args:
      objectives: settings of the same terms, by `with_weights`, ``without`` or composed anew; what differs
        are weights, and the numbers that terms, rules and aggregators hold.

    Returns:
      An objective whose every leaf has a leading axis. Give it to `jax.vmap` as an argument; called without
      it raises. Its ``init()`` gives the stacked states.

    Raises:
      TypeError, ValueError: there is none, or one has other terms; it says what differs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(
      ...     lambda x, batch: jnp.sum(x**2),
      ...     [dict(name="l1", fn=lambda x, batch: jnp.sum(jnp.abs(x)), weight=0.0)])
      >>> many = jr.stack([objective.with_weights({"l1": w}) for w in (0.0, 1.0, 2.0)])
      >>> losses, out = jax.vmap(lambda o, x: o(x), in_axes=(0, None))(many, jnp.array([1.0, -2.0]))
      >>> losses.tolist(), out.regularizers["l1"].weight.tolist()
      ([5.0, 8.0, 11.0], [0.0, 1.0, 2.0])
    """
    if isinstance(objectives, CompositeLoss):
        raise TypeError("stack takes several objectives: stack([objective.with_weights(...), ...])")
    settings = list(objectives)
    if not settings:
        raise ValueError("stack takes at least one objective, got none")
    first = settings[0]
    for i, other in enumerate(settings):
        if not isinstance(other, CompositeLoss):
            raise TypeError(
                f"stack takes objectives, which compose returns; number {i} is {type(other).__name__}"
            )
        if other.plan is not first.plan:
            raise ValueError(
                f"objective {i} is not a setting of objective 0: {_difference(first.plan, other.plan)}; a "
                f"stack is one program, so only weights and numbers may differ"
            )
        _check_shapes(first, other, i)
    leaves = jax.tree.map(lambda *parts: jnp.stack(parts), *(setting.leaves for setting in settings))
    return first.replace(leaves=leaves)  # type: ignore[attr-defined, no-any-return]


def _difference(one: Plan, other: Plan) -> str:
    if one.names != other.names:
        return f"its terms are {list(other.names[1:])}, not {list(one.names[1:])}"
    for i, name in enumerate(one.names):
        if (one.parts[i], one.places[i], one.schedules[i]) != (
            other.parts[i],
            other.places[i],
            other.schedules[i],
        ) or one.additive[i : i + 1] != other.additive[i : i + 1]:
            return f"the {who(name)} is another function"
    said = {
        "forward": "model",
        "track_grad_norms": "norms",
        "has_aux": "has_aux",
        "weighting": "weighting",
        "aggregator": "aggregator",
    }
    for argument, field in said.items():
        if getattr(one, field) != getattr(other, field):
            return f"{argument}= is another"
    return "they differ"


def _check_shapes(first: CompositeLoss, other: CompositeLoss, i: int) -> None:
    pairs = zip(
        leaf_paths(first.leaves), jax.tree.leaves(first.leaves), jax.tree.leaves(other.leaves), strict=True
    )
    for path, ours, theirs in pairs:
        if np.shape(ours) != np.shape(theirs):
            raise ValueError(
                f"objective {i}: its array at {path!r} has shape {np.shape(theirs)}, not {np.shape(ours)}"
            )
