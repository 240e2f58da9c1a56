"""When XLA compiles a program with an objective in it, and why it had to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxreg.base.events import emit, while_listening
from jaxreg.core.plan import Plan

TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
SHOWN = 4  # of the leaves that changed


_NOTHING = "no shape or dtype of the objective: a function made anew, weak types, sharding, other arguments"


class _Signature(NamedTuple):
    """What a program is compiled for. Hashes and strings, so that it keeps nothing alive."""

    functions: dict[str, int]  # by what they are called
    leaves: dict[str, str]  # by path: float32[4, 128]


class _Running(threading.local):
    """What this thread is doing."""

    def __init__(self) -> None:
        self.arguments: tuple[Plan, Any] | None = None  # of the objective that is being called
        self.traced: tuple[float, Plan, _Signature] | None = None  # the objective inside another's program
        self.around: set[str] = set()  # the programs that this objective is inside of
        self.seconds: dict[str, float] = {}  # spent on a program so far


_running = _Running()
_known: dict[tuple[tuple[str, ...], int], _Signature] = {}  # by the program's and terms' names, and functions
_MOST_KNOWN = 256


@contextlib.contextmanager
def calling(plan: Plan, arguments: Any, traced: bool) -> Iterator[None]:
    """An objective is called with these arguments; ``traced``, inside a program of somebody else's."""
    if traced:
        # A tracer does not outlive this call, so what it is is read now.
        _running.traced = time.time(), plan, _signature(plan, arguments)
        _running.around = set()
        yield
        return
    before, _running.arguments = _running.arguments, (plan, arguments)
    try:
        yield
    finally:
        _running.arguments = before


def _on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
    seconds, name = duration_secs, str(kwargs.get("fun_name", ""))
    name = name[4:-1] if name.startswith("jit(") else name
    if event == TRACED:
        # The function whose tracing began before the objective's own has it inside.
        if _running.traced is not None and time.time() - seconds <= _running.traced[0]:
            _running.around.add(name)
        _running.seconds[name] = seconds
    elif event == LOWERED:
        _running.seconds[name] = _running.seconds.get(name, 0.0) + seconds
    elif event == COMPILED:
        seconds += _running.seconds.pop(name, 0.0)
        if name.startswith("jaxreg_") and _running.arguments is not None:
            plan, arguments = _running.arguments
            _tell(name, plan, _signature(plan, arguments), seconds)
        elif name in _running.around and _running.traced is not None:
            _, plan, signature = _running.traced
            _running.traced, _running.around = None, set()
            _tell(name, plan, signature, seconds)
        _running.seconds.clear()


def _tell(program: str, plan: Plan, signature: _Signature, seconds: float) -> None:
    functions = hash(tuple(signature.functions.items()))
    name = (program, *plan.names)
    before = _known.pop((name, functions), None)
    if before is None:  # another objective of this name, the latest
        before = next((old for (other, _), old in reversed(_known.items()) if other == name), None)
    _known[name, functions] = signature
    if len(_known) > _MOST_KNOWN:
        del _known[next(iter(_known))]
    emit(
        "compile",
        measurements={"duration": seconds},
        metadata={
            "program": program,
            "changed": _changed(before, signature),
            "terms": plan.names[1:],
            "functions": functions,
        },
    )


def _changed(before: _Signature | None, now: _Signature) -> list[str]:
    if before is None:
        return ["compiled for the first time"]
    changed = [
        f"{name}: another function than before" for name in _differing(before.functions, now.functions)
    ]
    leaves = _differing(before.leaves, now.leaves)
    changed += [
        f"{path}: {before.leaves.get(path, 'absent')} -> {now.leaves.get(path, 'absent')}"
        for path in leaves[:SHOWN]
    ]
    if len(leaves) > SHOWN:
        changed.append(f"and {len(leaves) - SHOWN} more arrays")
    return changed or [_NOTHING]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _signature(plan: Plan, arguments: Any) -> _Signature:
    functions = {
        ("base loss" if i == 0 else f"term {name!r}"): hash((plan.parts[i], plan.places[i]))
        for i, name in enumerate(plan.names)
    }
    functions |= {
        f"the schedule of term {name!r}": hash(schedule)
        for name, schedule in zip(plan.names, plan.schedules, strict=True)
        if schedule is not None
    }
    functions |= {"forward": hash(plan.model), "track_grad_norms": hash(plan.norms)}
    named = dict(zip(("objective", "x", "batch", "state", "key"), arguments, strict=False))
    leaves = {
        "".join((key.key, jax.tree_util.keystr(tuple(path)))): _described(leaf)
        for (key, *path), leaf in jax.tree_util.tree_leaves_with_path(named)
    }
    return _Signature(functions, leaves)


def _described(leaf: Any) -> str:
    shape = getattr(leaf, "shape", ())
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(shape)}"


while_listening(
    lambda: jax.monitoring.register_event_duration_secs_listener(_on_duration),
    lambda: jax.monitoring.unregister_event_duration_listener(_on_duration),
)
