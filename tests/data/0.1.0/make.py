"""How the files beside it were made, by 0.1.0 on Python 3.11 and jax 0.10.1: ``python make.py FOLDER``."""

import contextlib
import dataclasses
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

out = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(0)


def tokens(n):
    return {
        "logprobs": -rng.uniform(0.1, 2, n).astype(np.float32),
        "ref_logprobs": -rng.uniform(0.1, 2, n).astype(np.float32),
        "advantages": rng.normal(size=n).astype(np.float32),
        "target_tokens": rng.integers(0, 9, n),
        "weights": np.r_[0.0, np.ones(n - 1)].astype(np.float32),
    }


batch = jr.TokenBatch.pack([tokens(n) for n in (5, 3, 4, 5)], length_buckets=[8])
x = np.where(batch.mask, -rng.uniform(0.1, 2, batch.shape), 0).astype(np.float32)
held = jr.regularizers.LogRatioL2(reference=jnp.full(batch.shape, -1.0))
objective = jr.compose(
    jr.losses.PPO(reduction="token_mean"),
    [
        jr.RegularizerSpec(name="kl", fn=jr.regularizers.KL(), weight=0.1),
        jr.RegularizerSpec(name="held", fn=held, weight=0.3),
        jr.RegularizerSpec(name="l1", fn=jr.regularizers.L1(), weight=0.01),
    ],
    track_grad_norms=jr.GradNorms(per_datum=True),
)
(loss, output), gradient = objective.value_and_grad(x, batch)
whole = {
    "objective": objective,
    "batch": batch,
    "x": x,
    "output": jax.tree.map(np.asarray, output),
    "gradient": np.asarray(gradient),
    "spec": jr.RegularizerSpec(name="entropy", fn=jr.regularizers.Entropy(), weight=0.5),
}
(out / "objective.pickle").write_bytes(pickle.dumps(whole))

three = {"w": np.ones(3, np.float32)}
needed = {"L2SP": {"reference": three}, "EWC": {"reference": three, "fisher": three}}
terms = []
for room in (jr.losses, jr.regularizers):
    for name in sorted(set(vars(room)) - {"GradientPenalty", "Length"}):
        if dataclasses.is_dataclass(kind := getattr(room, name)):
            term = kind(**needed.get(name, {}))
            arguments = {field.name: getattr(term, field.name) for field in dataclasses.fields(term)}
            terms.append((name, arguments, jr.compose(term)))
(out / "terms.pickle").write_bytes(pickle.dumps(terms))

with contextlib.ExitStack() as stack:
    stack.enter_context(jr.telemetry.attached(jr.telemetry.JSONL(out / "run.jsonl")))
    stack.enter_context(jr.telemetry.attached(jr.telemetry.FlightRecorder(out)))
    for step in range(4):
        at = x.copy()
        if step == 3:
            at[1, 1] = np.nan
        (_, output), _ = objective.value_and_grad(at, batch)
        jr.telemetry.log(output, step=step, inputs=jr.telemetry.Inputs(objective, at, batch, None, None))
