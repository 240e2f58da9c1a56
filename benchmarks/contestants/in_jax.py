"""What takes part: JAX contestants of this process, and how each is checked and timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr
from benchmarks.cases.problem import Problem, PyTree, leaves_by_name
from benchmarks.measure.answers import Answer
from benchmarks.measure.timing import timed_turn


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to a gradient and, mostly, to the terms' norms.

    Attributes:
      step: what is timed; its result may still be on its way.
      read: takes a step's result to an answer, outside of the timing.
      programs: the (jitted function, arguments) that a step runs, for their temporary memory.
    """

    name: str
    step: Callable[[], Any]
    read: Callable[[Any], Answer]
    programs: list[tuple[Any, tuple[Any, ...]]]

    def run(self) -> Any:
        """One step, waited for."""
        return jax.block_until_ready(self.step())

    def answer(self) -> Answer:
        """What it computes."""
        return self.read(self.run())

    def turn(self) -> float:
        """Seconds of one step."""
        return timed_turn(self.run)

    def temp_memory(self) -> int | None:
        """Bytes of temporary memory: the most that any of its programs takes."""
        stats = [fn.lower(*args).compile().memory_analysis() for fn, args in self.programs]
        return None if None in stats else max(s.temp_size_in_bytes for s in stats)


def contestants(problem: Problem) -> list[Contestant]:
    """All JAX contestants for a problem; the hand-written step, which all ratios are to, is first."""
    problem = dataclasses.replace(problem, x=_on_device(problem.x), batch=_on_device(problem.batch))
    shared = [hand_written(problem), with_jaxreg(problem, "jaxreg, norms off", False)]
    if problem.forward is None:
        return [
            *shared,
            with_jaxreg(problem, "jaxreg, track_grad_norms=True", True),
            _grad_a_term_besides(problem),
            _jacrev(problem),
        ]
    params, outputs = jr.GradNorms(wrt="params"), jr.GradNorms(wrt="outputs")
    return [
        *shared,
        with_jaxreg(problem, 'jaxreg, GradNorms(wrt="params")', params),
        with_jaxreg(problem, 'jaxreg, GradNorms(wrt="outputs")', outputs, "output norms"),
        _grad_a_term(problem),
        _jacrev(problem),
        _mapped_pullback(problem),
    ]


def hand_written(problem: Problem) -> Contestant:
    """``jax.value_and_grad`` of the sum, with every term's value beside it, and no norms."""
    step = jax.jit(plain_step(problem))
    return _of_one_program(problem, "hand-written step, no norms", step)


def plain_step(problem: Problem) -> Callable[[PyTree, PyTree], PyTree]:
    """The step that one would write by hand, to be jitted."""

    def step(x: PyTree, batch: PyTree) -> PyTree:
        def total(x: PyTree) -> tuple[jax.Array, list[jax.Array]]:
            values = problem.values(x, batch)
            return problem.weighted_sum(values), values

        (loss, values), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return {"loss": loss, "values": values, "gradient": gradient}

    return step


def with_jaxreg(
    problem: Problem,
    name: str,
    track: bool | jr.GradNorms,
    norms_name: str = "norms",
    direction: str = "gradient",
    **options: Any,
) -> Contestant:
    """A composed objective's step; ``options`` are more of `jaxreg.compose`'s."""
    objective = problem.objective(track, **options)

    def read(result: Any) -> Answer:
        (_, out), gradient = result
        terms = [out.base_loss, *out.regularizers.values()]
        norms = {norms_name: [t.grad_norm for t in terms]} if track else {}
        return _answer({"values": [t.value for t in terms], "gradient": gradient} | norms, direction)

    program = jax.jit(jr.CompositeLoss.value_and_grad)
    arguments = (problem.x, problem.batch)
    return Contestant(
        name,
        lambda: objective.value_and_grad(*arguments),
        read,
        [(program, (objective, *arguments))],
    )


def _grad_a_term_besides(problem: Problem) -> Contestant:
    """The hand-written step, and besides it one program a term for its norm."""
    plain = jax.jit(plain_step(problem))
    norms = [
        jax.jit(lambda x, batch, term=term: _norm(jax.grad(term)(x, batch)))
        for term in problem.terms.values()
    ]
    arguments = (problem.x, problem.batch)

    def step() -> PyTree:
        return {"norms": [norm(*arguments) for norm in norms]} | plain(*arguments)

    programs = [(fn, arguments) for fn in (plain, *norms)]
    return Contestant("jitted step + one jitted jax.grad a term", step, _answer, programs)


def _grad_a_term(problem: Problem) -> Contestant:
    """One program a term for its value, gradient and norm; another one weights and adds them."""

    def program(term: Any) -> Any:
        def value(x: PyTree, batch: PyTree) -> jax.Array:
            return term(problem.outputs(x, batch), batch)

        def step(x: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
            result, gradient = jax.value_and_grad(value)(x, batch)
            return result, gradient, _norm(gradient)

        return jax.jit(step)

    steps = [program(term) for term in problem.terms.values()]
    combine = jax.jit(problem.weighted_sum)
    arguments = (problem.x, problem.batch)

    def step() -> PyTree:
        values, gradients, norms = zip(*(s(*arguments) for s in steps), strict=True)
        return {"values": values, "norms": norms, "gradient": combine(list(gradients))}

    programs = [*((s, arguments) for s in steps), (combine, ([problem.x] * len(steps),))]
    return Contestant("one jitted jax.grad a term", step, _answer, programs)


def _jacrev(problem: Problem) -> Contestant:
    """The vector of terms differentiated as a vector: every row pulled back through all terms."""

    @jax.jit
    def step(x: PyTree, batch: PyTree) -> PyTree:
        def vector(x: PyTree) -> tuple[jax.Array, jax.Array]:
            values = jnp.stack(problem.values(x, batch))
            return values, values

        jacobian, values = jax.jacrev(vector, has_aux=True)(x)
        return {"values": values} | _from_rows(problem, jacobian)

    return _of_one_program(problem, "jax.jacrev of the vector of terms", step)


def _mapped_pullback(problem: Problem) -> Contestant:
    """The forward once, then the model's pullback for one term after the other."""

    @jax.jit
    def step(x: PyTree, batch: PyTree) -> PyTree:
        outputs, pull = jax.vjp(lambda x: problem.outputs(x, batch), x)
        values, cotangents = zip(
            *(jax.value_and_grad(term)(outputs, batch) for term in problem.terms.values()),
            strict=True,
        )
        jacobian = jax.lax.map(lambda cotangent: pull(cotangent)[0], jnp.stack(cotangents))
        return {"values": values} | _from_rows(problem, jacobian)

    return _of_one_program(problem, "lax.map over the pullback", step)


def _of_one_program(problem: Problem, name: str, step: Any) -> Contestant:
    arguments = (problem.x, problem.batch)
    return Contestant(name, lambda: step(*arguments), _answer, [(step, arguments)])


def _from_rows(problem: Problem, jacobian: PyTree) -> PyTree:
    """Norms and the total's gradient, of gradients stacked along each leaf's leading axis."""
    count = len(problem.terms)
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], jacobian) for i in range(count)]
    return {"norms": jax.vmap(_norm)(jacobian), "gradient": problem.weighted_sum(rows)}


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), jnp.zeros(())))


def _answer(result: PyTree, direction: str = "gradient") -> Answer:
    vectors = {k: np.asarray(jnp.stack(jnp.asarray(v))) for k, v in _vectors(result).items()}
    return vectors | leaves_by_name(direction, result["gradient"])


def _vectors(result: PyTree) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("gradient", "loss")}


def _on_device(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)
