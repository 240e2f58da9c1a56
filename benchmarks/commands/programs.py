"""What XLA makes of the objective: flops, bytes and collectives, here and on a TPU's topology."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

import jaxreg as jr
from benchmarks.cases import outputs
from benchmarks.contestants.in_jax import plain_step
from benchmarks.measure.table import markdown

ROWS, LENGTH = outputs.SHAPE
HEADER = ["program", "flops", "×", "bytes accessed", "×", "temp MiB", "all-reduces"]


def programs_table(tpu: str | None) -> str:
    """Case "outputs" compiled for the device here, and data-parallel over a TPU topology's chips."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sections = [_table(f"one {jax.devices()[0].platform} device", here, here)]
    if tpu:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
        mesh = Mesh(np.array(devices), ("data",))
        over, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("data",), ()))
        where = f"tpu {tpu}, batch over {len(devices)} chips"
        sections += [_table(where, over, whole, rows) for rows in (ROWS, 8 * ROWS)]
    return "\n\n".join(sections)


def _table(where: str, split: Sharding, whole: Sharding, rows: int = ROWS) -> str:
    problem = outputs.problem((rows, LENGTH))
    x, batch = _placed(problem.x, split), _placed(problem.batch, split)
    step = jr.CompositeLoss.value_and_grad
    figures = {
        "hand-written": _figures(plain_step(problem), x, batch),
        "jaxreg, norms off": _figures(step, _placed(problem.objective(False), whole), x, batch),
        "jaxreg, norms on": _figures(step, _placed(problem.objective(True), whole), x, batch),
    }
    flops, moved, *_ = figures["hand-written"]
    lines = [
        [name, f"{f:.4g}", f"{f / flops:.3f}", f"{b:.4g}", f"{b / moved:.3f}", f"{t:.2f}", str(n)]
        for name, (f, b, t, n) in figures.items()
    ]
    return f"{where}, x {list(x.shape)}\n\n{markdown(HEADER, lines)}"


def _placed(tree: Any, sharding: Sharding) -> Any:
    """The shapes of a tree, placed so."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _figures(fn: Callable[..., Any], *arguments: Any) -> tuple[float, float, float, int]:
    """Flops, bytes accessed, temporary MiB and all-reduces of a program, a device."""
    compiled: Any = jax.jit(fn).lower(*arguments).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    reduces = re.findall(r" all-reduce(?:-start)?\(", compiled.as_text())
    return cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes / 2**20, len(reduces)
