"""Terms on the parameters themselves: use them with ``on="params"``.

All take ``params``, which leaves they touch: None for all, a shell pattern on the path (``"*/kernel"``), a
leading part of it (``"head"``), a tuple of them, or a function of the path; one that matches nothing is an
error that lists the paths. Terms on matrices touch the leaves with two axes or more, the last one against
all others (a kernel [in, out], [heads, in, out], ...), and say so where a filter leaves them none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import safe_root, widened
from jaxreg.base.paths import PathFilter, leaf_paths, select_leaves
from jaxreg.base.types import Array, PyTree
from jaxreg.regularizers.structure import MODES, gram_distance
from jaxreg.terms.masked import check_choice
from jaxreg.terms.term import term

Result = tuple[Array, dict[str, Array]]


@term
class WeightL1:
    """L1 penalty on parameters, ``Σ |θ|`` (Tibshirani 1996).

    Args:
      params: which leaves; see the module.

    Metrics: ``mean`` of |θ|. The subgradient at 0 is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.WeightL1()({"w": jnp.array([1.0, -2.0])}, None)[0].item()
      3.0
    """

    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        leaves = _chosen(x, self.params, "WeightL1")
        total = _total([jnp.sum(jnp.abs(leaf)) for leaf in leaves])
        return total, {"mean": total / sum(leaf.size for leaf in leaves)}


@term
class WeightL2:
    """L2 penalty on parameters, ``Σ θ²``: weight decay as a loss (Hoerl & Kennard 1970).

    Args:
      params: which leaves; see the module.

    Metrics: ``norm``, ‖θ‖.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.WeightL2()({"w": jnp.array([1.0, -2.0])}, None)[0].item()
      5.0
    """

    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        total = _total([jnp.sum(jnp.square(leaf)) for leaf in _chosen(x, self.params, "WeightL2")])
        return total, {"norm": safe_root(total)}


@term
class GroupLasso:
    """Group lasso ``Σ √n_g · ‖θ_g‖₂`` (Yuan & Lin 2006), which drives whole groups to 0.

    Args:
      groups: what a group is: **"columns"**, the weights into one output (the last axis tells them apart);
        ``"rows"``, those out of one input (all axes but the last do); ``"leaves"``, a whole array.
      params: which leaves; see the module.

    Metrics: ``zero``, the share of groups with a norm below 1e-6. At a zero group the subgradient is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.GroupLasso(groups="leaves")({"w": jnp.array([[3.0, 4.0]])}, None)
      >>> round(value.item(), 4)  # √2 · 5
      7.0711
    """

    groups: Literal["columns", "rows", "leaves"] = "columns"
    params: PathFilter | None = None

    def __post_init__(self) -> None:
        check_choice(self.groups, ("columns", "rows", "leaves"), "GroupLasso", "groups")

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        if self.groups == "leaves":
            tables = [leaf.reshape(1, -1) for leaf in _chosen(x, self.params, "GroupLasso")]
        else:
            matrices = _matrices(x, self.params, "GroupLasso")
            tables = [m.T if self.groups == "columns" else m for m in matrices]
        norms = [safe_root(jnp.sum(jnp.square(t), axis=1)) for t in tables]
        total = _total([math.sqrt(t.shape[1]) * jnp.sum(n) for t, n in zip(tables, norms, strict=True)])
        zero = _total([jnp.sum(n < 1e-6).astype(n.dtype) for n in norms])
        return total, {"zero": zero / sum(n.size for n in norms)}


@term
class NuclearNorm:
    """Nuclear norm, the sum of each matrix's singular values (Fazel 2002): drives matrices to low rank.

    Args:
      params: which leaves; see the module.

    Metrics: ``effective_rank``, the mean over matrices of exp(entropy of the normalised singular values)
    (Roy & Vetterli 2007). The subgradient leaves out singular values that are 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.NuclearNorm()({"w": jnp.diag(jnp.array([3.0, 4.0]))}, None)
      >>> round(value.item(), 4)
      7.0
    """

    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        sums, ranks = [], []
        for matrix in _matrices(x, self.params, "NuclearNorm"):
            u, s, vt = jnp.linalg.svd(jax.lax.stop_gradient(matrix), full_matrices=False)
            # ∂‖W‖_* = U Vᵀ: so it needs no derivative of the SVD, which is NaN where values are equal.
            direction = jnp.matmul(u * (s > 1e-6 * s[0])[None], vt, precision="highest")
            exact = jnp.sum(s)
            linear = jnp.sum(direction * matrix)
            sums.append(exact + linear - jax.lax.stop_gradient(linear))
            share = s / jnp.maximum(exact, 1e-30)
            ranks.append(
                jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0)))
            )
        return _total(sums), {"effective_rank": _total(ranks) / len(ranks)}


@term
class SpectralNorm:
    """Spectral norm, the sum of each matrix's largest singular value, by power iteration.

    Yoshida & Miyato (2017), from a fixed start, so that the same parameters give the same value.

    Args:
      iterations: of the power method, **20**. The estimate never exceeds the norm.
      params: which leaves; see the module.

    Metrics: ``max``, the largest of them.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.SpectralNorm()({"w": jnp.diag(jnp.array([3.0, 1.0]))}, None)
      >>> round(value.item(), 4)
      3.0
    """

    iterations: int = 20
    params: PathFilter | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise ValueError(f"SpectralNorm: iterations is a whole number ≥ 1, got {self.iterations!r}")

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        norms = [self._largest(m) for m in _matrices(x, self.params, "SpectralNorm")]
        return _total(norms), {"max": jnp.max(jnp.stack(norms))}

    def _largest(self, matrix: Array) -> Array:
        fixed = jax.lax.stop_gradient(matrix)
        start = 1.0 + 0.1 * jnp.sin(jnp.arange(matrix.shape[1], dtype=matrix.dtype))

        def step(v: Array, _: None) -> tuple[Array, None]:
            u = _unit(jnp.matmul(fixed, v, precision="highest"))
            return _unit(jnp.matmul(fixed.T, u, precision="highest")), None

        v, _ = jax.lax.scan(step, _unit(start), length=self.iterations)
        u = _unit(jnp.matmul(fixed, v, precision="highest"))
        return u @ jnp.matmul(matrix, v, precision="highest")


@term
class L2SP:
    """Squared distance to a starting point, ``Σ (θ − θ₀)²`` (Li, Grandvalet & Davoine 2018).

    Args:
      reference: θ₀, of the structure of the parameters. It travels with the objective as an argument
        of the compiled program, and gets no gradient. Where the parameters are donated, give a copy:
        ``jax.tree.map(jnp.copy, params)``.
      params: which leaves; see the module.

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

    reference: PyTree
    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        here, there = _pairs(x, self.reference, self.params, "L2SP", "the reference")
        total = _total([jnp.sum(jnp.square(a - b)) for a, b in zip(here, there, strict=True)])
        return total, {"distance": safe_root(total)}


@term
class EWC:
    """Elastic weight consolidation, the Fisher-weighted distance ``Σ F·(θ − θ₀)²`` (Kirkpatrick et al. 2017).

    Args:
      reference: θ₀, of the structure of the parameters.
      fisher: F ≥ 0, the diagonal of the Fisher information, of the same structure. Neither gets a gradient.
      params: which leaves; see the module.

    Metrics: ``distance``, its square root.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> term = jr.regularizers.EWC(reference={"w": jnp.zeros(2)}, fisher={"w": jnp.array([1.0, 3.0])})
      >>> term({"w": jnp.ones(2)}, None)[0].item()
      4.0
    """

    reference: PyTree
    fisher: PyTree
    params: PathFilter | None = None

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        here, there = _pairs(x, self.reference, self.params, "EWC", "the reference")
        _, fisher = _pairs(x, self.fisher, self.params, "EWC", "the Fisher diagonal")
        parts = [f * jnp.square(a - b) for a, b, f in zip(here, there, fisher, strict=True)]
        total = _total([jnp.sum(part) for part in parts])
        return total, {"distance": safe_root(total)}


@term
class WeightOrthogonality:
    """`Orthogonality` of weight matrices, summed over them.

    Args:
      mode, axis: as there.
      params: which leaves; see the module.

    Metrics: ``max_cosine``, the largest |G| off the diagonal of any matrix.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.WeightOrthogonality()({"w": jnp.eye(3)}, None)[0].item()
      0.0
    """

    mode: Literal["soft", "hard", "spectral"] = "soft"
    axis: Literal["rows", "columns"] = "rows"
    params: PathFilter | None = None

    def __post_init__(self) -> None:
        check_choice(self.mode, MODES, "WeightOrthogonality", "mode")
        check_choice(self.axis, ("rows", "columns"), "WeightOrthogonality", "axis")

    def __call__(self, x: PyTree, batch: PyTree) -> Result:
        """The penalty of the parameters x."""
        matrices = _matrices(x, self.params, "WeightOrthogonality")
        pairs = [gram_distance(m, self.mode, self.axis) for m in matrices]
        values, largest = zip(*pairs, strict=True)
        return _total(list(values)), {"max_cosine": jnp.max(jnp.stack(largest))}


def _chosen(x: PyTree, where: PathFilter | None, who: str) -> list[Array]:
    """The leaves that the filter touches, in float32 (or float64)."""
    chosen = select_leaves(x, where, f"{who}(params=...)")
    leaves = [leaf for leaf, yes in zip(jax.tree.leaves(x), chosen, strict=True) if yes]
    if not leaves:
        raise ValueError(f"{who}: x has no array in it")
    return [widened(leaf) for leaf in leaves]


def _matrices(x: PyTree, where: PathFilter | None, who: str) -> list[Array]:
    """The chosen leaves that have two axes or more, as matrices [everything else, last axis]."""
    matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in _chosen(x, where, who) if leaf.ndim >= 2]
    if not matrices:
        shapes = "\n  ".join(
            f"{path}: {jnp.shape(leaf)}" for path, leaf in zip(leaf_paths(x), jax.tree.leaves(x), strict=True)
        )
        raise ValueError(f"{who}: none of the chosen leaves has two axes or more:\n  {shapes}")
    return matrices


def _pairs(
    x: PyTree, other: PyTree, where: PathFilter | None, who: str, what: str
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
    return _chosen(x, where, who), [jax.lax.stop_gradient(leaf) for leaf in _chosen(other, where, who)]


def _total(parts: list[Array]) -> Array:
    return sum(parts[1:], start=parts[0])


def _unit(vector: Array) -> Array:
    return vector / jnp.maximum(safe_root(jnp.sum(jnp.square(vector))), 1e-30)
