"""Checks: that this JAX computes right on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.releases import AVOIDS
from jaxreg.base.types import Array

_TOLERANCE = 1e-3  # Sound releases stay below 1e-5, faulty ones are off by 0.1 and more.
_SHAPE = (6, 8, 128, 256)  # Smaller arrays come out right everywhere.


@dataclasses.dataclass(frozen=True)
class NumericsReport:
    """What `check_numerics` found.

    Attributes:
      ok: whether every pattern came out right.
      errors: pattern -> largest error, relative to the largest entry of the right answer.
      platform: the backend that was tried.
      versions: of jax and jaxlib.
    """

    ok: bool
    errors: dict[str, float]
    platform: str
    versions: str

    def __str__(self) -> str:
        lines = [f"{self.versions} on {self.platform}"]
        for name, error in self.errors.items():
            verdict = "ok   " if error <= _TOLERANCE else "WRONG"
            lines.append(f"  {verdict} backward of {name}: relative error {error:.1e}")
        if self.ok:
            lines.append("All known patterns agree with NumPy in float64.")
        else:
            lines.append(
                "This JAX computes WRONG GRADIENTS on this machine, without any warning. Install one\n"
                'that does not: pip install "jaxreg[cpu]" finds it, such as jax==0.10.1 (Python 3.11) or\n'
                "jax==0.11.0 (Python 3.12 and newer). Until then\n"
                f"XLA_FLAGS={AVOIDS} (slower) in the environment avoids the faulty path."
            )
        return "\n".join(lines)


def check_numerics() -> NumericsReport:
    """Try the patterns whose gradients some JAX releases get wrong on CPUs, against NumPy float64.

    jax 0.10.2, 0.11.1, 0.11.2 and 0.12.0 are off by 13 to 97 %, without a warning, in the backward of
    common normalisations (a fault of XLA's CPU fusions through YNNPACK). Takes a few seconds at most,
    nearly all of it compilation; changes no setting; compares in float32 on the default backend.

    Example:
      >>> import jaxreg as jr
      >>> jr.testing.check_numerics().ok
      True
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=_SHAPE)
    cotangent = rng.normal(size=_SHAPE)
    tokens, token_cotangent = rng.normal(size=(2, 4096, 64))
    patterns: dict[str, tuple[Callable[..., Array], np.ndarray, np.ndarray, np.ndarray]] = {
        "layer normalisation": (
            _pull(_layer_norm),
            x,
            cotangent,
            _layer_norm_backward(x, cotangent),
        ),
        "layer normalisation of [4096, 64]": (
            _pull(_layer_norm),
            tokens,
            token_cotangent,
            _layer_norm_backward(tokens, token_cotangent),
        ),
        "layer normalisation over axis 0": (
            _pull(lambda x: _layer_norm(x, axis=0)),
            x,
            cotangent,
            _layer_norm_backward(x, cotangent, axis=0),
        ),
        "layer normalisation, vmapped over cotangents": (
            _vmapped_pull(_layer_norm),
            x[0],
            cotangent,
            _layer_norm_backward(x[:1], cotangent),
        ),
        "RMS normalisation, vmapped over cotangents": (
            _vmapped_pull(_rms_norm),
            x[0],
            cotangent,
            _rms_norm_backward(x[:1], cotangent),
        ),
    }
    errors = {}
    for name, (fn, at, along, right) in patterns.items():
        got = np.asarray(fn(at.astype(np.float32), along.astype(np.float32)), np.float64)
        errors[name] = float(np.max(np.abs(got - right)) / np.max(np.abs(right)))
    return NumericsReport(
        ok=all(error <= _TOLERANCE for error in errors.values()),
        errors=errors,
        platform=jax.default_backend(),
        versions=f"jax {jax.__version__}, jaxlib {version('jaxlib')}",
    )


def _pull(fn: Callable[[Array], Array]) -> Callable[..., Array]:
    return jax.jit(lambda x, cotangent: jax.vjp(fn, x)[1](cotangent)[0])


def _vmapped_pull(fn: Callable[[Array], Array]) -> Callable[..., Array]:
    return jax.jit(lambda x, cotangents: jax.vmap(jax.vjp(fn, x)[1])(cotangents)[0])


def _layer_norm(x: Array, axis: int = -1) -> Array:
    centred = x - jnp.mean(x, axis, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis, keepdims=True) + 1e-5)


def _rms_norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def _layer_norm_backward(x: np.ndarray, g: np.ndarray, axis: int = -1) -> np.ndarray:
    centred = x - x.mean(axis, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis, keepdims=True) + 1e-5)
    y = centred * scale
    return scale * (g - g.mean(axis, keepdims=True) - y * (g * y).mean(axis, keepdims=True))


def _rms_norm_backward(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    y = x * scale
    return scale * (g - y * (g * y).mean(-1, keepdims=True))
