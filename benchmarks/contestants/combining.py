"""JAX contestants that combine the terms' gradients by UPGrad, beside the plain step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr
from benchmarks.cases.problem import Problem, PyTree, leaves_by_name
from benchmarks.contestants.in_jax import Contestant, hand_written, with_jaxreg
from benchmarks.measure.answers import Answer
from benchmarks.measure.reference import REG_EPS


def combining(problem: Problem) -> list[Contestant]:
    """The plain step by hand and with jaxreg, then UPGrad in each space that the problem has."""
    problem = dataclasses.replace(
        problem, x=jax.tree.map(jnp.asarray, problem.x), batch=jax.tree.map(jnp.asarray, problem.batch)
    )
    gramian = jr.GradNorms(wrt="outputs", gramian=True)
    norms = "norms" if problem.forward is None else "output norms"
    found = [
        hand_written(problem),
        with_jaxreg(problem, "jaxreg, plain sum", False),
        with_jaxreg(problem, "jaxreg, plain sum, GradNorms(gramian=True)", gramian, norms),
        _upgrad(problem, "outputs"),
    ]
    return found if problem.forward is None else [*found, _upgrad(problem, "params"), _by_hand(problem)]


def _upgrad(problem: Problem, space: Any) -> Contestant:
    aggregator = jr.aggregation.UPGrad(wrt=space, reg_eps=REG_EPS, relative_to="trace")
    name = "jaxreg, aggregator=UPGrad()" if space == "outputs" else 'jaxreg, aggregator=UPGrad(wrt="params")'
    return with_jaxreg(problem, name, False, direction=f"upgrad {space}", aggregator=aggregator)


def _by_hand(problem: Problem) -> Contestant:
    """The Jacobian of the vector of terms, its Gramian and coefficients, and the rows combined."""
    aggregator = jr.aggregation.UPGrad(reg_eps=REG_EPS, relative_to="trace")
    weights = jnp.asarray(problem.weights)

    @jax.jit
    def step(x: PyTree, batch: PyTree) -> PyTree:
        def vector(x: PyTree) -> tuple[jax.Array, jax.Array]:
            values = jnp.stack(problem.values(x, batch))
            return weights * values, values

        rows, values = jax.jacrev(vector, has_aux=True)(x)
        flat = [leaf.reshape(len(weights), -1) for leaf in jax.tree.leaves(rows)]
        coefficients = aggregator(sum(leaf @ leaf.T for leaf in flat))
        direction = jax.tree.map(lambda leaf: jnp.tensordot(coefficients, leaf, axes=1), rows)
        return {"values": values, "direction": direction}

    def read(result: PyTree) -> Answer:
        direction = leaves_by_name("upgrad params", result["direction"])
        return {"values": np.asarray(result["values"])} | direction

    arguments = (problem.x, problem.batch)
    return Contestant(
        "jax.jacrev of the vector of terms, UPGrad()(gramian)",
        lambda: step(*arguments),
        read,
        [(step, arguments)],
    )
