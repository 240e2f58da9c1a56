"""Calibrate answers through a remote API: KL to a target distribution over 21 answer tokens, at one place.

A question is answered by one of 21 tokens (a scale from 0 to 20, say). Their logprobs are asked for
at the last position, [T, 21], and every other position has no weight.

    python examples/remote_answers.py [--base-url URL --model NAME] [--steps N] [--check]
"""

from __future__ import annotations

import numpy as np
import remote as api
import terminal

import jaxreg as jr

QUESTIONS = {
    "How warm is it today, A to U?\n": 13.0,
    "How long is a minute, A to U?\n": 6.0,
    "How tall is a tree, A to U?\n": 17.0,
    "How hard is chess, A to U?\n": 10.0,
}
ANSWERS = "ABCDEFGHIJKLMNOPQRSTU"


def main(arguments: list[str] | None = None) -> list[jr.client.CustomResult]:
    chosen = api.options(__doc__).parse_args(arguments)
    remote = api.connect(chosen)
    answers = np.asarray([remote.encode(letter)[0] for letter in ANSWERS], np.int64)
    data = []
    for question, centre in QUESTIONS.items():
        tokens = remote.encode(question)
        wanted = -0.5 * ((np.arange(len(answers)) - centre) / 2.0) ** 2
        wanted = (wanted - np.log(np.exp(wanted).sum())).astype(np.float32)
        last = np.zeros(len(tokens), np.float32)
        last[-1] = 1.0
        inputs = {
            "target_tokens": np.tile(answers, (len(tokens), 1)),
            "teacher_logprobs": np.tile(wanted, (len(tokens), 1)),
            "weights": last,
        }
        data.append(remote.datum(tokens, inputs))
    objective = jr.compose(jr.losses.KLTopK(reduction="token_sum"), track_grad_norms=True)
    return api.train(remote, data, objective, chosen)


if __name__ == "__main__":
    terminal.run(main)
