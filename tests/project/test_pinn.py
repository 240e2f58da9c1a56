"""The physics-informed examples: the exact solution is one, and short runs leave what they say."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import EXAMPLES

import jaxreg as jr

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("burgers", "pinn", "pinn_sweep", "terminal"):
            del sys.modules[name]


def test_the_exact_solution_solves_it(example):
    burgers = example("burgers")
    x, t = np.linspace(-1, 1, 1201), np.linspace(0.2, 0.3, 81)
    u = burgers.exact(x, t)
    along_t, along_x = np.gradient(u, t, x, edge_order=2)
    twice = np.gradient(along_x, x, axis=1, edge_order=2)
    left = along_t + u * along_x - burgers.VISCOSITY * twice
    assert np.abs(left[2:-2, 2:-2]).max() < 2e-3 * np.abs(u * along_x).max()
    np.testing.assert_allclose(burgers.exact(x, np.zeros(1))[0], -np.sin(np.pi * x), atol=1e-12)
    np.testing.assert_allclose(u[:, [0, -1]], 0, atol=1e-12)


def test_the_residual_is_that_of_finite_differences(example):
    burgers = example("burgers")
    params, points = burgers.first_params(1), burgers.drawn(1, inside=16)

    def u(x, t):
        hidden = np.stack([x, t], axis=-1)
        for layer in params[:-1]:
            hidden = np.tanh(hidden @ np.float64(layer["w"]) + np.float64(layer["b"]))
        return (hidden @ np.float64(params[-1]["w"]) + np.float64(params[-1]["b"]))[..., 0]

    (x, t), h = np.float64(points["inside"]).T, 1e-4
    slope_t, slope_x = (u(x, t + h) - u(x, t - h)) / (2 * h), (u(x + h, t) - u(x - h, t)) / (2 * h)
    twice = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
    want = np.mean((slope_t + u(x, t) * slope_x - burgers.VISCOSITY * twice) ** 2)
    assert float(burgers.residual(params, points)) == pytest.approx(want, rel=1e-4)
    assert jnp.isfinite(burgers.error(params))


def test_a_short_run_with_weights_that_move(example, tmp_path, capsys):
    pinn = example("pinn")
    found = pinn.main(["--steps", "700", "--out", str(tmp_path)])
    assert found["after"] < 0.6 * found["before"]
    assert (tmp_path / "pinn.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    weights = [line["regularizers"]["boundary"]["weight"] for line in lines if "event" not in line]
    assert weights[0] == 1.0
    assert weights[-1] != 1.0
    assert "relative error before" in capsys.readouterr().out


def test_a_short_sweep_names_the_setting_that_wins(example, tmp_path, capsys):
    sweep = example("pinn_sweep")
    found = sweep.main(["--steps", "20", "--out", str(tmp_path)])
    assert set(found) == {"error", "boundary", "initial"}
    said = capsys.readouterr().out
    assert said.count("  relative error") == 16
    assert f"{found['error']:.3f}" in said
    assert (tmp_path / "pinn_sweep.png").stat().st_size > 10_000


def test_one_of_sixteen_is_as_if_it_were_alone(example):
    burgers = example("burgers")
    objective = burgers.compose()
    params, points = burgers.first_params(0), burgers.drawn(0, inside=32, edge=8)
    alone = objective.with_weights({"boundary": 10.0})
    many = jr.stack([objective, alone])

    losses, _ = jax.vmap(lambda o: o(params, points))(many)
    loss, _ = alone(params, points)
    assert float(losses[1]) == pytest.approx(float(loss), rel=1e-6)
