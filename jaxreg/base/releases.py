"""The releases of JAX whose CPU backend computes wrong gradients, and the one loud warning about them."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.metadata import version

import jax

# By jaxlib's version: the fault is in XLA's CPU fusions through YNNPACK, and other backends do not take them.
# The extra ``cpu`` in pyproject.toml excludes the same ones, and a test holds the two together.
WRONG_ON_CPU = ("0.10.2", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1")
AVOIDS = "--xla_cpu_experimental_ynn_fusion_type="


class WrongGradientsWarning(UserWarning):
    """This release of JAX is known to compute wrong gradients on a CPU.

    Make it an error with ``warnings.simplefilter("error", jaxreg.WrongGradientsWarning)``.
    """


@functools.cache
def warn_once() -> None:
    """Warn, once in a process, where the release at work is on the list and computes on a CPU."""
    release = version("jaxlib")
    if release not in WRONG_ON_CPU or jax.default_backend() != "cpu":
        return
    if f"{AVOIDS} " in f"{os.environ.get('XLA_FLAGS', '')} ":  # set to nothing, it is off
        return
    warnings.warn(
        f"jaxlib {release} computes WRONG GRADIENTS on CPUs, off by 13 to 97 % in the backward of common "
        f'normalisations, without any error. Install a sound one: pip install "jaxreg[cpu]". Or avoid the '
        f"faulty path (slower) with XLA_FLAGS={AVOIDS} in the environment. `python -m jaxreg doctor` shows "
        f"what is wrong on this machine. GPUs and TPUs are not affected",
        WrongGradientsWarning,
        stacklevel=2,
    )
