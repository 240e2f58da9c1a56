"""The doctor passes on this JAX, and says so where it does not."""

import jax
import jax.numpy as jnp
import pytest

from jaxreg import __main__
from jaxreg.testing import numerics as testing


def test_it_passes_here(capsys):
    assert __main__.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "All known patterns agree" in printed
    assert jax.__version__ in printed
    assert "WRONG" not in printed


def test_it_finds_a_wrong_gradient_and_says_what_to_do(monkeypatch, capsys):
    @jax.custom_vjp
    def wrong(x):
        return x

    wrong.defvjp(lambda x: (x, None), lambda _, g: (0.9 * g,))  # off by 10 %
    right = testing._layer_norm
    monkeypatch.setattr(testing, "_layer_norm", lambda x, axis=-1: wrong(right(x, axis)))
    assert __main__.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG backward of layer") == 4
    assert "ok    backward of RMS" in printed
    assert "jax==0.10.1" in printed


def test_its_own_answers_agree_with_jax_in_float64(x64):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5), jnp.float64)
    g = jax.random.normal(jax.random.key(1), (2, 3, 5), jnp.float64)
    for axis in (-1, 0):
        want = jax.vjp(lambda x, a=axis: testing._layer_norm(x, a), x)[1](g)[0]
        got = testing._layer_norm_backward(*map(jax.device_get, (x, g)), axis)
        assert got == pytest.approx(jax.device_get(want), rel=1e-9)
    want = jax.vjp(testing._rms_norm, x)[1](g)[0]
    assert testing._rms_norm_backward(*map(jax.device_get, (x, g))) == pytest.approx(
        jax.device_get(want), rel=1e-9
    )
