"""Terms on the parameters, entry by entry: of a distance or a size, whatever the shape.

They live on the params of an objective with a ``forward``, without being told. All take ``params``, which
leaves they touch: None for all, a shell pattern on the path (``"*/kernel"``), a leading part of it
(``"head"``), a tuple of them, or a function of the path; one that matches nothing is an error that lists the
paths. Of complex parameters they take the magnitude. Numbers from 1e-18 to 1e18 are as good as those near 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxreg.base.norm import l2_norm, sum_of_squares
from jaxreg.base.paths import PathFilter, leaf_paths
from jaxreg.base.types import Array, Place, PyTree
from jaxreg.regularizers.leaves import chosen, total
from jaxreg.terms.term import term

Result = tuple[Array, dict[str, Array]]


@term
class WeightL1:
    """L1 penalty on parameters, ``Σ |θ|`` (Tibshirani 1996).

    Args:
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.

    Metrics: ``mean`` of ``|θ|``. The subgradient at 0 is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.WeightL1()({"w": jnp.array([1.0, -2.0])}, None)[0].item()
      3.0
    """

    place: ClassVar[Place] = "params"
    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        leaves = chosen(x, batch, self.params, "WeightL1")
        value = total([jnp.sum(jnp.abs(leaf)) for leaf in leaves])
        return value, {"mean": value / sum(leaf.size for leaf in leaves)}


@term
class WeightL2:
    """L2 penalty on parameters, ``Σ θ²``: weight decay as a loss (Hoerl & Kennard 1970).

    Args:
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.

    Metrics: ``norm``, ‖θ‖.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.WeightL2()({"w": jnp.array([1.0, -2.0])}, None)[0].item()
      5.0
    """

    place: ClassVar[Place] = "params"
    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        leaves = chosen(x, batch, self.params, "WeightL2")
        return sum_of_squares(leaves), {"norm": l2_norm(leaves)}


@term
class L2SP:
    """Squared distance to a starting point, ``Σ (θ − θ₀)²`` (Li, Grandvalet & Davoine 2018).

    Args:
      reference: θ₀, of the structure of the parameters. It travels with the objective as an argument
        of the compiled program, and gets no gradient. Where the parameters are donated, give a copy:
        ``jax.tree.map(jnp.copy, params)``.
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.

    Metrics: ``distance``, the L2 distance ‖θ − θ₀‖.

    Raises:
      ValueError: the parameters have another structure than the reference; no path matches.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> start = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> term = jr.regularizers.L2SP(reference=start)
      >>> term({"w": jnp.ones(2), "b": jnp.ones(1)}, None)[0].item()
      3.0
    """

    place: ClassVar[Place] = "params"
    reference: PyTree
    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        here, there = _pairs(x, batch, self.reference, self.params, "L2SP", "the reference")
        gaps = [a - b for a, b in zip(here, there, strict=True)]
        return sum_of_squares(gaps), {"distance": l2_norm(gaps)}


@term
class EWC:
    """Elastic weight consolidation, the Fisher-weighted distance ``Σ F·(θ − θ₀)²`` (Kirkpatrick et al. 2017).

    Args:
      reference: θ₀, of the structure of the parameters.
      fisher: F ≥ 0, the diagonal of the Fisher information, of the same structure. Neither gets a
        gradient. Where F is negative the value is NaN. Where the parameters are donated, both are copies, as
        of `L2SP`.
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.

    Metrics: ``distance``, its square root.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> term = jr.regularizers.EWC(reference={"w": jnp.zeros(2)}, fisher={"w": jnp.array([1.0, 3.0])})
      >>> term({"w": jnp.ones(2)}, None)[0].item()
      4.0
    """

    place: ClassVar[Place] = "params"
    reference: PyTree
    fisher: PyTree
    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        here, there = _pairs(x, batch, self.reference, self.params, "EWC", "the reference")
        _, fisher = _pairs(x, batch, self.fisher, self.params, "EWC", "the Fisher diagonal")
        if any(jnp.iscomplexobj(f) for f in fisher):
            raise TypeError("EWC: the Fisher diagonal is of real numbers ≥ 0, but it holds complex ones")
        # √F·d, never d² alone, which may leave float32 where F·d² does not.
        gaps = [jnp.sqrt(f) * (a - b) for a, b, f in zip(here, there, fisher, strict=True)]
        return sum_of_squares(gaps), {"distance": l2_norm(gaps)}


def _pairs(
    x: PyTree, batch: PyTree, other: PyTree, where: PathFilter | None, who: str, what: str
) -> tuple[list[Array], list[Array]]:
    """The chosen leaves of x, and those of a pytree of the same structure and shapes."""
    here: Any = jax.tree.structure(x)
    there: Any = jax.tree.structure(other)
    if here != there:
        raise ValueError(
            f"{who}: x has another structure than {what}; did the spec forget on='params'? "
            f"x: {here}; {what}: {there}"
        )
    for path, a, b in zip(leaf_paths(x), jax.tree.leaves(x), jax.tree.leaves(other), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"{who}: at {path!r} x has shape {jnp.shape(a)}, but {what} has {jnp.shape(b)}; did the spec "
                f"forget on='params'?"
            )
    there = [jax.lax.stop_gradient(leaf) for leaf in chosen(other, None, where, who)]
    return chosen(x, batch, where, who), there
