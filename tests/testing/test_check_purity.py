"""What `check_term` finds beside the padding, and how it says so."""

import jax
import jax.numpy as jnp
import pytest

import jaxreg as jr


def reports_while_traced(x, batch):
    """A metric that Python decides, by what it is handed."""
    return jnp.sum(x) ** 2, {"traced": float(isinstance(x, jax.core.Tracer))}


def renames_while_traced(x, batch):
    name = "inside" if isinstance(x, jax.core.Tracer) else "outside"
    return jnp.sum(x) ** 2, {name: jnp.sum(x)}


def diverges_while_traced(x, batch):
    return jnp.sum(x) ** 2, {"m": jnp.nan if isinstance(x, jax.core.Tracer) else 0.0}


def counts_its_calls():
    calls = []

    def term(x, batch):
        calls.append(x)
        return len(calls) * jnp.sum(x) ** 2

    return term


@pytest.mark.parametrize(
    ("term", "jitted"),
    [
        (reports_while_traced, r"9.0 \{'traced': 1.0\} with, 9.0 \{'traced': 0.0\} without"),
        (renames_while_traced, r"9.0 \{'inside': 3.0\} with, 9.0 \{'outside': 3.0\} without"),
        (diverges_while_traced, r"9.0 \{'m': nan\} with, 9.0 \{'m': 0.0\} without"),
        (counts_its_calls(), r"[\d.]+ with, [\d.]+ without"),
    ],
)
def test_a_value_or_a_metric_that_tracing_changes(term, jitted):
    message = f"same under jit: {jitted}; a term is a pure function"
    with pytest.raises(jr.testing.TermCheckError, match=message) as caught:
        jr.testing.check_term(term, jnp.ones(3))
    assert "same under vmap: " in str(caught.value)


def test_constants_of_python_and_numpy_are_metrics_too():
    jr.testing.check_term(lambda x, batch: (jnp.sum(x) ** 2, {"one": 1.0, "two": 2}), jnp.ones(3))
