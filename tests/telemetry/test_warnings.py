"""Warnings: each once an episode, and none where all is well."""

import jax.numpy as jnp
import numpy as np
import pytest
from clients import Scripted, make_data

import jaxreg as jr
from jaxreg.telemetry import Inputs, Warnings, attached, log


def run(steps, warnings, objective, **norms):
    """Warnings of a run: (step, kind, term); ``steps`` are what x is in each."""
    heard = []
    with attached(warnings, lambda event: heard.append(event) if event.name == "warning" else None):
        for step, x in enumerate(steps):
            (_, out), _ = objective.value_and_grad(jnp.atleast_1d(jnp.float32(x)))
            log(out, step=step)
    return [(event.step, event.metadata["kind"], event.metadata["term"]) for event in heard], heard


def hinge(weight=1.0, norms=True, name="hinge"):
    term = dict(name=name, fn=lambda x, batch: jnp.sum(jnp.maximum(0.0, x)), weight=weight)
    return jr.compose(lambda x, batch: jnp.sum(x), [term], track_grad_norms=norms)


OFF = dict(zero_steps=None, share=None, compiles=None)


class TestZero:
    def test_once_an_episode(self):
        told, _ = run([-1.0] * 5 + [1.0] + [-1.0] * 3, Warnings(**OFF | {"zero_steps": 3}), hinge())
        assert told == [
            (2, "zero_value", "hinge"),
            (2, "zero_gradient", "hinge"),
            (8, "zero_value", "hinge"),
            (8, "zero_gradient", "hinge"),
        ]

    def test_without_norms_the_value_alone(self):
        told, _ = run([-1.0] * 3, Warnings(**OFF | {"zero_steps": 2}), hinge(norms=False))
        assert told == [(1, "zero_value", "hinge")]

    def test_a_term_that_is_switched_off_is_not_suspect(self):
        assert run([-1.0] * 9, Warnings(**OFF | {"zero_steps": 2}), hinge(weight=0.0))[0] == []

    def test_a_host_term_without_a_gradient_says_so_itself(self):
        with jr.host.HostRegularizer("host", lambda data, x: 1.0, 1.0) as term:
            objective = jr.compose(lambda x, batch: jnp.sum(x), [term], track_grad_norms=True)
            assert run([1.0] * 4, Warnings(**OFF | {"zero_steps": 2}), objective)[0] == []


class TestShare:
    def test_a_term_that_takes_over(self):
        told, heard = run(
            [1.0] * 3 + [-1.0] + [1.0] * 3, Warnings(**OFF | {"share": 0.8, "share_steps": 2}), hinge(9.0)
        )
        assert told == [(1, "dominates", "hinge"), (5, "dominates", "hinge")]
        assert heard[0].measurements["share"] == pytest.approx(0.9)
        assert "90.0% of the gradient" in heard[0].metadata["message"]

    def test_below_the_share(self):
        assert run([1.0] * 9, Warnings(**OFF | {"share": 0.95, "share_steps": 2}), hinge(9.0))[0] == []


class TestNonfinite:
    def test_which_term(self):
        objective = jr.compose(
            lambda x, batch: jnp.sum(x), [dict(name="log", fn=lambda x, b: jnp.sum(jnp.log(x)), weight=1.0)]
        )
        told, _ = run([1.0, -1.0, -1.0, 1.0, -1.0], Warnings(**OFF), objective)
        assert told == [(1, "nonfinite", "log"), (4, "nonfinite", "log")]

    def test_which_datum_and_token(self):
        objective = jr.compose(
            jr.losses.CrossEntropy(),
            [dict(name="ref", fn=lambda x, batch: batch.sum(x * batch["r"]), weight=1.0)],
        )
        batch = jr.TokenBatch.pack([{"r": [1.0, 2.0]}, {"r": [1.0, 1.0, np.inf]}])
        x = -jnp.ones(batch.shape)
        heard = []
        with attached(Warnings(**OFF), heard.append):
            log(objective(x, batch)[1], step=4, inputs=Inputs(objective, x, batch))
        message = next(e.metadata["message"] for e in heard if e.name == "warning")
        assert "term 'ref' is not finite. First: the data 'r', datum 1, token 2: inf" in message

    def test_a_remote_step_that_raises(self):
        heard = []
        bad = jr.compose(
            jr.losses.CrossEntropy(),
            [dict(name="root", fn=lambda x, batch: batch.sum(jnp.sqrt(x)), weight=1.0)],
        )
        with attached(Warnings(**OFF), heard.append), pytest.raises(jr.client.NonFiniteGradient):
            jr.client.forward_backward_custom(Scripted(), make_data(), bad, step=9)
        (event,) = [e for e in heard if e.name == "warning"]
        assert (event.step, event.metadata["kind"], event.metadata["term"]) == (9, "nonfinite", "root")
        assert "the value of the term 'root'" in event.metadata["message"]


class TestRecompiles:
    def test_shapes(self):
        heard = []
        objective = hinge(name="of_many_shapes")
        with attached(Warnings(**OFF | {"compiles": 4}), heard.append):
            for n in range(1, 6):
                log(objective.value_and_grad(jnp.ones(n))[0][1], step=n)
        (event,) = [e for e in heard if e.name == "warning"]
        assert "compiled 4 times within 50 steps" in event.metadata["message"]
        assert "x: float32[3] -> float32[4]" in event.metadata["message"]
        assert "pad to few shapes" in event.metadata["message"]

    def test_functions(self):
        heard = []
        with attached(Warnings(**OFF | {"compiles": 3}), heard.append):
            kept = [hinge(name="made_anew") for _ in range(4)]
            for objective in kept:
                objective(jnp.ones(1))
        (event,) = [e for e in heard if e.name == "warning"]
        assert "term 'made_anew': another function" in event.metadata["message"]
        assert "once, before the loop" in event.metadata["message"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"share": 1.5}, "between 0 and 1"), ({"zero_steps": 0}, "zero_steps"), ({"compiles": 2.0}, "compiles")],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        Warnings(**wrong)


def test_a_likelihood_above_one_is_told_once():
    objective = jr.compose(jr.losses.CrossEntropy())
    batch = jr.TokenBatch.from_arrays(mask=jnp.ones((1, 2), bool))
    told = []
    with jr.telemetry.attached(jr.telemetry.Warnings(), told.append):
        for step, x in enumerate([-0.5, 3e-4, 3e-4]):  # rounding may leave a logprob a little above 0
            jr.telemetry.log(objective(jnp.full((1, 2), x), batch)[1], step=step)
        _, out = objective(jnp.full((1, 2), -0.5), batch)
        for step in (3, 4):
            metrics = {"nll": jnp.float32(-0.25)}
            jr.telemetry.log(out.replace(base_loss=out.base_loss.replace(custom=metrics)), step=step)
    ((step, message),) = [(e.step, e.metadata["message"]) for e in told if e.name == "warning"]
    assert step == 3
    assert message.startswith("base loss: the mean negative log-likelihood is -0.25, below 0")
