"""The callback for an SDK's own hook: our gradient through one linear function in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clients import make_data, sft
from helpers import close

import jaxreg as jr

torch = pytest.importorskip("torch")


def logprobs(data, dtype=torch.float32):
    """As the SDK hands them over: leaves that want a gradient."""
    rng = np.random.default_rng(0)
    shapes = [np.shape(d.loss_fn_inputs["target_tokens"]) for d in data]
    return [torch.tensor(-rng.uniform(0.1, 3, s), dtype=dtype).requires_grad_(True) for s in shapes]


def expected(objective, data, values, state=None):
    batch = jr.TokenBatch.pack([d.loss_fn_inputs for d in data])
    x = jr.TokenBatch.pack([{"x": v.detach().float().numpy()} for v in values])["x"]
    (loss, _), gradient = objective.value_and_grad(x, batch, state=state)
    return float(loss), batch.unpack(gradient)


@pytest.mark.parametrize("k", [None, 3])
def test_loss_and_gradient_are_the_objectives(k):
    data = make_data(k=k)
    if k:
        data = [
            jr.client.Datum(d.model_input, {n: v for n, v in d.loss_fn_inputs.items() if n != "weights"})
            for d in data
        ]
        objective = jr.compose(jr.losses.KLTopK(reference="ref_logprobs"))
    else:
        objective = sft()
    values = logprobs(data)
    callback = jr.client.as_custom_loss(objective)
    loss, metrics = callback(data, values)
    (3 * loss).backward()  # whatever the SDK does with the loss, it is linear in it
    value, gradients = expected(objective, data, values)
    close(loss.item(), value)
    for tensor, gradient in zip(values, gradients, strict=True):
        assert tensor.grad.shape == tensor.shape
        close(tensor.grad.numpy(), 3 * gradient)
    assert metrics == callback.output.to_flat_dict()


def test_side_data_is_bound_by_value_or_by_function():
    data, objective = make_data(), sft()
    bare = [
        jr.client.Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in ("target_tokens", "weights")})
        for d in data
    ]
    side = [{"ref_logprobs": d.loss_fn_inputs["ref_logprobs"]} for d in data]
    value, _ = expected(objective, data, logprobs(data))
    for given in (side, lambda datums: side[: len(datums)]):
        loss, _ = jr.client.as_custom_loss(objective, side_data=given)(bare, logprobs(data))
        close(loss.item(), value)
    with pytest.raises(ValueError, match="side_data has 3 mappings for 4 datums"):
        jr.client.as_custom_loss(objective, side_data=side[:3])(bare, logprobs(data))
    with pytest.raises(ValueError, match=r"datum 0: \['ref_logprobs'\] are in its loss_fn_inputs and"):
        jr.client.as_custom_loss(objective, side_data=side)(data, logprobs(data))


def test_schedules_and_keys_move_on_from_call_to_call():
    def noise(x, batch, *, key):
        return jax.random.normal(key) + 0 * jnp.sum(x)

    callback = jr.client.as_custom_loss(
        jr.losses.CrossEntropy(),
        regularizers=[
            dict(name="l1", fn=jr.regularizers.L1(), weight=optax.linear_schedule(0.0, 1.0, 4)),
            dict(name="noise", fn=noise, weight=1.0),
        ],
        key=jax.random.key(0),
        reduction="mean",
    )
    data = make_data()
    metrics = [callback(data, logprobs(data))[1] for _ in range(3)]
    assert [m["reg/l1/weight:mean"] for m in metrics] == [0.0, 0.25, 0.5]
    assert len({m["reg/noise/value:mean"] for m in metrics}) == 3


def test_bfloat16_and_float64_logprobs():
    data, objective = make_data(), sft()
    for dtype in (torch.bfloat16, torch.float64):
        values = logprobs(data, dtype)
        loss, _ = jr.client.as_custom_loss(objective)(data, values)
        loss.backward()
        assert values[0].grad.dtype == dtype
        _, gradients = expected(objective, data, values)
        close(values[1].grad.float().numpy(), gradients[1], rtol=1e-2, atol=1e-3)


def test_what_does_not_fit_raises_before_the_sdk_sends_anything():
    data, callback = make_data(), jr.client.as_custom_loss(sft())
    with pytest.raises(ValueError, match="3 logprobs arrays for 4 datums"):
        callback(data, logprobs(data)[:3])
    with pytest.raises(ValueError, match=r"datum 0: its logprobs have shape \(9,\)"):
        callback(data, logprobs(data)[1:] + logprobs(data)[:1])
    poisoned = logprobs(data)
    poisoned[2].data[1] = float("nan")
    with pytest.raises(ValueError, match=r"datum 2: the server's logprob is nan at \[1\]"):
        callback(data, poisoned)

    def infinite(x, batch):
        return batch.mean(jnp.log(x + 100.0 - 100.0 - x))

    objective = jr.compose(jr.losses.CrossEntropy(), [dict(name="suspect", fn=infinite, weight=1.0)])
    with pytest.raises(jr.client.NonFiniteGradient, match="'suspect'"):
        jr.client.as_custom_loss(objective)(data, logprobs(data))


def test_host_terms_and_events():
    def squares(data, logprobs):  # in PyTorch, as a judge may be
        at = [torch.tensor(lp, requires_grad=True) for lp in logprobs]
        value = sum((lp**2).sum() for lp in at)
        value.backward()
        return value, {}, [lp.grad for lp in at]

    def compiled(x, batch):
        return jnp.sum(jnp.square(batch.where(x)))

    data = make_data()
    values = logprobs(data)
    heard = []
    with jr.host.HostRegularizer("squares", squares, 0.5) as term, jr.telemetry.attached(heard.append):
        callback = jr.client.as_custom_loss(jr.compose(jr.losses.CrossEntropy(), [term]))
        loss, _ = callback(data, values)
        loss.backward()
    same = jr.compose(jr.losses.CrossEntropy(), [dict(name="squares", fn=compiled, weight=0.5)])
    value, gradients = expected(same, data, values)
    close(loss.item(), value)
    for tensor, gradient in zip(values, gradients, strict=True):
        close(tensor.grad.numpy(), gradient)
    assert [e.name for e in heard if not e.name.startswith("compile")] == [
        "custom_loss.start",
        "regularizer.compute.start",
        "regularizer.compute.stop",
        "custom_loss.stop",
    ]
