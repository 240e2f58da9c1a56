"""What the remote recipes share: a client (embedded by default), datums from text, and the training loop.

    python examples/remote_finetune.py                            # no server, no account
    python examples/remote_finetune.py --base-url http://localhost:8000 --model Qwen/Qwen3-8B

A real server is spoken to through the Tinker SDK (``pip install tinker``), with its key in TINKER_API_KEY.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import terminal

import jaxreg as jr


@dataclasses.dataclass(frozen=True)
class Remote:
    """A training client, and how to speak to it.

    Attributes:
      datum: makes a datum of token ids and ``loss_fn_inputs``.
      encode: text to token ids.
      adam: makes the optimizer's settings, ``adam(learning_rate=...)``.
    """

    client: Any
    datum: Callable[[Sequence[int], dict[str, Any]], Any]
    encode: Callable[[str], list[int]]
    adam: Callable[..., Any]

    def logprobs(self, data: Sequence[Any]) -> list[np.ndarray]:
        """The logprobs of all targets under the present weights, such as a reference's."""
        zeros = [np.zeros(np.shape(_array(d.loss_fn_inputs["target_tokens"])), np.float32) for d in data]
        asked = [
            self.datum(_tokens(d), {"target_tokens": _array(d.loss_fn_inputs["target_tokens"]), "weights": z})
            for d, z in zip(data, zeros, strict=True)
        ]
        outputs = self.client.forward(asked, "cross_entropy").result().loss_fn_outputs
        return [_array(output["logprobs"]).reshape(z.shape) for output, z in zip(outputs, zeros, strict=True)]

    def with_inputs(self, datum: Any, **inputs: Any) -> Any:
        """The datum with more arrays for the terms."""
        return self.datum(_tokens(datum), {**datum.loss_fn_inputs, **inputs})


def options(description: str | None) -> terminal.Parser:
    parser = terminal.Parser(description)
    parser.add_argument(
        "--base-url",
        type=terminal.url,
        help="a server of the Tinker API; without it, a trainer in this process",
    )
    parser.add_argument("--model", default="Qwen/Qwen3-8B", help="the server's base model")
    parser.add_argument(
        "--tokenizer", help="'bytes', or a path or name for transformers; by default what the SDK finds"
    )
    parser.add_argument(
        "--unroll-top-k", action="store_true", help="for servers that know one target a token, as TuFT does"
    )
    parser.add_argument("--steps", type=terminal.steps, default=30)
    parser.add_argument("--learning-rate", type=terminal.rate, default=3e-3)
    parser.add_argument("--check", action="store_true", help="first measure whether the server is linear")
    return parser


def connect(chosen: argparse.Namespace) -> Remote:
    """The embedded trainer, whose tokens are bytes, or a LoRA training client of a server."""
    print(f"training on {chosen.base_url or 'a small model in this process'} ...", flush=True)
    if not chosen.base_url:
        client = jr.client.EmbeddedTrainingClient(vocabulary=256)
        remote = Remote(client, jr.client.Datum, _encoder("bytes", client), jr.client.AdamParams)
    else:
        try:
            import tinker
        except ModuleNotFoundError as error:
            raise ImportError('--base-url needs the Tinker SDK: pip install "jaxreg[tinker]"') from error
        try:
            service = tinker.ServiceClient(base_url=chosen.base_url)
            client = service.create_lora_training_client(base_model=chosen.model, rank=16)
        except tinker.TinkerError as error:
            raise ConnectionError(f"{chosen.base_url} gives no training client: {error}") from error

        def datum(tokens: Sequence[int], inputs: dict[str, Any]) -> Any:
            model_input = tinker.ModelInput.from_ints(list(tokens))
            return tinker.Datum(model_input=model_input, loss_fn_inputs=inputs)

        remote = Remote(client, datum, _encoder(chosen.tokenizer, client), tinker.AdamParams)
    if chosen.check:
        print(jr.client.check_backend(remote.client))
    return remote


def answer(remote: Remote, prompt: str, text: str, **inputs: Any) -> Any:
    """A datum that says text after a prompt: only the answer's tokens have weight."""
    before, after = remote.encode(prompt), remote.encode(text)
    tokens = np.asarray(before + after, np.int64)
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[len(before) - 1 :] = 1.0
    return remote.datum(tokens[:-1].tolist(), {"target_tokens": tokens[1:], "weights": weights, **inputs})


def train(
    remote: Remote, data: Sequence[Any], objective: jr.CompositeLoss, chosen: argparse.Namespace
) -> list[jr.client.CustomResult]:
    """Train on all the data at once, and print what every term does, until Ctrl-C at most."""
    settings = remote.adam(learning_rate=chosen.learning_rate)
    state, results = objective.init(), []
    with terminal.stoppable() as stop, jr.telemetry.attached(terminal.tell_of_compiling):
        for i in stop.range(chosen.steps):
            step = jr.client.forward_backward_custom(
                remote.client,
                data,
                objective,
                state=state,
                top_k="unrolled" if chosen.unroll_top_k else "native",
            )
            update = remote.client.optim_step(settings)
            result = step.result()
            update.result()
            state = result.output.state
            results.append(result)
            if i % max(1, chosen.steps // 6) == 0 or i == chosen.steps - 1:
                print(shown(i, result.output))
    return results


def shown(step: int, output: jr.CustomLossOutput) -> str:
    """A line about a step."""
    terms = "  ".join(
        f"{name} {term.contribution:+.3f} (grad {term.grad_norm_weighted:.2g})"
        for name, term in output.regularizers.items()
    )
    base = f"base {output.base_loss.value:8.3f}"
    return f"step {step:3d}  loss {output.loss_total:8.3f}  {base}  {terms}".rstrip()


def _encoder(name: str | None, client: Any) -> Callable[[str], list[int]]:
    if name == "bytes":
        return lambda text: list(text.encode())
    if name is None:
        tokenizer = client.get_tokenizer()
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)


def _tokens(datum: Any) -> list[int]:
    given = datum.model_input
    return list(given.to_ints() if hasattr(given, "to_ints") else given)
