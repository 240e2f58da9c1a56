"""Terms on weight matrices: the leaves with two axes, or stacks of them.

They live on the params of an objective with a ``forward``, without being told. All take

- ``params``, which leaves they touch, as in `parameters.py`; those with fewer than two axes are passed over;
- ``layers``, which leading axes are layers: a model that runs its layers by ``scan`` (or was made by
  ``vmap``) keeps them in one array [L, in, out], which is L matrices. A number for all leaves, or a mapping
  from paths to numbers, ``layers={"blocks": 1}``; the first pattern that matches a leaf counts. With 0, the
  last axis stands against all others: a convolution's kernel [h, w, in, out] is one matrix
  [h·w·in, out], and attention's [heads, in, out] one [heads·in, out]. A leaf with
  three axes or more that nothing is said about is an error, since it may be either.

Matrices from 1e-18 to 1e18 are as good as those near 1. Complex ones have real norms, and the products of
their rows take the conjugate.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxreg.base.norm import l2_norm
from jaxreg.base.numbers import magnitude
from jaxreg.base.paths import PathFilter
from jaxreg.base.types import Array, Place, PyTree
from jaxreg.regularizers.leaves import Layers, as_layers, matrices, total, vectors
from jaxreg.regularizers.structure import MODES, gram_distance
from jaxreg.terms.masked import check_choice
from jaxreg.terms.term import term

Result = tuple[Array, dict[str, Array]]


@term
class GroupLasso:
    """Group lasso ``Σ √n_g · ‖θ_g‖₂`` (Yuan & Lin 2006), which drives whole groups to 0.

    Args:
      groups: what a group is: **"columns"**, the weights into one output (the last axis tells them apart);
        ``"rows"``, those out of one input (all axes but the last do); ``"leaves"``, a whole array. With
        ``layers``, of each layer.
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.
      layers: how many leading axes are layers, of which each has its own matrix: a number for all leaves,
        or a mapping from paths to numbers (``{"blocks": 1}``). **None** where no leaf has more than two axes.

    Metrics: ``zero``, the share of groups with a norm below a millionth of the largest one. At a
    zero group the subgradient is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.GroupLasso(groups="leaves")({"w": jnp.array([[3.0, 4.0]])}, None)
      >>> round(value.item(), 4)  # √2 · 5
      7.0711
    """

    place: ClassVar[Place] = "params"
    groups: Literal["columns", "rows", "leaves"] = "columns"
    params: PathFilter | None = None
    layers: Layers | None = None

    def __post_init__(self) -> None:
        check_choice(self.groups, ("columns", "rows", "leaves"), "GroupLasso", "groups")
        object.__setattr__(self, "layers", as_layers(self.layers, "GroupLasso"))

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        arguments = (x, batch, self.params, self.layers, "GroupLasso")
        if self.groups == "leaves":
            tables = vectors(*arguments)
        else:
            tables = [jnp.swapaxes(m, 1, 2) if self.groups == "columns" else m for m in matrices(*arguments)]
            tables = [table.reshape(-1, table.shape[-1]) for table in tables]
        norms = [l2_norm([table], keep_leading=True) for table in tables]
        value = total([math.sqrt(t.shape[1]) * jnp.sum(n) for t, n in zip(tables, norms, strict=True)])
        every = jnp.concatenate(norms)
        return value, {"zero": jnp.mean(every <= 1e-6 * jnp.max(every), dtype=every.dtype)}


@term
class NuclearNorm:
    """Nuclear norm, the sum of each matrix's singular values (Fazel 2002): drives matrices to low rank.

    Args:
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.
      layers: how many leading axes are layers, of which each has its own matrix: a number for all leaves,
        or a mapping from paths to numbers (``{"blocks": 1}``). **None** where no leaf has more than two axes.

    Metrics: ``effective_rank``, the mean over matrices of exp(entropy of the normalised singular values)
    (Roy & Vetterli 2007). The subgradient leaves out singular values that are 0
    (below a millionth of the largest).

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.NuclearNorm()({"w": jnp.diag(jnp.array([3.0, 4.0]))}, None)
      >>> round(value.item(), 4)
      7.0
    """

    place: ClassVar[Place] = "params"
    params: PathFilter | None = None
    layers: Layers | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_layers(self.layers, "NuclearNorm"))

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        found = [jax.vmap(_nuclear)(m) for m in matrices(x, batch, self.params, self.layers, "NuclearNorm")]
        values, ranks = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        return jnp.sum(values), {"effective_rank": jnp.mean(ranks)}


@term
class SpectralNorm:
    """Spectral norm, the sum of each matrix's largest singular value, by power iteration.

    Yoshida & Miyato (2017), from a fixed start, so that the same parameters give the same value.

    Args:
      iterations: of the power method, **20**. The estimate never exceeds the norm.
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.
      layers: how many leading axes are layers, of which each has its own matrix: a number for all leaves,
        or a mapping from paths to numbers (``{"blocks": 1}``). **None** where no leaf has more than two axes.

    Metrics: ``max``, the largest of them.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.SpectralNorm()({"w": jnp.diag(jnp.array([3.0, 1.0]))}, None)
      >>> round(value.item(), 4)
      3.0
    """

    place: ClassVar[Place] = "params"
    iterations: int = 20
    params: PathFilter | None = None
    layers: Layers | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise ValueError(f"SpectralNorm: iterations is a whole number ≥ 1, got {self.iterations!r}")
        object.__setattr__(self, "layers", as_layers(self.layers, "SpectralNorm"))

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        stacks = matrices(x, batch, self.params, self.layers, "SpectralNorm")
        norms = jnp.concatenate([jax.vmap(self._largest)(stack) for stack in stacks])
        return jnp.sum(norms), {"max": jnp.max(norms)}

    def _largest(self, matrix: Array) -> Array:
        scale = magnitude(matrix)
        scaled = matrix / scale
        fixed = jax.lax.stop_gradient(scaled)
        start = 1.0 + 0.1 * jnp.sin(jnp.arange(matrix.shape[1], dtype=scale.dtype))

        def step(v: Array, _: None) -> tuple[Array, None]:
            u = _unit(jnp.matmul(fixed, v, precision="highest"))
            return _unit(jnp.matmul(fixed.conj().T, u, precision="highest")), None

        v, _ = jax.lax.scan(step, _unit(start.astype(matrix.dtype)), length=self.iterations)
        u = _unit(jnp.matmul(fixed, v, precision="highest"))
        return scale[0, 0] * jnp.real(u.conj() @ jnp.matmul(scaled, v, precision="highest"))


@term
class WeightOrthogonality:
    """`Orthogonality` of weight matrices, summed over them.

    Args:
      mode, axis: as there.
      params: which leaves: a pattern on their paths (``"*/kernel"``), a leading part (``"head"``), a tuple of
        these, or a function of the path. **None** for all.
      layers: how many leading axes are layers, of which each has its own matrix: a number for all leaves,
        or a mapping from paths to numbers (``{"blocks": 1}``). **None** where no leaf has more than two axes.

    Metrics: ``max_cosine``, the largest ``|G|`` off the diagonal of any matrix.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.WeightOrthogonality()({"w": jnp.eye(3)}, None)[0].item()
      0.0
    """

    place: ClassVar[Place] = "params"
    mode: Literal["soft", "hard", "spectral"] = "soft"
    axis: Literal["rows", "columns"] = "rows"
    params: PathFilter | None = None
    layers: Layers | None = None

    def __post_init__(self) -> None:
        check_choice(self.mode, MODES, "WeightOrthogonality", "mode")
        check_choice(self.axis, ("rows", "columns"), "WeightOrthogonality", "axis")
        object.__setattr__(self, "layers", as_layers(self.layers, "WeightOrthogonality"))

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        stacks = matrices(x, batch, self.params, self.layers, "WeightOrthogonality")
        found = [jax.vmap(lambda m: gram_distance(m, self.mode, self.axis))(stack) for stack in stacks]
        values, largest = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        return jnp.sum(values), {"max_cosine": jnp.max(largest)}


def _nuclear(matrix: Array) -> tuple[Array, Array]:
    """The nuclear norm of a matrix, and its effective rank."""
    scale = magnitude(matrix)
    scaled = matrix / scale
    u, s, vh = jnp.linalg.svd(jax.lax.stop_gradient(scaled), full_matrices=False)
    # ∂‖W‖_* = U Vᴴ: so it needs no derivative of the SVD, which is NaN where values are equal.
    direction = jnp.matmul(u * (s > 1e-6 * s[0])[None], vh, precision="highest")
    exact = jnp.sum(s)
    linear = jnp.sum(jnp.real(direction.conj() * scaled))
    share = s / jnp.where(exact == 0, 1.0, exact)
    rank = jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0)))
    return scale[0, 0] * (exact + linear - jax.lax.stop_gradient(linear)), rank


def _unit(vector: Array) -> Array:
    norm = l2_norm([vector])
    return vector / jnp.where(norm == 0, 1.0, norm)
