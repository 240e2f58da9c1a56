"""Open Character Training on a small model: a preference stage that couples rows, then a supervised one.

Preference stage: DPO (β = 0.1) + 0.1 × the chosen answers' mean token NLL + 0.001 × the mean squared
policy/reference log-ratio over chosen and rejected. Supervised stage: the batch mean of each example's mean
answer-token NLL. The pairs are made here: kind answers against curt ones.

    python examples/open_character.py
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import terminal

import jaxreg as jr

CONTEXT, WIDTH, VOCABULARY = 12, 96, 128
TOPICS = ["the weather", "my essay", "a bug", "chess", "the train", "a recipe", "my garden", "a song"]
KIND = ["Happy to help with {}!", "Good question about {}. Let us look.", "Let us sort out {} together."]
CURT = ["Figure out {} yourself.", "{}? No.", "I do not care about {}."]


def pairs() -> list[dict[str, np.ndarray]]:
    """Rows that alternate, chosen and rejected: bytes before each byte of the answer, and that byte."""
    rows = []
    for topic, kind, curt in itertools.product(TOPICS, KIND, CURT):
        for answer in (kind, curt):
            prompt, text = f"Tell me about {topic}.\n", answer.format(topic) + "\n"
            data = np.frombuffer((" " * CONTEXT + prompt + text).encode(), np.uint8).astype(np.int32)
            at = np.arange(len(data) - len(text), len(data))
            rows.append({"before": data[at[:, None] + np.arange(-CONTEXT, 0)], "target_tokens": data[at]})
    return rows


def initial_params(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"bytes": (VOCABULARY, WIDTH), "mix": (CONTEXT * WIDTH, WIDTH), "head": (WIDTH, VOCABULARY)}
    return {
        name: jax.random.normal(key, shape) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logprobs(params: dict[str, jax.Array], batch: jr.TokenBatch) -> jax.Array:
    """Logprob of every answer byte given the bytes before it: [B, T]."""
    x = params["bytes"][batch["before"]].reshape(*batch.shape, CONTEXT * WIDTH)
    logits = jnp.tanh(x @ params["mix"]) @ params["head"]
    targets = batch["target_tokens"][..., None]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]


def chosen_nll(lp: jax.Array, batch: jr.TokenBatch) -> jax.Array:
    """The mean token NLL of the chosen answers, the even rows."""
    chosen = (jnp.arange(lp.shape[0]) % 2 == 0)[:, None]
    return batch.mean(-batch.where(lp), weights=batch.weights * chosen)


def preference_objective(forward: Any = logprobs) -> jr.CompositeLoss:
    """Of a model's params, or, with forward=None, of logprobs."""
    return jr.compose(
        jr.losses.DPO(beta=0.1),
        [
            jr.RegularizerSpec(name="chosen_nll", fn=chosen_nll, weight=0.1),
            jr.RegularizerSpec(name="log_ratio", fn=jr.regularizers.LogRatioL2(), weight=0.001),
        ],
        forward=forward,
        track_grad_norms=True,
    )


def supervised_objective() -> jr.CompositeLoss:
    return jr.compose(jr.losses.CrossEntropy(reduction="datum_mean"), forward=logprobs)


def train(
    objective: jr.CompositeLoss, params: Any, batches: list[jr.TokenBatch], steps: int, stop: terminal.Stop
) -> Any:
    """The params after so many steps, or after fewer, where it is told to stop."""
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(objective: Any, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jr.CustomLossOutput]:
        (_, out), grads = objective.value_and_grad(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, out

    params = jax.tree.map(jnp.copy, params)
    for i in stop.range(steps):
        params, opt_state, out = step(objective, params, opt_state, batches[i % len(batches)])
        if i % max(1, steps // 6) == 0 or i == steps - 1:
            flat = out.to_flat_dict()
            shown = [f"step {i:4d}", f"loss {flat['loss/total']:.4f}"]
            shown += [f"{k.split('/')[-1]} {v:.3f}" for k, v in flat.items() if k.startswith("loss/base/")]
            shown += [f"{n} {t.contribution:+.4f}" for n, t in out.regularizers.items()]
            print("  ".join(shown))
    return params


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = terminal.Parser(__doc__)
    parser.add_argument("--steps", type=terminal.steps, default=120, help="of each stage; default: 120")
    parser.add_argument("--seed", type=terminal.seed, default=0)
    options = parser.parse_args(arguments)
    rows, rng = pairs(), np.random.default_rng(options.seed)
    start = initial_params(options.seed)

    # The reference's logprobs are computed once, and travel with the data.
    whole = jr.TokenBatch.pack(rows)
    reference = whole.unpack(jax.jit(logprobs)(start, whole))
    order = rng.permutation(len(rows) // 2)
    paired = [[rows[2 * i + j] | {"ref_logprobs": reference[2 * i + j]} for j in (0, 1)] for i in order]
    batches = [
        jr.TokenBatch.pack_pairs(*zip(*paired[i : i + 8], strict=True)) for i in range(0, len(paired), 8)
    ]

    chosen = [jr.TokenBatch.pack([pair[0] for pair in paired[i : i + 16]]) for i in range(0, len(paired), 16)]
    with terminal.stoppable() as stop, jr.telemetry.attached(terminal.tell_of_compiling):
        print("preference stage")
        tuned = train(preference_objective(), start, batches, options.steps, stop)
        if not stop:
            print("supervised stage, on the chosen answers")
            tuned = train(supervised_objective(), tuned, chosen, options.steps, stop)

    _, out = preference_objective()(tuned, batches[0])
    metrics = {k: float(v) for k, v in out.base_loss.custom.items()}
    print(f"accuracy {metrics['accuracy']:.2f}, margin {metrics['margin']:.2f}")
    return metrics


if __name__ == "__main__":
    terminal.run(main)
