"""The same numbers in float64, one plain ``jax.grad`` a term, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.answers import Answer, save


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
    values, gradients, output_norms = [], [], []
    for term in problem.terms.values():
        value, gradient = jax.jit(
            jax.value_and_grad(lambda x, batch, term=term: term(problem.outputs(x, batch), batch))
        )(x, batch)
        values.append(float(value))
        gradients.append(gradient)
        output_norms.append(norm(jax.jit(jax.grad(term))(outputs, batch)))
    tied = [_tied(gradient) for gradient in gradients]
    answer = {
        "values": np.array(values),
        "norms": np.array([norm(gradient) for gradient in tied]),
        "untied norms": np.array([norm(gradient) for gradient in gradients]),
        "output norms": np.array(output_norms),
    }
    save(path, answer | leaves_by_name("gradient", problem.weighted_sum(tied)))


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
