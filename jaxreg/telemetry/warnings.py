"""What a run should be warned of: terms that do nothing, that take over, or that break; endless compiling."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxreg.base.events import Event, emit
from jaxreg.core.spec import BASE, TOTAL
from jaxreg.events.log import Inputs
from jaxreg.recorder.diagnose import diagnose

LOGGER = logging.getLogger("jaxreg.warnings")
SHOWN = 3  # places of a number that is not finite


class Warnings:
    """A handler that looks out for trouble and tells it, once an episode, as a ``warning`` event and through
    the logger ``jaxreg.warnings``. `JSONL`, `LiveTable` and the other sinks write the events down.

    =================  ====================================================================================
    kind               when
    =================  ====================================================================================
    ``zero_value``     a term's value has been exactly 0 for ``zero_steps`` steps, at a weight above 0
    ``zero_gradient``  the same of its gradient's norm, where norms are tracked
    ``dominates``      a regularizer has had more than ``share`` of the gradient (its weighted norm, of the
                       sum of all terms' weighted norms) for ``share_steps`` steps
    ``nonfinite``      a number is not finite: with the terms, and, where the step's inputs are known (they
                       are with a remote model, and where the loop gives them to `log`), datum and token
    ``impossible``     the base loss reports a mean negative log-likelihood (``nll``) below 0, which logprobs
                       never give: x is of something else, such as probabilities or scores
    ``recompiles``     the same objective was compiled ``compiles`` times within ``compile_steps`` steps:
                       with what changed, shapes or functions
    ``conflicts``      two terms' gradients have pulled against each other, cosine below ``cosine``, for
                       ``conflict_steps`` steps, where a Gramian is tracked
    ``stands_still``   the state that the objective is given has been that of one step for ``still_steps``
                       steps: schedules and memory do not move
    =================  ====================================================================================

    A host term that gives no gradient says so itself, and is not warned of. A limit of None switches its
    warning off.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [
      ...     dict(name="hinge", fn=lambda x, batch: jnp.sum(jnp.maximum(0.0, x - 9)), weight=1.0)])
      >>> show = lambda event: event.name == "warning" and print(event.step, event.metadata["message"])
      >>> with jr.telemetry.attached(jr.telemetry.Warnings(zero_steps=3), show):
      ...     for step in range(5):
      ...         jr.telemetry.log(objective(jnp.ones(3))[1], step=step)
      2 term 'hinge': its value has been 0 for 3 steps
    """

    _when_slow: ClassVar[str | None] = None  # it looks for where a NaN began, once an episode

    def __init__(
        self,
        *,
        zero_steps: int | None = 100,
        share: float | None = 0.95,
        share_steps: int = 20,
        compiles: int | None = 8,
        compile_steps: int = 50,
        still_steps: int | None = 20,
        cosine: float = -0.2,
        conflict_steps: int | None = 100,
    ) -> None:
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share is between 0 and 1, or None; got {share!r}")
        if not -1 <= cosine <= 0:
            raise ValueError(f"cosine is between -1 and 0, got {cosine!r}")
        for name, number in (
            ("zero_steps", zero_steps),
            ("share_steps", share_steps),
            ("compiles", compiles),
            ("compile_steps", compile_steps),
            ("still_steps", still_steps),
            ("conflict_steps", conflict_steps),
        ):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name} is a whole number ≥ 1, got {number!r}")
        self._zero_steps, self._share, self._share_steps = zero_steps, share, share_steps
        self._compiles, self._compile_steps = compiles, compile_steps
        self._still_steps, self._state_step = still_steps, -1
        self._cosine, self._conflict_steps = cosine, conflict_steps
        self._lasting: collections.Counter[tuple[str, str]] = collections.Counter()  # steps, by kind and term
        self._broken: set[str] = set()  # terms that are not finite just now
        self._steps = 0
        self._compiled: dict[tuple[Any, ...], collections.deque[int]] = {}  # at which steps, by program

    def __call__(self, event: Event) -> None:
        """Look at an event."""
        if event.name == "custom_loss.stop":
            self._steps += 1
            report = event.metadata["report"]
            self._look_at_terms(report, event.step)
            self._look_at_pairs(report.get("cosines", {}), event.step)
            self._look_at_nll(report["base_loss"]["custom"].get("nll"), event.step)
            self._look_at_state(event.metadata.get("state_step"), event.step)
            self._look_at_numbers(report.get("nonfinite", []), event.step, event.metadata["inputs"])
        elif event.name == "custom_loss.exception":
            self._steps += 1
            if terms := getattr(event.metadata["error"], "terms", ()):
                self._look_at_numbers(terms, event.step, event.metadata["inputs"])
        elif event.name == "compile":
            self._look_at_compile(event)

    def _look_at_terms(self, report: Mapping[str, Any], step: int | None) -> None:
        terms: Mapping[str, Any] = report["regularizers"]
        pull = {name: term["grad_norm_weighted"] for name, term in terms.items()}
        pulls = [report["base_loss"]["grad_norm"], *pull.values()]
        total = None if None in pulls else sum(pulls)
        for name, term in terms.items():
            on = bool(term["weight"])
            moves = term["custom"].get("host_trains") != 0.0
            self._zero("zero_value", "value", name, on and term["value"] == 0, step)
            self._zero("zero_gradient", "gradient", name, on and moves and term["grad_norm"] == 0, step)
            if self._share is not None:
                has = pull[name] / total if total else 0.0
                if self._lasts("dominates", name, has > self._share, self._share_steps):
                    what = f"{has:.1%} of the gradient has been its for {self._share_steps} steps"
                    _tell("dominates", name, f"term {name!r}: {what}", step, {"share": has})

    def _look_at_pairs(self, cosines: Mapping[str, Mapping[str, float | None]], step: int | None) -> None:
        if self._conflict_steps is None:
            return
        for first, others in cosines.items():
            for second, value in others.items():
                against = value is not None and value < self._cosine
                if self._lasts("conflicts", f"{first}/{second}", against, self._conflict_steps):
                    who = " and ".join(
                        "the base loss" if n == BASE else f"term {n!r}" for n in (first, second)
                    )
                    what = f"{who} have pulled against each other for {self._conflict_steps} steps"
                    remedy = "an aggregator (UPGrad) takes steps that make neither worse"
                    numbers = {"cosine": float(value or 0)}
                    _tell("conflicts", second, f"{what}, cosine {value:.2f}: {remedy}", step, numbers)

    def _zero(self, kind: str, what: str, name: str, is_zero: bool, step: int | None) -> None:
        if self._zero_steps is not None and self._lasts(kind, name, is_zero, self._zero_steps):
            _tell(kind, name, f"term {name!r}: its {what} has been 0 for {self._zero_steps} steps", step)

    def _lasts(self, kind: str, name: str, holds: bool, steps: int) -> bool:
        """Whether it has held for just this many steps; counting begins anew when it does not hold."""
        if not holds:
            self._lasting.pop((kind, name), None)
            return False
        self._lasting[kind, name] += 1
        return self._lasting[kind, name] == steps

    def _look_at_nll(self, nll: float | None, step: int | None) -> None:
        if self._lasts("impossible", BASE, nll is not None and nll < -1e-3, 1):
            what = f"the mean negative log-likelihood is {nll:.4g}, below 0, so x holds no logprobs"
            remedy = "of probabilities take the logarithm, of logits say inputs='logits'"
            _tell("impossible", None, f"base loss: {what}; {remedy}", step)

    def _look_at_state(self, state_step: int | None, step: int | None) -> None:
        stands = state_step is not None and state_step == self._state_step
        self._state_step = -1 if state_step is None else state_step
        # The first of them was seen before it stood still.
        if self._still_steps is not None and self._lasts("stands_still", "", stands, self._still_steps - 1):
            what = f"the state has been that of step {self._state_step} for {self._still_steps} steps"
            remedy = "pass state=objective.init() at the first step only, and state=out.state from then on"
            _tell("stands_still", None, f"{what}: {remedy}", step)

    def _look_at_numbers(self, terms: Sequence[str], step: int | None, inputs: Inputs | None) -> None:
        new = [name for name in terms if name not in self._broken]
        self._broken = set(terms)
        if not new:
            return
        places = [] if inputs is None else _places(inputs)
        more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        where = f" First: {'; then '.join(places[:SHOWN])}{more}" if places else ""
        for name in new:
            _tell("nonfinite", name, f"{_called(name)} not finite.{where}", step)

    def _look_at_compile(self, event: Event) -> None:
        if self._compiles is None:
            return
        changed = event.metadata["changed"]
        functions = any("another function" in what for what in changed)
        # Shapes count for one objective; functions made anew, for all of this name together.
        which = "functions" if functions else event.metadata["functions"]
        key = (event.metadata["program"], *event.metadata["terms"], which)
        at = self._compiled.setdefault(key, collections.deque(maxlen=self._compiles))
        at.append(self._steps)
        if len(at) == self._compiles and self._steps - at[0] <= self._compile_steps:
            at.clear()
            remedy = (
                "make the objective, its functions and its schedules once, before the loop"
                if functions
                else "pad to few shapes: TokenBatch.pack(data, length_buckets=[512, 1024])"
            )
            _tell(
                "recompiles",
                None,
                f"{key[0]} was compiled {self._compiles} times within {self._compile_steps} steps; the last "
                f"time since {'; '.join(changed)}. Perhaps: {remedy}",
                event.step,
            )


def _places(inputs: Inputs) -> list[str]:
    try:
        return [str(finding) for finding in diagnose(inputs)]
    except Exception as error:  # such as arrays that were donated; the warning itself is worth more
        LOGGER.debug("where it began cannot be told: %s", error)
        return []


def _called(name: str) -> str:
    if name == TOTAL:
        return "the total overflowed though every term is finite: it is"
    return "the base loss is" if name == BASE else f"term {name!r} is"


def _tell(
    kind: str, term: str | None, message: str, step: int | None, numbers: Mapping[str, float] | None = None
) -> None:
    LOGGER.warning("%s%s", "" if step is None else f"step {step}: ", message)
    emit(
        "warning",
        step=step,
        measurements=numbers,
        metadata={"kind": kind, "term": term, "message": message},
    )
