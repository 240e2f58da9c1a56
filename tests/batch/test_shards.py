"""A mean inside shard_map is the device's own: an error, unless that is said to be meant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxreg as jr

RNG = np.random.default_rng(0)
MASK = np.arange(6) < RNG.integers(1, 7, 16)[:, None]
X = jnp.asarray(-RNG.uniform(0.1, 3, (16, 6)), jnp.float32)
REF = jnp.asarray(-RNG.uniform(0.1, 3, (16, 6)), jnp.float32)
BATCH = jr.TokenBatch.from_arrays(mask=MASK, ref_logprobs=REF)
NLL = jr.losses.CrossEntropy()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(mesh, objective, batch, **more):
    def own(x, batch):
        return jax.lax.psum(objective(x, batch)[0], "data")

    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P(), **more))(X, batch)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "term",
    [
        NLL,
        jr.losses.CrossEntropy(reduction="datum_mean"),
        jr.losses.DPO(),
        jr.losses.SimPO(),
        jr.regularizers.KL(),
        jr.regularizers.Length(target=3),
        lambda x, batch: batch.mean(x),
        lambda x, batch: batch.datum_mean(x),
    ],
)
def test_a_mean_of_the_devices_own_is_refused_with_the_remedy(mesh, term, check_vma):
    with pytest.raises(ValueError, match=r"inside shard_map over 'data' is of this device's.*as_local\(\)"):
        sharded(mesh, jr.compose(term), BATCH, check_vma=check_vma)
    specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": check_vma}
    slope = jax.shard_map(lambda x, b: jr.compose(term).value_and_grad(x, b)[1], mesh=mesh, **specs)
    with pytest.raises(ValueError, match="inside shard_map over 'data'"):
        slope(X, BATCH)


def test_what_is_meant_is_done(mesh):
    parts = [slice(i, i + 2) for i in range(0, 16, 2)]
    own = sum(NLL(X[p], jax.tree.map(lambda a, p=p: a[p], BATCH))[0] for p in parts)
    np.testing.assert_allclose(sharded(mesh, jr.compose(NLL), BATCH.as_local()), own, rtol=1e-5)


def test_what_adds_up_is_right(mesh):
    total = jr.compose(lambda x, batch: batch.sum(-x))
    np.testing.assert_allclose(sharded(mesh, total, BATCH), total(X, BATCH)[0], rtol=1e-5)


def test_under_jit_a_mean_is_of_the_whole_batch_however_it_is_sharded(mesh):
    sharding = jax.NamedSharding(mesh, P("data"))
    x, batch = jax.tree.map(lambda a: jax.device_put(a, sharding), (X, BATCH))
    np.testing.assert_allclose(jax.jit(jr.compose(NLL))(x, batch)[0], NLL(X, BATCH)[0], rtol=1e-5)


def test_a_vmap_with_a_name_is_no_shard():
    def row(x, mask):
        return NLL(x[None], {"mask": mask[None]})[0]

    values = jax.vmap(row, axis_name="rows")(X, MASK)
    np.testing.assert_allclose(values, [row(x, m) for x, m in zip(X, MASK, strict=True)], rtol=1e-6)


def test_the_flag_is_kept_by_what_keeps_a_batch():
    batch = BATCH.as_local()
    assert batch.with_arrays(b=REF).local
    assert jax.jit(lambda b: b)(batch).local
    assert not jr.TokenBatch.from_arrays(**batch).local
