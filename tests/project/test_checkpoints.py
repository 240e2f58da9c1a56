"""A checkpoint that was cut is named, and without it the run goes on from the one before."""

import shutil
import sys

import chex
import jax.numpy as jnp
import pytest
from places import EXAMPLES

import jaxreg as jr

pytest.importorskip("orbax.checkpoint")
OBJECTIVE = jr.compose(lambda x, batch: jnp.sum(x**2), track_grad_norms=jr.GradNorms(every=2))
STATELESS = jr.compose(lambda x, batch: jnp.sum(x**2))
LIKE = {"w": jnp.zeros(50)}


@pytest.fixture
def checkpoints(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "checkpoints", raising=False)
    from checkpoints import Checkpoints

    return lambda: Checkpoints(tmp_path, {"seed": 0})


def model(number):
    return {"w": jnp.full(50, float(number))}


@pytest.mark.parametrize("what", ["manifest.ocdbt", "d/*", "_METADATA"])
def test_a_cut_checkpoint_is_named_and_the_one_before_is_whole(checkpoints, tmp_path, what):
    kept = checkpoints()
    for steps in (4, 8):
        kept.save(steps, model(steps), OBJECTIVE.init())
    cut = [path for path in (tmp_path / "8").rglob(what) if path.is_file()]
    assert cut
    for path in cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"the checkpoint {tmp_path}/8 cannot be read; without it"):
        checkpoints().restore(LIKE, OBJECTIVE)
    shutil.rmtree(tmp_path / "8")
    kept = checkpoints()
    assert kept.latest == 4
    found, state = kept.restore(LIKE, OBJECTIVE)
    chex.assert_trees_all_equal((found, state), (model(4), OBJECTIVE.init()))


def test_an_objective_that_remembers_nothing_is_kept_too(checkpoints):
    checkpoints().save(4, model(4), STATELESS.init())
    chex.assert_trees_all_equal(checkpoints().restore(LIKE, STATELESS), (model(4), {}))
    _, state = checkpoints().restore(LIKE, OBJECTIVE)
    chex.assert_trees_all_equal(state, OBJECTIVE.init())
