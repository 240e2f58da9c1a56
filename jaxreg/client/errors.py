"""What can go wrong at the edge, each with the step that failed and whether a gradient was applied."""

from __future__ import annotations

from typing import Literal, Self, TypeAlias

Step: TypeAlias = Literal["forward", "objective", "backward", "optim_step", "save", "load"]
Applied: TypeAlias = Literal["no", "maybe", "yes"]

_MEANING = {
    "no": "no gradient was sent; the remote model is as it was, and the step can be taken again",
    "maybe": "the server may have added this step's gradient to its accumulator, or a part of it: before "
    "you take the step again, load a saved state or accept that it may count twice",
    "yes": "the server has added this step's gradient to its accumulator: do not send it again",
}


class RemoteError(RuntimeError):
    """A step with a remote model failed.

    Attributes:
      step: which request, or ``"objective"`` for what is computed here between them.
      gradient_applied: ``"no"``, ``"maybe"`` or ``"yes"``.
    """

    def __init__(self, what: str, *, step: Step, gradient_applied: Applied) -> None:
        super().__init__(f"{step} step: {what} ({_MEANING[gradient_applied]})")
        self.step = step
        self.gradient_applied = gradient_applied


class RequestFailed(RemoteError):
    """The server refused, failed, or could not be reached; the SDK's own error is the cause."""


class RequestTimedOut(RemoteError):
    """No answer within ``timeout``. The request is not sent again; asking for the result again waits on."""


class BadReply(RemoteError):
    """The server's answer does not fit the data: too few outputs, wrong lengths, NaN or −inf logprobs."""


class NonFiniteGradient(RemoteError):
    """d(loss)/d(logprobs) is not finite; the terms that made it so are named, and nothing was sent.

    Attributes:
      terms: their names, ``"base_loss"`` for the base loss; empty where only the weighted sum is not finite.
      datum: the first datum that it happened to.
    """

    def __init__(self, what: str, *, terms: tuple[str, ...], datum: int) -> None:
        super().__init__(what, step="objective", gradient_applied="no")
        self.terms, self.datum = terms, datum

    @classmethod
    def at(cls, found: tuple[int, list[int], float], culprit: str, terms: tuple[str, ...]) -> Self:
        """Of a number that `first_nonfinite` found."""
        datum, at, number = found
        what = f"d(loss)/d(logprobs) of datum {datum} at {at} is {number}; it comes from {culprit}"
        return cls(what, terms=terms, datum=datum)


class LogprobDrift(RemoteError):
    """The logprobs that the gradient was computed at are not the model's own."""
