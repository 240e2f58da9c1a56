"""A real server of the Tinker API, and clients of it, for the tests of this folder."""

import contextlib
import gc
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
from serve import KEY, MODEL, VOCABULARY, descendants, end

HERE = Path(__file__).parent
NEEDED = ("tuft", "tinker", "ray", "torch", "transformers", "peft", "psutil")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
START_SECONDS = 240  # it takes 15 on an idle machine; PyTorch is imported twice
STOP_SECONDS = 30
RANK = 4

collect_ignore = ["serve.py"]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line(f"{HERE.name}/ was left out: {', '.join(MISSING)} not installed")


def pytest_itemcollected(item):
    """The SDK leaves a connection open for every client, and Python warns of each that it finds."""
    item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))


@pytest.fixture(autouse=True)
def no_open_connections():
    """Python finds them here: in the tests of other folders it would be an error."""
    yield
    collect_garbage()


def collect_garbage():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def server_url():
    """The address of a server that runs until the end of the session."""
    # Not in pytest's own folder: its name is too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="tuft-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        with running_server(Path(folder), log) as url:
            yield url


@contextlib.contextmanager
def running_server(folder, log):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, HERE / "serve.py", folder, str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches the tests alone, and the server last
        )
    family = []
    try:
        wait_until_up(process, url, log)
        family = descendants(process.pid)
        yield url
    finally:
        stop(process, [*family, *descendants(process.pid)])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_up(process, url, log):
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None:
            pytest.fail(f"the server stopped with {process.returncode}:\n{tail(log)}", pytrace=False)
        if time.monotonic() > deadline:
            pytest.fail(f"the server is not up after {START_SECONDS} s:\n{tail(log)}", pytrace=False)
        time.sleep(0.2)


def answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5) as reply:
        return reply.status == 200
    return False


def tail(log, lines=40):
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process, family):
    """Ask the server to stop; then end what is left, also of one that was killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end(family, seconds=5)  # Ray's workers have groups of their own


@pytest.fixture(scope="session")
def data():
    """Three ragged datums with random tokens and targets; every weight is 1."""
    from tinker import types

    rng = np.random.default_rng(0)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(rng.integers(0, VOCABULARY, n).tolist()),
            loss_fn_inputs={
                "target_tokens": rng.integers(0, VOCABULARY, n),
                "weights": np.ones(n, np.float32),
            },
        )
        for n in (9, 5, 7)
    ]


@pytest.fixture(scope="session")
def new_training_client(server_url):
    """A function that makes a client with a model of its own.

    With ``state=start_state`` all clients start from the same weights: an adapter's own are random, as the
    server does not look at the seed. With ``datums_per_request=n`` the SDK splits larger data over several
    requests, as it does above 1024.
    """
    import tinker

    services = []

    def new(state=None, *, rank=RANK, datums_per_request=None):
        service = tinker.ServiceClient(base_url=server_url, api_key=KEY)
        services.append(service)
        if datums_per_request is not None:
            holder = service.holder
            holder._client_config = holder._client_config.model_copy(
                update={"fwdbwd_max_chunk_len": datums_per_request}
            )
        client = service.create_lora_training_client(base_model=MODEL, rank=rank, seed=0)
        if state is not None:
            client.load_state(state).result()
        return client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        yield new
        for service in services:
            service.holder.close()
        services.clear()
        collect_garbage()


@pytest.fixture(scope="session")
def start_state(new_training_client, data):
    """The path of a saved state for all clients to load, some steps away from the bare model.

    A fresh adapter adds nothing and half of its gradient is zero, so it would hide a load without effect.
    """
    from tinker import types

    client = new_training_client()
    for _ in range(3):
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=0.01)).result()
    return client.save_state("start").result().path
