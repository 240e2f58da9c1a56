"""The recipe as jaxreg composes it is the recipe written by hand."""

import signal
import sys

import jax
import numpy as np
import pytest
from helpers import close
from places import EXAMPLES

import jaxreg as jr


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import open_character

    yield open_character
    for name in ("open_character", "terminal"):
        sys.modules.pop(name, None)


def test_the_composite_is_the_recipe(recipe, x64):
    rng = np.random.default_rng(0)
    rows = [row | {"ref_logprobs": -rng.uniform(0.5, 5, len(row["before"]))} for row in recipe.pairs()[:10]]
    batch = jr.TokenBatch.pack(rows)
    params = jax.tree.map(lambda a: a.astype(np.float64), recipe.initial_params(0))
    lp = [np.asarray(a) for a in batch.unpack(recipe.logprobs(params, batch))]
    ref = [row["ref_logprobs"] for row in rows]

    gaps = [(a - b).sum() for a, b in zip(lp, ref, strict=True)]
    dpo = np.mean([np.log1p(np.exp(-0.1 * (gaps[i] - gaps[i + 1]))) for i in range(0, 10, 2)])
    nll = -np.concatenate(lp[0::2]).mean()
    ratio = np.mean((np.concatenate(lp) - np.concatenate(ref)) ** 2)
    loss, out = recipe.preference_objective()(params, batch)
    close(loss, dpo + 0.1 * nll + 0.001 * ratio, rtol=1e-6)
    close(out.regularizers["chosen_nll"].value, nll, rtol=1e-6)

    loss, _ = recipe.supervised_objective()(params, batch)
    close(loss, np.mean([-a.mean() for a in lp]), rtol=1e-6)


def test_it_trains(recipe, capsys):
    metrics = recipe.main(["--steps", "25"])
    assert metrics["accuracy"] == 1
    assert metrics["margin"] > 0.3
    assert "preference stage" in capsys.readouterr().out


def test_ctrl_c_ends_with_what_there_is(recipe, capsys):
    pressed = []

    def press(event):
        if event.name == "compile" and not pressed:  # of the first stage's first step
            pressed.append(event)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as ended, jr.telemetry.attached(press):
        recipe.terminal.run(recipe.main, ["--steps", "25"])
    assert ended.value.code == 130
    said = capsys.readouterr().out
    assert "stopped after 1 of 25 steps" in said
    assert "supervised stage" not in said
    assert "accuracy" in said.splitlines()[-1]


def test_a_wrong_argument_is_one_line(recipe, capsys):
    for arguments in (["--steps", "0"], ["--seed", "x"]):
        with pytest.raises(SystemExit) as ended:
            recipe.main(arguments)
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
