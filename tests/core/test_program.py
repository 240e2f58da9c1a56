"""The compiled program: nothing more than the sum written by hand, and nothing imported too much."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drift, l1, l2, logprobs, nll, specs

import jaxreg as jr


def analysis(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()


def test_without_norms_it_costs_what_the_sum_by_hand_costs(rng):
    batch = jr.TokenBatch.from_arrays(ref=-rng.uniform(0.1, 3, (32, 256)).astype(np.float32))
    x = logprobs(rng, batch)
    objective = jr.compose(nll, specs(l1=0.5, l2=0.1, drift=0.2))
    weights = jnp.array([0.5, 0.1, 0.2])

    def by_hand(weights, x, batch):
        def loss(x):
            base, metrics = nll(x, batch)
            values = l1(x, batch), l2(x, batch), drift(x, batch)
            total = base + weights[0] * values[0] + weights[1] * values[1][0] + weights[2] * values[2]
            return total, (base, metrics, values)

        return jax.value_and_grad(loss, has_aux=True)(x)

    ours = analysis(lambda o, x, b: o.value_and_grad(x, b), objective, x, batch)
    theirs = analysis(by_hand, weights, x, batch)
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.01)
    assert ours["bytes accessed"] == pytest.approx(theirs["bytes accessed"], rel=0.01)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_starts_no_backend_and_imports_no_extra():
    result = python(  # rich comes with flax, which imports it
        "import sys, jaxreg, jax\n"
        "assert not jax._src.xla_bridge._backends, 'a backend was started'\n"
        "extras = {'matplotlib', 'torch', 'tinker', 'wandb', 'tensorboard', 'opentelemetry', 'equinox'}\n"
        "extras |= {'scipy.stats'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
    )
    assert result.returncode == 0, result.stderr
