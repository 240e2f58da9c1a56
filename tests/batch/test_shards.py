"""A mean inside shard_map is the device's own: an error, unless that is said to be meant."""

import os
import subprocess
import sys

import jax
import pytest

import jaxreg as jr

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import jaxreg as jr

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
mask = np.arange(6) < rng.integers(1, 7, 16)[:, None]
x = jnp.asarray(-rng.uniform(0.1, 3, (16, 6)), jnp.float32)
ref = jnp.asarray(-rng.uniform(0.1, 3, (16, 6)), jnp.float32)
batch = jr.TokenBatch.from_arrays(mask=mask, ref_logprobs=ref)

def sharded(objective, batch, **more):
    def own(x, batch):
        loss, out = objective(x, batch)
        return jax.lax.psum(loss, "data")
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P(), **more))(x, batch)

def refused(run):
    try:
        run()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")
"""


def run(code):
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "term",
    [
        "jr.losses.CrossEntropy()",
        'jr.losses.CrossEntropy(reduction="datum_mean")',
        "jr.losses.DPO()",
        "jr.regularizers.KL()",
        "lambda x, batch: batch.mean(x)",
    ],
)
def test_a_mean_of_the_devices_own_is_refused_with_the_remedy(term):
    run(f"""
objective = jr.compose({term})
for check in (True, False):
    said = refused(lambda: sharded(objective, batch, check_vma=check))
    assert "inside shard_map over 'data'" in said and "batch.as_local()" in said, said
""")


def test_what_is_meant_is_done_and_what_adds_up_is_right():
    run("""
nll = jr.losses.CrossEntropy()
parts = [slice(i, i + 2) for i in range(0, 16, 2)]
own = sum(nll(x[p], jax.tree.map(lambda a: a[p], batch))[0] for p in parts)
np.testing.assert_allclose(sharded(jr.compose(nll), batch.as_local()), own, rtol=1e-5)
total = jr.compose(lambda x, batch: batch.sum(-x))
np.testing.assert_allclose(sharded(total, batch), total(x, batch)[0], rtol=1e-5)
# Under jit a mean is of the whole batch, however it is sharded.
sharding = jax.NamedSharding(mesh, P("data"))
spread = jax.tree.map(lambda a: jax.device_put(a, sharding), (x, batch))
np.testing.assert_allclose(jax.jit(jr.compose(nll))(*spread)[0], nll(x, batch)[0], rtol=1e-5)
# vmap over rows with a name is no shard.
jax.vmap(lambda x, m: jr.losses.CrossEntropy()(x[None], {"mask": m[None]})[0], axis_name="rows")(x, mask)
""")


def test_the_flag_is_kept_by_what_keeps_a_batch():

    batch = jr.TokenBatch.pack([{"a": [1.0, 2.0]}]).as_local()
    assert batch.with_arrays(b=batch["a"]).local
    assert jax.jit(lambda b: b)(batch).local
    assert not jr.TokenBatch.from_arrays(**batch).local
