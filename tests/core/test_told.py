"""Mistakes of use that can be seen are told."""

import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from places import ROOT

import jaxreg as jr
from jaxreg.base import releases

X = jnp.array([-1.0, -2.0])


class Remembers:
    def init(self):
        return jnp.zeros(())

    def __call__(self, x, batch, *, state):
        return jnp.sum(x) + state, {}, state + 1


@pytest.mark.parametrize("how", ["schedule", "memory"])
def test_a_state_that_stands_still(how):
    spec = dict(name="t", fn=lambda x, batch: jnp.sum(x), weight=optax.linear_schedule(0.0, 1.0, 100))
    if how == "memory":
        spec = dict(name="t", fn=Remembers(), weight=0.5)
    objective = jr.compose(lambda x, batch: jnp.sum(x), [spec])

    def messages(still):
        told, state = [], objective.init()
        with jr.telemetry.attached(jr.telemetry.Warnings(still_steps=5, zero_steps=None), told.append):
            for step in range(12):
                _, out = objective(X, state=state)
                state = objective.init() if still else out.state
                jr.telemetry.log(out, step=step)
        return [(e.step, e.metadata["message"]) for e in told if e.name == "warning"]

    ((step, message),) = messages(still=True)
    assert step == 4
    assert message.startswith("the state has been that of step 1 for 5 steps: pass state=objective.init() at")
    assert messages(still=False) == []


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f: jax.value_and_grad(f, has_aux=True)(X),
        lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))(X),
        lambda f: jax.grad(lambda x: f(x)[0])(X),
        lambda f: jax.jvp(lambda x: f(x)[0], (X,), (X,)),
        lambda f: jax.vmap(jax.grad(lambda x: f(x)[0]))(X[None]),
    ],
)
def test_norms_that_jax_grad_leaves_out(differentiate):
    objective = jr.compose(lambda x, batch: jnp.sum(x), track_grad_norms=True)
    with pytest.warns(jr.NormsNotComputedWarning, match=r"call objective\.value_and_grad"):
        differentiate(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiate(jr.compose(lambda x, batch: jnp.sum(x)))
        objective(X), jax.jit(objective.value_and_grad)(X), jax.vmap(objective)(X[None])


@pytest.mark.parametrize("base", ["token_sum", "token_mean", "datum_mean"])
@pytest.mark.parametrize("other", ["token_sum", "token_mean", "datum_mean"])
@pytest.mark.parametrize("wrap", [lambda term: term, lambda term: jr.of("x", term)])
def test_sums_beside_means(base, other, wrap):
    def compose():
        return jr.compose(
            jr.losses.CrossEntropy(reduction=base),
            [dict(name="kl", fn=wrap(jr.regularizers.KL(reduction=other)), weight=0.1)],
        )

    if (base == "token_sum") == (other == "token_sum"):
        compose()
        return
    sums, means = ("base loss", "term 'kl'") if base == "token_sum" else ("term 'kl'", "base loss")
    with pytest.warns(jr.MixedReductionsWarning, match=f"{sums} sums over tokens, and {means} averages"):
        compose()


@pytest.mark.parametrize("release", [*releases.WRONG_ON_CPU, "0.10.1", "0.11.0"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("flags", ["", releases.AVOIDS, f"{releases.AVOIDS}all"])
def test_a_release_that_computes_wrong_gradients(monkeypatch, release, backend, flags):
    monkeypatch.setattr(releases, "version", lambda package: release)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", f"--other=1 {flags}")
    releases.warn_once.cache_clear()
    objective = jr.compose(lambda x, batch: jnp.sum(x))
    try:
        if release in releases.WRONG_ON_CPU and backend == "cpu" and flags != releases.AVOIDS:
            with pytest.warns(jr.WrongGradientsWarning, match=r"WRONG GRADIENTS on CPUs.*\[cpu\].*doctor"):
                objective(X)
        objective(X)  # once is enough
        np.testing.assert_allclose(objective(X)[0], -3.0)
    finally:
        releases.warn_once.cache_clear()


def test_the_extra_for_cpus_excludes_what_the_list_names():

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["optional-dependencies"]["cpu"]:
        name, *excluded = requirement.replace("jaxlib", "jax").split("!=")
        assert name == "jax"
        assert tuple(part.rstrip(",") for part in excluded) == releases.WRONG_ON_CPU
    assert not any("!=" in requirement for requirement in project["dependencies"])
    assert "jaxreg[cpu]" in project["optional-dependencies"]["test"]
