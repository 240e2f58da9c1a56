"""Preference training through a remote API: DPO + KL to the reference + focal loss, one weight on a schedule.

python examples/remote_preferences.py [--base-url URL --model NAME] [--steps N] [--check]
"""

from __future__ import annotations

import itertools

import optax
import remote as api
import terminal
from open_character import CURT, KIND, TOPICS

import jaxreg as jr


def main(arguments: list[str] | None = None) -> list[jr.client.CustomResult]:
    chosen = api.options(__doc__).parse_args(arguments)
    remote = api.connect(chosen)
    pairs = itertools.product(TOPICS, zip(KIND, CURT, strict=True))
    data = [
        api.answer(remote, f"Tell me about {topic}.\n", text.format(topic) + "\n")
        for topic, both in pairs
        for text in both  # rows alternate: chosen, rejected
    ]
    start = remote.logprobs(data)
    data = [remote.with_inputs(d, ref_logprobs=ref) for d, ref in zip(data, start, strict=True)]
    objective = jr.compose(
        jr.losses.DPO(beta=0.1),
        [
            jr.RegularizerSpec(
                name="kl",
                fn=jr.regularizers.KL(estimator="k2"),
                weight=optax.linear_schedule(0.0, 0.05, max(1, chosen.steps // 2)),
            ),
            jr.RegularizerSpec(name="focal", fn=jr.regularizers.Focal(), weight=0.01),
        ],
        track_grad_norms=True,
    )
    return api.train(remote, data, objective, chosen)


if __name__ == "__main__":
    terminal.run(main)
