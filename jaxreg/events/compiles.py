"""When XLA compiles a program with an objective in it, and why it had to."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxreg.base.events import emit, while_listening
from jaxreg.core.calls import Signature, running, signature_of
from jaxreg.core.plan import Plan

TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
SHOWN = 4  # of the leaves that changed
_NOTHING = "no shape or dtype of the objective: a function made anew, weak types, sharding, other arguments"


@dataclasses.dataclass(frozen=True)
class _Compiling:
    """A program with an objective in it, which XLA compiles just now."""

    name: str  # as JAX calls it
    told: Mapping[str, Any]  # the metadata of its events


class _Compiles(threading.local):
    """What this thread has JAX compile, stage by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # spent so far, by the program's name
        self.now: _Compiling | None = None


_thread = _Compiles()
_known: dict[tuple[tuple[str, ...], int], Signature] = {}  # by the program's and terms' names, and functions
_MOST_KNOWN = 256


def _on_begin(event: str, value: float, **kwargs: str | int) -> None:
    """JAX records the time at which a stage begins under the stage's name."""
    if event != COMPILED:
        return
    name = _name(kwargs)
    if name.startswith("jaxreg_") and running.arguments is not None:
        plan, arguments = running.arguments
        signature = signature_of(plan, arguments)
    elif running.traced is not None and name in running.traced.around:
        plan, signature, running.traced = running.traced.plan, running.traced.signature, None
    else:
        return
    _thread.now = _Compiling(name, _about(name, plan, signature))
    emit("compile.start", metadata=_thread.now.told)


def _on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
    """A stage has ended."""
    seconds, name = duration_secs, _name(kwargs)
    if event == TRACED:
        # The function whose tracing began before the objective's own has it inside.
        if running.traced is not None and time.time() - seconds <= running.traced.at:
            running.traced.around.add(name)
        _thread.seconds[name] = seconds
    elif event == LOWERED:
        _thread.seconds[name] = _thread.seconds.get(name, 0.0) + seconds
    elif event == COMPILED:
        seconds += _thread.seconds.pop(name, 0.0)
        if (now := _thread.now) is not None and now.name == name:
            _thread.now = None
            emit("compile", measurements={"duration": seconds}, metadata=now.told)
        _thread.seconds.clear()


def _name(about: Mapping[str, str | int]) -> str:
    name = str(about.get("fun_name", ""))
    return name[4:-1] if name.startswith("jit(") else name


def _about(program: str, plan: Plan, signature: Signature) -> dict[str, Any]:
    functions = hash(tuple(signature.functions.items()))
    name = (program, *plan.names)
    before = _known.pop((name, functions), None)
    if before is None:  # another objective of this name, the latest
        before = next((old for (other, _), old in reversed(_known.items()) if other == name), None)
    _known[name, functions] = signature
    if len(_known) > _MOST_KNOWN:
        del _known[next(iter(_known))]
    return {
        "program": program,
        "changed": _changed(before, signature),
        "terms": plan.names[1:],
        "functions": functions,
    }


def _changed(before: Signature | None, now: Signature) -> list[str]:
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


while_listening(
    lambda: jax.monitoring.register_scalar_listener(_on_begin),
    lambda: jax.monitoring.unregister_scalar_listener(_on_begin),
)
while_listening(
    lambda: jax.monitoring.register_event_duration_secs_listener(_on_duration),
    lambda: jax.monitoring.unregister_event_duration_listener(_on_duration),
)
