"""Lines of a run's file, for the tests of what reads them."""

import json
import math


def term(name, value=1.0, weight=0.5, norm=2.0, **custom):
    product = lambda x: None if x is None else weight * x
    return {
        "name": name,
        "value": value,
        "weight": weight,
        "contribution": product(value),
        "grad_norm": norm,
        "grad_norm_weighted": product(norm),
        "custom": custom,
    }


def line(step, *terms, base=2.0, norm=1.0, **more):
    """A step's record; a term whose value is None is one that is not finite."""
    broken = [t["name"] for t in terms if t["value"] is None]
    total = None if broken else sum(t["contribution"] for t in terms)
    record = {
        "step": step,
        "time": None if step is None else 1e9 + step / 4,
        "loss_total": None if broken or base is None else base + total,
        "base_loss": {"value": base, "grad_norm": norm, "custom": {}},
        "regularizers": {t["name"]: t for t in terms},
        "regularizer_total": total,
        "total_grad_norm": None if norm is None else 1.5,
    }
    return record | ({"nonfinite": broken} if broken else {}) | more


def note(step, event="warning", **details):
    return {"step": step, "time": 1e9, "event": event, **details}


def write(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def decay(steps, names, seed=0, **more):
    """A run in which every term fades, with noise that needs no generator."""
    for step in range(steps):
        terms = []
        for i, name in enumerate(names):
            wave = math.sin(step * (i + 1.7) + seed)
            value = (1 + 0.1 * wave) * math.exp(-step / steps * (i % 3))
            terms.append(term(name, value=value, weight=10.0 ** -(i % 4), norm=1 + wave / 9))
        yield line(step, *terms, base=3 * math.exp(-step / steps), **more)
