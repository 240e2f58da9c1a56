"""Distillation through a remote API: reverse KL over a teacher's top K tokens at every place.

The teacher here counts which byte follows which in a text; its K likeliest next tokens are the targets,
[T, K], and their logprobs travel with the data. Any other teacher's top K would do.

    python examples/remote_distillation.py [--base-url URL --model NAME] [--steps N] [--check]
"""

from __future__ import annotations

import itertools

import numpy as np
import remote as api
import terminal
from open_character import KIND, TOPICS

import jaxreg as jr

K = 4


def teacher(texts: list[list[int]]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """By token: the K likeliest next ones, and their logprobs."""
    counts: dict[int, dict[int, float]] = {}
    everything = sorted({token for tokens in texts for token in tokens})
    for tokens in texts:
        for now, following in itertools.pairwise(tokens):
            row = counts.setdefault(now, dict.fromkeys(everything, 0.01))
            row[following] += 1.0
    best, logprobs = {}, {}
    for now, row in counts.items():
        top = sorted(row, key=row.__getitem__, reverse=True)[:K]
        best[now] = np.asarray(top, np.int64)
        logprobs[now] = np.log(np.asarray([row[t] for t in top]) / sum(row.values())).astype(np.float32)
    return best, logprobs


def main(arguments: list[str] | None = None) -> list[jr.client.CustomResult]:
    chosen = api.options(__doc__).parse_args(arguments)
    remote = api.connect(chosen)
    texts = [remote.encode(kind.format(topic) + "\n") for topic in TOPICS for kind in KIND]
    best, logprobs = teacher(texts)
    data = [
        remote.datum(
            tokens[:-1],
            {
                "target_tokens": np.stack([best[token] for token in tokens[:-1]]),
                "teacher_logprobs": np.stack([logprobs[token] for token in tokens[:-1]]),
            },
        )
        for tokens in texts
    ]
    objective = jr.compose(jr.losses.ReverseKLTopK(reduction="token_mean"), track_grad_norms=True)
    return api.train(remote, data, objective, chosen)


if __name__ == "__main__":
    terminal.run(main)
