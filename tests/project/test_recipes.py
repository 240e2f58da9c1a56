"""The remote recipes on the embedded trainer: each lowers its loss, and shows its terms."""

import importlib
import sys

import numpy as np
import pytest
from places import EXAMPLES

RECIPES = {
    "remote_finetune": {"kl", "focal"},
    "remote_open_character": {"chosen_nll", "log_ratio"},
    "remote_preferences": {"kl", "focal"},
    "remote_distillation": set(),
    "remote_answers": set(),
}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(EXAMPLES) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lowers_its_loss(name, recipe, capsys):
    results = recipe(name).main(["--steps", "8"])
    losses = [
        float(result.output.loss_total) for result in results[:8]
    ]  # the first stage, where there are two
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(losses))
    assert set(results[0].output.regularizers) == RECIPES[name]
    assert all(result.drift.max < 1e-4 for result in results)
    assert "step   0  loss" in capsys.readouterr().out


def test_the_check_is_printed_when_asked_for(recipe, capsys):
    recipe("remote_answers").main(["--steps", "1", "--check"])
    assert "linear in the weights" in capsys.readouterr().out
