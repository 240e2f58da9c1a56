"""Open Character Training through a remote API: preferences, then supervision. See `open_character.py`.

The preference stage couples rows (DPO over pairs, a mean over the chosen answers), so no loss that a server
applies example by example can express it.

    python examples/remote_open_character.py [--base-url URL --model NAME] [--steps N] [--check]
"""

from __future__ import annotations

import itertools

import remote as api
import terminal
from open_character import CURT, KIND, TOPICS, preference_objective

import jaxreg as jr


def main(arguments: list[str] | None = None) -> list[jr.client.CustomResult]:
    chosen = api.options(__doc__).parse_args(arguments)
    remote = api.connect(chosen)
    pairs = [
        [api.answer(remote, f"Tell me about {topic}.\n", text.format(topic) + "\n") for text in both]
        for topic, both in itertools.product(TOPICS, zip(KIND, CURT, strict=True))
    ]
    data = [*itertools.chain(*pairs)]  # rows alternate: chosen, rejected
    start = remote.logprobs(data)
    data = [remote.with_inputs(d, ref_logprobs=ref) for d, ref in zip(data, start, strict=True)]

    supervised = jr.compose(jr.losses.CrossEntropy(reduction="datum_mean"))
    with terminal.stoppable() as stop:
        print("preference stage")
        results = api.train(remote, data, preference_objective(forward=None), chosen)
        if results:
            accuracy = {k: round(float(v), 2) for k, v in results[-1].output.base_loss.custom.items()}
            print(f"  {accuracy}")
        if not stop:
            print("supervised stage, on the chosen answers")
            results += api.train(remote, data[::2], supervised, chosen)
    return results


if __name__ == "__main__":
    terminal.run(main)
