"""A term's value, divided by what it usually is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.pytrees import register_fields
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.core.parted import kinds_of
from jaxreg.memory.wrapper import Wrapper, check_decay, fixed, mean_of, moved, nothing_yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningScale(Wrapper):
    """A term's value divided by the running root mean square of it, so that its weight is a share.

    The scale is of the steps before this one, and has no gradient: the gradient is the term's own, divided by
    it. Before there is one it is 1.

    Args:
      term: any term without a state of its own.
      decay: what of the running mean stays from step to step, **0.99**.
      floor: the scale is at least so much, **1e-8**.

    Metrics: the term's own; ``raw``, its value as it is; ``scale``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> large = lambda x, batch: 1000 * jnp.mean(x**2)
      >>> term = jr.memory.RunningScale(term=large, decay=0.0)
      >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [dict(name="large", fn=term, weight=0.1)])
      >>> state, x = objective.init(), jnp.array([1.0, 2.0])
      >>> for _ in range(2):
      ...     _, out = objective(x, state=state)
      ...     state = out.state
      >>> out.regularizers["large"].value.item(), out.regularizers["large"].custom["raw"].item()
      (1.0, 2500.0)
    """

    term: TermFn
    decay: float = 0.99
    floor: float = 1e-8

    def __post_init__(self) -> None:
        self._check()
        check_decay(self.decay, "RunningScale")
        if not self.floor > 0:
            raise ValueError(f"RunningScale: floor is a positive number, got {self.floor!r}")

    @property
    def metric_kinds(self) -> Kinds:
        """Those of the term, and its own."""
        return Kinds(None, raw="sum", scale="same").and_those_of(kinds_of(self.term))

    def init(self) -> dict[str, Array]:
        """Nothing is remembered yet."""
        return nothing_yet("square")

    def __call__(
        self, x: PyTree, batch: PyTree, *, state: dict[str, Array], **asked: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The term's value, in units of what it was before."""
        raw, metrics = self._inside(x, batch, asked)
        known = state["weight"] > 0
        scale = jnp.where(known, jnp.maximum(jnp.sqrt(mean_of(state, "square")), self.floor), 1.0)
        scale = fixed(scale).astype(raw.dtype)
        return raw / scale, metrics | {"raw": fixed(raw), "scale": scale}

    def remember(
        self, state: dict[str, Array], *, value: Array, metrics: dict[str, Array], params: PyTree
    ) -> dict[str, Array]:
        """The whole batch's value is one more of those that it is measured by."""
        return moved(state, self.decay, square=jnp.square(metrics["raw"]))


register_fields(RunningScale, ["term"], ["decay", "floor"])
