"""What 0.1.0 left behind, on Python 3.11 with jax 0.10.1, still opens."""

import pickle

import chex
import jax
import numpy as np
import pytest
from places import ROOT

import jaxreg as jr

LEFT = ROOT / "tests" / "data" / "0.1.0"


@pytest.fixture(scope="module")
def left():
    return pickle.loads((LEFT / "objective.pickle").read_bytes())


def test_an_objective_computes_what_it_did(left):
    (loss, output), gradient = left["objective"].value_and_grad(left["x"], left["batch"])
    chex.assert_trees_all_close(gradient, left["gradient"], rtol=1e-5)
    np.testing.assert_allclose(loss, left["output"].loss_total, rtol=1e-5)
    for name, term in left["output"].regularizers.items():
        np.testing.assert_allclose(output.regularizers[name].grad_norm, term.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(
            output.regularizers[name].grad_norm_per_datum, term.grad_norm_per_datum, rtol=1e-5
        )


def test_it_shares_the_program_of_an_equal_one_made_now(left):
    old = left["objective"]
    assert type(old.plan.parts[0]) is type(jr.compose(jr.losses.PPO()).plan.parts[0])
    assert pickle.loads(pickle.dumps(old)).plan is old.plan


def test_a_spec_and_an_output_are_whole(left):
    assert (left["spec"].name, left["spec"].fn.mode, left["spec"].weight) == ("entropy", "minimize", 0.5)
    assert left["output"].to_dict()["loss_total"] == pytest.approx(float(left["output"].loss_total))


def test_every_term_has_the_arguments_it_had():
    for name, arguments, objective in pickle.loads((LEFT / "terms.pickle").read_bytes()):
        (term,) = objective.plan.fns(objective.leaves)
        assert type(term).__name__ == name
        for argument, value in arguments.items():
            chex.assert_trees_all_equal(getattr(term, argument), value)
        hash(term), repr(term), jax.tree.flatten(term)


def test_a_run_and_its_recording_are_read(capsys):
    run = jr.telemetry.read_run(LEFT / "run.jsonl")
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert run.nonfinite().tolist() == [False, False, False, True]
    steps = jr.telemetry.read_recording(LEFT / "step-00000003.flight")
    assert [step.step for step in steps] == [0, 1, 2, 3]
    objective = pickle.loads((LEFT / "objective.pickle").read_bytes())["objective"]
    replayed = jr.telemetry.replay(LEFT / "step-00000003.flight", objective)
    assert replayed.differing == []
    assert replayed.findings
