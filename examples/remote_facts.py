"""Fine-tuning with a term that asks a service over HTTP, and goes on while that is killed and restarted.

python examples/remote_facts.py [--steps N] [--base-url URL --model NAME]

The text has telephone numbers in it, and the model should learn all but these. The service says which
bytes they are; the term is the mean probability that the model gives them, with its gradient. A thread
asks while the compiled terms are computed. When the service is down, the last good value counts (its age
is the metric ``host_age``), nothing of it is trained, and the run goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import remote as api
import terminal

import jaxreg as jr

LETTERS = [
    "Please call Ana at {} about the lease.\n",
    "My new number is {}, the old one is gone.\n",
    "If it rains, ring {} and ask for Tom.\n",
    "The garage ({}) opens at eight.\n",
]
NUMBERS = ["555-0134", "555-0172", "555-0199", "555-0101"]


class Facts:
    """``fn(data, logprobs)``: how likely the model finds what the service flags."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, data: Sequence[Any], logprobs: Sequence[np.ndarray]) -> tuple[float, dict, list]:
        texts = [np.asarray(datum.loss_fn_inputs["target_tokens"]).tolist() for datum in data]
        request = urllib.request.Request(self._url, json.dumps({"texts": texts}).encode())
        with urllib.request.urlopen(request, timeout=2) as answer:
            flags = [np.asarray(row, np.float32) for row in json.load(answer)["flags"]]
        flagged = max(1.0, float(sum(row.sum() for row in flags)))
        likely = [row * np.exp(lp) for row, lp in zip(flags, logprobs, strict=True)]
        value = float(sum(row.sum() for row in likely)) / flagged
        return value, {"flagged": flagged}, [row / flagged for row in likely]  # d exp(lp) = exp(lp)


class Service:
    """The service in a process of its own, which can be killed and started again on the same port."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self) -> None:
        program = [sys.executable, str(Path(__file__).with_name("facts_service.py")), str(self.port)]
        # In a group of its own: Ctrl-C is for the training, which ends the service when it has ended.
        self._process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, process_group=0)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().split()[-1])

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def running_service() -> Iterator[Service]:
    service = Service()
    service.start()
    try:
        yield service
    finally:
        service.kill()


def main(arguments: list[str] | None = None) -> list[jr.CustomLossOutput]:
    parser = api.options(__doc__)
    parser.set_defaults(steps=60)
    parser.add_argument("--log", type=Path, default=Path("runs/facts/run.jsonl"), help="the run's file")
    chosen = parser.parse_args(arguments)
    remote = api.connect(chosen)
    data = [
        api.answer(remote, "\n", letter.format(number))
        for letter, number in zip(LETTERS, NUMBERS, strict=True)
    ]
    settings = remote.adam(learning_rate=chosen.learning_rate)
    killed, restarted = chosen.steps // 3, 2 * chosen.steps // 3
    outputs: list[jr.CustomLossOutput] = []
    log = jr.telemetry.JSONL(terminal.new_run(chosen.log))
    with (
        terminal.stoppable() as stop,
        running_service() as service,
        jr.host.HostRegularizer(
            "facts", Facts(f"http://127.0.0.1:{service.port}/"), weight=20.0, timeout=5.0, on_error="last"
        ) as facts,
        jr.telemetry.attached(log, jr.telemetry.Warnings(), terminal.tell_of_compiling),
    ):
        objective = jr.compose(
            jr.losses.CrossEntropy(reduction="token_mean"),
            [
                jr.RegularizerSpec(name="focal", fn=jr.regularizers.Focal(), weight=0.01),
                facts,
            ],
            track_grad_norms=True,
        )
        began = time.perf_counter()
        for step in stop.range(chosen.steps):
            if step == killed:
                service.kill()
                print("          the service is killed")
            if step == restarted:
                service.start()
                print("          the service is started again")
            future = jr.client.forward_backward_custom(remote.client, data, objective, step=step)
            remote.client.optim_step(settings)
            outputs.append(future.result().output)
            if step % max(1, chosen.steps // 12) == 0 or step in (killed, restarted, chosen.steps - 1):
                print(shown(step, outputs[-1]))
    if outputs:
        print(f"{len(outputs)} steps in {time.perf_counter() - began:.1f} s; see them with")
        print(f"  python -m jaxreg watch {chosen.log} --once\n  python -m jaxreg report {chosen.log}")
    return outputs


def shown(step: int, output: jr.CustomLossOutput) -> str:
    term = output.regularizers["facts"]
    age = int(term.custom["host_age"])
    state = "asked now" if age == 0 else "left out" if age < 0 else f"of {age} steps ago, not trained"
    return (
        f"step {step:3d}  loss {output.loss_total:7.3f}  base {output.base_loss.value:6.3f}  "
        f"facts {term.value:.4f}  grad {term.grad_norm_weighted:.3g}  ({state})"
    )


if __name__ == "__main__":
    terminal.run(main)
