"""The recipe as jaxreg composes it is the recipe written by hand."""

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
    sys.modules.pop("open_character", None)


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
