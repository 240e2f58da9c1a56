"""Stricter than production: rank promotion raises, warnings fail (pyproject), seeds are fixed."""

import os

# Eight devices on one CPU, for the sharding tests; must be set before JAX starts a backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import chex
import hypothesis
import jax
import numpy as np
import pytest
from clients import VOCABULARY

import jaxreg
from jaxreg.testing import check_numerics

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("default")
# Pickles of an earlier release; and this file, which doctests would import again by a name that another has.
collect_ignore = ["data", "conftest.py"]


def pytest_sessionstart(session):
    """Nothing is worth testing on a JAX that computes wrong gradients."""
    report = check_numerics()
    if not report.ok:
        pytest.exit(str(report), returncode=1)


@pytest.fixture(autouse=True)
def _traces_count_from_zero():
    """`chex.assert_max_traces` counts by a function's source, over all tests."""
    chex.clear_trace_counter()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """float64 for one test, restored afterwards."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def embedded():
    """The embedded trainer with a small model."""
    with jaxreg.client.EmbeddedTrainingClient(vocabulary=VOCABULARY) as client:
        yield client
