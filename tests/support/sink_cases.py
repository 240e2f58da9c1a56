"""Events for the tests of the sinks, made by hand or by a real objective."""

import jax.numpy as jnp

import jaxreg as jr
from jaxreg.telemetry import Event


def a_report(*terms, total=2.0, nonfinite=(), **numbers):
    """`to_dict()` of an objective with these terms."""
    made = dict.fromkeys(("value", "weight", "contribution", "grad_norm", "grad_norm_weighted"), 0.5)
    report = {
        "loss_total": total,
        "base_loss": {"value": 1.5, "grad_norm": 0.25, "custom": {}},
        "regularizers": {name: {"name": name, **made, "custom": {}, **numbers} for name in terms},
        "regularizer_total": 0.5,
        "total_grad_norm": None,
    }
    return report | ({"nonfinite": list(nonfinite)} if nonfinite else {})


def stop(step, report=None, metrics=None, time=1.5, **seconds):
    about = {"report": report or a_report("l1"), "metrics": metrics or {}, "output": None, "inputs": None}
    return Event("custom_loss.stop", step, time, seconds, about)


def event(name, step=3, measurements=None, time=2.5, **about):
    return Event(name, step, time, measurements or {}, about)


def compute(x=3.0, norms=True, **weights):
    """An output of ``sum(x)`` with ``weight · sum(x²)`` a name."""
    terms = [dict(name=name, fn=_square, weight=weight) for name, weight in weights.items()]
    objective = jr.compose(_total, terms, track_grad_norms=norms)
    (_, out), _ = objective.value_and_grad(jnp.float32([x, x]))
    return out


def _total(x, batch):
    return jnp.sum(x)


def _square(x, batch):
    return jnp.sum(x**2), {"largest": jnp.max(x)}
