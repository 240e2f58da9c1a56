"""Advantages by what rewards usually are: a replay baseline, and running normalisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.pytrees import register_fields
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.batch.token_batch import as_token_batch
from jaxreg.core.parted import kinds_of
from jaxreg.memory.wrapper import (
    Wrapper,
    check_decay,
    fixed,
    nothing_yet,
    with_array,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningAdvantages(Wrapper):
    """A policy loss whose advantages are taken relative to those of the steps before: ``(A − mean) / std``.

    With ``scale=False`` it is the moving-average baseline of REINFORCE (Williams 1992); with both, the
    running normalisation that reinforcement-learning systems keep of returns. Mean and standard deviation are
    over the advantages that count (datums, of one number a datum; tokens, by their weights, of one a token),
    decayed over steps; before there are any, advantages stay as they are.

    Args:
      term: a loss that reads the batch's array of this name.
      advantages: its name, **"advantages"**.
      center, scale: whether the running mean is subtracted, and what is left divided by the running standard
        deviation, both **True**.
      decay: what of the running means stays from step to step, **0.99**.

    Metrics: the term's own; of this step's advantages as they came, ``advantage_mean``, and
    ``advantage_square``, their mean square about the running mean.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> loss = jr.memory.RunningAdvantages(term=jr.losses.PPO(), scale=False, decay=0.0)
      >>> objective = jr.compose(loss)
      >>> batch = {"logprobs": jnp.array([[-1.0], [-1.0]]), "advantages": jnp.array([3.0, 5.0])}
      >>> state = objective.init()
      >>> for _ in range(2):
      ...     (value, out), grad = objective.value_and_grad(batch["logprobs"], batch, state=state)
      ...     state = out.state
      >>> grad.tolist()  # ½ and −½: of advantages 3 − 4 and 5 − 4
      [[0.5], [-0.5]]
    """

    term: TermFn
    advantages: str = "advantages"
    center: bool = True
    scale: bool = True
    decay: float = 0.99

    def __post_init__(self) -> None:
        self._check()
        check_decay(self.decay, "RunningAdvantages")

    @property
    def metric_kinds(self) -> Kinds:
        """Those of the term, and its own."""
        own = Kinds(None, advantage_mean="sum", advantage_square="sum")
        return own.and_those_of(kinds_of(self.term))

    def init(self) -> dict[str, Array]:
        """Nothing is remembered yet."""
        return nothing_yet("mean", "square")

    def __call__(
        self, x: PyTree, batch: PyTree, *, state: dict[str, Array], **asked: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss, at advantages relative to those before."""
        if self.advantages not in batch:
            raise KeyError(
                f"RunningAdvantages: the batch has no array {self.advantages!r}; it has {sorted(batch)}"
            )
        given = jnp.asarray(batch[self.advantages])
        given = given.astype(jnp.promote_types(given.dtype, jnp.float32))  # they may be whole numbers
        tokens = as_token_batch(batch, x, "RunningAdvantages")
        own = given - state["mean"] if self.center else given
        if self.scale:
            spread = jnp.sqrt(state["square"])
            own = jnp.where(spread > 0, own / jnp.where(spread > 0, spread, 1), own)
        value, metrics = self._inside(x, with_array(batch, self.advantages, own), asked)
        return value, metrics | {
            "advantage_mean": tokens.mean(given),
            "advantage_square": tokens.mean(jnp.square(given - state["mean"])),
        }

    def remember(
        self, state: dict[str, Array], *, value: Array, metrics: dict[str, Array], params: PyTree
    ) -> dict[str, Array]:
        """The whole batch's advantages are some more of those that they are measured by."""
        mean, square = fixed((metrics["advantage_mean"], metrics["advantage_square"]))
        weight = self.decay * state["weight"] + (1 - self.decay)
        share = (1 - self.decay) / weight  # of this step, in the mean so far
        step = share * (mean - state["mean"])
        # About the mean that was, then about the one that is: no difference of large squares (Welford 1962).
        about = state["square"] + share * (square - state["square"])
        following = {
            "mean": state["mean"] + step,
            "square": jnp.maximum(about - jnp.square(step), 0),
            "weight": weight,
        }
        good = jnp.isfinite(mean) & jnp.isfinite(square)
        return {n: jnp.where(good, new, state[n]).astype(state[n].dtype) for n, new in following.items()}


register_fields(RunningAdvantages, ["term"], ["advantages", "center", "scale", "decay"])
