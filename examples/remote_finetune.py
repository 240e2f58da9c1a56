"""Supervised fine-tuning through a remote API, held near the start: cross-entropy + KL to it + focal loss.

python examples/remote_finetune.py [--base-url URL --model NAME] [--steps N] [--check]
"""

from __future__ import annotations

import remote as api
import terminal
from open_character import KIND, TOPICS

import jaxreg as jr


def main(arguments: list[str] | None = None) -> list[jr.client.CustomResult]:
    chosen = api.options(__doc__).parse_args(arguments)
    remote = api.connect(chosen)
    data = [
        api.answer(remote, f"Tell me about {topic}.\n", kind.format(topic) + "\n")
        for topic in TOPICS
        for kind in KIND
    ]
    start = remote.logprobs(data)
    data = [remote.with_inputs(d, ref_logprobs=ref) for d, ref in zip(data, start, strict=True)]
    objective = jr.compose(
        jr.losses.CrossEntropy(reduction="token_mean"),
        [
            jr.RegularizerSpec(name="kl", fn=jr.regularizers.KL(estimator="k2"), weight=0.02),
            jr.RegularizerSpec(name="focal", fn=jr.regularizers.Focal(), weight=0.1),
        ],
        track_grad_norms=True,
    )
    return api.train(remote, data, objective, chosen)


if __name__ == "__main__":
    terminal.run(main)
