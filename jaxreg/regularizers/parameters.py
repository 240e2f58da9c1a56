"""Terms on the parameters themselves: use them with ``on="params"``."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxreg._paths import PathFilter, leaf_paths, select_leaves
from jaxreg.spec import Array, PyTree, accumulation_dtype


@flax.struct.dataclass
class L2SP:
    """Squared distance to a starting point, ``Σ (θ − θ₀)²`` (Li, Grandvalet & Davoine 2018).

    Args:
      reference: θ₀, of the structure of the parameters. It travels with the objective as an argument
        of the compiled program, and gets no gradient. Where the parameters are donated, give a copy:
        ``jax.tree.map(jnp.copy, params)``.
      params: which leaves it touches: None for all, a shell pattern on the path (``"*/kernel"``), a
        leading part of it (``"head"``), a tuple of them, or a function of the path.

    Metrics: ``distance``, the L2 distance ‖θ − θ₀‖.

    Raises:
      ValueError: the parameters have another structure than the reference; no path matches.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> start = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> value, _ = jr.regularizers.L2SP(start)({"w": jnp.ones(2), "b": jnp.ones(1)}, None)
      >>> value.item()
      3.0
    """

    reference: PyTree
    params: PathFilter | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of the parameters x."""
        del batch
        here: Any = jax.tree.structure(x)
        there: Any = jax.tree.structure(self.reference)
        if here != there:
            raise ValueError(
                "L2SP: x has another structure than the reference; did the spec forget on='params'? "
                f"x: {here}; reference: {there}"
            )
        for path, leaf, start in zip(
            leaf_paths(x), jax.tree.leaves(x), jax.tree.leaves(self.reference), strict=True
        ):
            if jnp.shape(leaf) != jnp.shape(start):
                raise ValueError(
                    f"L2SP: at {path!r} x has shape {jnp.shape(leaf)}, but the reference has "
                    f"{jnp.shape(start)}; did the spec forget on='params'?"
                )
        chosen = select_leaves(x, self.params, "L2SP(params=...)")
        squares = [
            _squared_distance(leaf, start)
            for leaf, start, yes in zip(
                jax.tree.leaves(x), jax.tree.leaves(self.reference), chosen, strict=True
            )
            if yes
        ]
        total = sum(squares[1:], start=squares[0])
        return total, {"distance": jnp.sqrt(total)}


def _squared_distance(leaf: Array, start: Array) -> Array:
    dtype = accumulation_dtype(jnp.result_type(leaf, start))
    return jnp.sum(jnp.square(jnp.asarray(leaf, dtype) - jax.lax.stop_gradient(jnp.asarray(start, dtype))))
