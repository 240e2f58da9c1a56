"""The same numbers in float64, one plain ``jax.grad`` a term and SciPy, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.answers import Answer, save

REG_EPS = 1e-4  # of all UPGrads here, relative to the Gramian's trace, as TorchJD has it


def reference(case: str) -> Answer:
    """Values, all kinds of norms and the total's gradient of a case, computed in float64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npz"
        environment = os.environ | {"JAX_ENABLE_X64": "1"}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.measure.reference", case, str(path)],
            env=environment,
            check=True,
        )
        with np.load(path) as arrays:
            return dict(arrays)


def _main(case: str, path: str) -> None:
    import jax
    import jax.numpy as jnp

    from benchmarks.cases import PROBLEMS
    from benchmarks.cases.problem import PyTree, leaves_by_name

    problem = PROBLEMS[case]()

    def wide(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if a.dtype == np.float32 else a.dtype), tree)

    def norm(tree: PyTree) -> float:
        return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))

    x, batch = _untied(wide(problem.x)), wide(problem.batch)
    outputs = jax.jit(problem.outputs)(x, batch)
    values, gradients, at_outputs = [], [], []
    for term in problem.terms.values():
        value, gradient = jax.jit(
            jax.value_and_grad(lambda x, batch, term=term: term(problem.outputs(x, batch), batch))
        )(x, batch)
        values.append(float(value))
        gradients.append(gradient)
        at_outputs.append(np.asarray(jax.jit(jax.grad(term))(outputs, batch)))
    tied = [_tied(gradient) for gradient in gradients]
    answer = {
        "values": np.array(values),
        "norms": np.array([norm(gradient) for gradient in tied]),
        "untied norms": np.array([norm(gradient) for gradient in gradients]),
        "output norms": np.array([norm(gradient) for gradient in at_outputs]),
    }
    answer |= leaves_by_name("gradient", problem.weighted_sum(tied))
    for space, spanning in {"outputs": at_outputs, "params": tied}.items():
        coefficients = upgrad(_gramian(spanning, problem.weights))
        scaled = [jax.tree.map(lambda a, c=c: c * a, g) for c, g in zip(coefficients, tied, strict=True)]
        answer |= leaves_by_name(f"upgrad {space}", problem.weighted_sum(scaled))
    save(path, answer)


def upgrad(gramian: np.ndarray, reg_eps: float = REG_EPS) -> np.ndarray:
    """UPGrad's coefficients [K] (Quinton & Rey 2024), regularised relative to the trace, by SciPy's NNLS.

    The i-th row minimises ``vᵀGv`` over ``v ≥ eᵢ``; with ``v = eᵢ + z`` and ``G = RᵀR`` it is
    ``‖Rz + Reᵢ‖`` over ``z ≥ 0``.
    """
    import scipy.optimize  # type: ignore[import-untyped,unused-ignore]

    count = len(gramian)
    root = np.linalg.cholesky(gramian / np.trace(gramian) + reg_eps * np.eye(count)).T
    rows = [np.eye(count)[i] + scipy.optimize.nnls(root, -root[:, i])[0] for i in range(count)]
    return np.asarray(np.sum(rows, axis=0))


def _gramian(gradients: list[Any], weights: tuple[float, ...]) -> np.ndarray:
    """Inner products [K, K] of the weighted gradients."""
    flat = [np.concatenate([np.ravel(leaf) for leaf in _leaves(gradient)]) for gradient in gradients]
    stacked = np.stack(flat) * np.asarray(weights)[:, None]
    return stacked @ stacked.T


def _leaves(gradient: Any) -> list[np.ndarray]:
    return [*gradient.values()] if isinstance(gradient, dict) else [gradient]


def _untied(x: Any) -> Any:
    """The parameters with a head of its own, of the same values; logprobs as they are."""
    return x | {"head": x["tokens"]} if isinstance(x, dict) else x


def _tied(gradient: Any) -> Any:
    """The tied matrix's gradient is the sum of those of its two uses."""
    if not isinstance(gradient, dict):
        return gradient
    rest = {name: leaf for name, leaf in gradient.items() if name != "head"}
    return rest | {"tokens": gradient["tokens"] + gradient["head"]}


if __name__ == "__main__":
    _main(*sys.argv[1:])
