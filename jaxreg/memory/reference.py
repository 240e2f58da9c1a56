"""A reference that follows the policy: a moving average of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.pytrees import register_fields
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.memory.wrapper import Wrapper, check_decay, fixed, with_array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MovingReference(Wrapper):
    """A term whose reference is the model with an exponential moving average of its parameters.

    It is the mean teacher of Tarvainen & Valpola (2017), and, for a KL, the trust region that moves along
    with the policy. The reference's outputs are computed in every step, without a gradient, by a forward pass
    of its own, and put into the batch.

    Args:
      term: a term that reads the batch's array of this name, such as ``regularizers.KL()``.
      forward: the model, the objective's own ``forward``.
      params: the parameters that the reference begins with; its state is a copy of them, in float32 where
        they are narrower.
      name: where the term looks for the reference, **"ref_logprobs"**.
      decay: what of the reference stays from step to step, **0.999**.

    It asks for the objective's params, so the objective needs its ``forward``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxreg as jr
      >>> def forward(params, batch):
      ...     return batch["inputs"] @ params
      >>> params = jnp.eye(2)
      >>> anchor = jr.memory.MovingReference(
      ...     term=jr.regularizers.KL(), forward=forward, params=params, decay=0.9)
      >>> base = jr.losses.CrossEntropy(inputs="logits")
      >>> objective = jr.compose(base, [dict(name="anchor", fn=anchor, weight=0.1)], forward=forward)
      >>> batch = jr.TokenBatch.from_arrays(inputs=jnp.ones((1, 1, 2)), target_tokens=jnp.array([[1]]))
      >>> _, out = objective(2 * params, batch, state=objective.init())
      >>> out.state["terms"]["anchor"]["params"].tolist()  # 0.9 of the reference and 0.1 of the policy
      [[1.100000023841858, 0.0], [0.0, 1.100000023841858]]
    """

    asks = ("params",)

    term: TermFn
    forward: Callable[..., Any]
    params: PyTree
    name: str = "ref_logprobs"
    decay: float = 0.999

    def __post_init__(self) -> None:
        self._check()
        check_decay(self.decay, "MovingReference")
        if not callable(self.forward):
            raise TypeError(f"MovingReference: forward is the model, got {type(self.forward).__name__}")

    def init(self) -> dict[str, PyTree]:
        """The parameters that it begins with, in float32 or wider, in which small steps add up."""
        return {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(_wide(leaf)), self.params)}

    def __call__(
        self, x: PyTree, batch: PyTree, *, state: dict[str, PyTree], params: PyTree, **asked: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The term, beside the reference's outputs."""
        own = jax.tree.map(
            lambda leaf, like: leaf.astype(jnp.result_type(like)), state["params"], self.params
        )
        reference = fixed(self.forward(fixed(own), batch))
        if not isinstance(reference, jax.Array):
            raise TypeError(
                f"MovingReference: forward gives {type(reference).__name__}, and a reference is one "
                f"array: give it a forward that takes the field, lambda params, batch: "
                f"model(params, batch)['logits']"
            )
        return self._inside(x, with_array(batch, self.name, reference), asked)

    def remember(
        self, state: dict[str, PyTree], *, value: Array, metrics: dict[str, Array], params: PyTree
    ) -> dict[str, PyTree]:
        """The reference follows the parameters of this step."""

        def follow(old: Array, new: Array) -> Array:
            return (self.decay * old + (1 - self.decay) * new.astype(old.dtype)).astype(old.dtype)

        return {"params": jax.tree.map(follow, state["params"], params)}


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


register_fields(MovingReference, ["term", "params"], ["forward", "name", "decay"])
