"""Where host functions run: in a thread a call, in an event loop of the term's own, or in processes.

A runner starts a call and, at best, stops it. What cannot be stopped (a thread) is abandoned: it keeps its
place among the ``max_concurrency`` calls until it ends, so that calls that hang cannot pile up.

The standard library's executors do not serve: one of threads keeps the interpreter from leaving while a call
hangs, and one of processes, when a single call is killed, fails all of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from jaxreg.host.worker import Worker, WorkerDied

STARTING = 120.0  # seconds that a worker process may take to start, beside the timeout
GRACE = 0.2  # seconds in which an event loop answers if it is not blocked


class Call(concurrent.futures.Future[Any]):
    """One call of a host function, and when it has to be done."""

    def __init__(self, timeout: float | None) -> None:
        super().__init__()
        self._timeout = timeout
        self.began = time.monotonic()
        self.ended: float | None = None
        self.deadline = float("inf") if timeout is None else self.began + timeout

    def begins(self, allowance: float = 0.0) -> None:
        """It begins now (after it waited for its place), or after what it is allowed for starting."""
        self.began = time.monotonic()
        self.deadline = float("inf") if self._timeout is None else self.began + allowance + self._timeout

    def set_result(self, result: Any) -> None:
        """It is done."""
        self.ended = time.monotonic()
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        """It failed."""
        self.ended = time.monotonic()
        super().set_exception(exception)

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return (self.ended or time.monotonic()) - self.began

    def settle(self, work: Callable[[], Any]) -> None:
        """Its result is what ``work()`` gives or raises."""
        try:
            result = work()
        except BaseException as error:  # SystemExit in a thread must not end it without a word
            self.set_exception(error)
            del self  # or the error's traceback would keep the call that keeps the error
        else:
            self.set_result(result)


class Runner(Protocol):
    """Starts calls of one function."""

    def start(self, call: Call, arguments: tuple[Any, ...]) -> None:
        """Begin as soon as there is a place."""

    def cancel(self, call: Call) -> None:
        """Cancel it as far as possible, without waiting."""

    def stop(self, call: Call) -> str:
        """Cancel it as far as possible; what became of it, for the error."""

    def close(self) -> None:
        """Stop everything, and leave no thread, task or process behind that can be ended."""


class Places:
    """At most n calls at once; one that waits for its place can be sent away."""

    def __init__(self, n: int) -> None:
        self._n, self._free = n, n
        self._changed = threading.Condition()

    def enter(self, call: Call) -> bool:
        """Wait for a place; False if the call was cancelled meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or call.cancelled())
            if not call.set_running_or_notify_cancel():
                return False
            self._free -= 1
            return True

    def leave(self) -> None:
        """Give the place back."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def send_away(self, call: Call) -> str | None:
        """Cancel a call that has no place yet, and say why it had none; None for one that has begun."""
        if not call.cancel():
            return None
        with self._changed:
            self._changed.notify_all()
            busy = self._n - self._free
        return f"it never began: {busy} earlier calls still run, and max_concurrency={self._n}"


class Threads:
    """A daemon thread a call, so that one that never returns keeps nobody from leaving."""

    def __init__(self, fn: Callable[..., Any], name: str, max_concurrency: int) -> None:
        self._fn, self._name = fn, name
        self._places = Places(max_concurrency)
        self._waiting: set[Call] = set()

    def start(self, call: Call, arguments: tuple[Any, ...]) -> None:
        """Begin in a thread of its own."""
        self._waiting.add(call)
        call.add_done_callback(self._waiting.discard)
        thread = threading.Thread(target=self._run, args=(call, arguments), name=self._name, daemon=True)
        thread.start()

    def cancel(self, call: Call) -> None:
        """Send it away if it has not begun."""
        self._places.send_away(call)

    def stop(self, call: Call) -> str:
        """Abandon it: a thread cannot be stopped."""
        return self._places.send_away(call) or (
            "its thread cannot be stopped and goes on; give what it waits for a timeout of its own, or run "
            "it in a process (run='process')"
        )

    def close(self) -> None:
        """Send away who waits."""
        for call in tuple(self._waiting):
            self._places.send_away(call)

    def _run(self, call: Call, arguments: tuple[Any, ...]) -> None:
        if not self._places.enter(call):
            return
        try:
            call.begins()
            call.settle(lambda: self._fn(*arguments))
        finally:
            self._places.leave()
            del call  # as in settle: what failed keeps this frame, and would keep itself


class Processes:
    """Worker processes that are kept between calls; one that runs too long is killed."""

    def __init__(self, fn: Callable[..., Any], name: str, max_concurrency: int) -> None:
        self._payload, self._name = pickle.dumps(fn), name
        self._places = Places(max_concurrency)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._busy: dict[Call, Worker | None] = {}  # None until it has a worker

    def start(self, call: Call, arguments: tuple[Any, ...]) -> None:
        """Begin in a worker process; a thread waits for it."""
        with self._lock:
            self._busy[call] = None
        thread = threading.Thread(target=self._run, args=(call, arguments), name=self._name, daemon=True)
        thread.start()

    def cancel(self, call: Call) -> None:
        """Kill its process."""
        self.stop(call)

    def stop(self, call: Call) -> str:
        """Kill its process."""
        if why := self._places.send_away(call):
            return why
        with self._lock:
            worker = self._busy.pop(call, None)
        if worker is None:
            return "it was stopped before it had a process"
        worker.kill()
        return "its process was killed"

    def close(self) -> None:
        """Kill every process."""
        with self._lock:
            calls, idle, self._idle = list(self._busy), self._idle, []
        for call in calls:
            self.stop(call)
        for worker in idle:
            worker.close()

    def _run(self, call: Call, arguments: tuple[Any, ...]) -> None:
        if not self._places.enter(call):
            with self._lock:
                self._busy.pop(call, None)
            return
        try:
            call.begins(STARTING)  # its own time begins when its process has it
            call.settle(functools.partial(self._work, call, arguments))
        finally:
            self._places.leave()
            del call

    def _work(self, call: Call, arguments: tuple[Any, ...]) -> Any:
        pickled = pickle.dumps(arguments)
        worker = self._worker(call)
        try:
            result = worker.ask(pickled)
        except WorkerDied:
            worker.close()
            raise
        except BaseException:
            self._keep(call, worker)
            raise
        self._keep(call, worker)
        return result

    def _worker(self, call: Call) -> Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and not worker.is_alive():  # killed while it had nothing to do
            worker.close()
            worker = None
        if worker is None:
            worker = Worker(self._payload, self._name)
        with self._lock:
            stopped = call not in self._busy
            if not stopped:
                self._busy[call] = worker
        if stopped:
            worker.close()
            raise WorkerDied("it was stopped while its process started")
        try:
            worker.ready()
        except BaseException:
            worker.close()
            raise
        call.begins()
        return worker

    def _keep(self, call: Call, worker: Worker) -> None:
        with self._lock:
            if kept := call in self._busy:
                del self._busy[call]
                self._idle.append(worker)
        if not kept:  # stopped: it is being killed
            worker.close()


class Coroutines:
    """An event loop of the term's own, in a thread of its own: one that blocks it harms nobody else.

    It is the same loop for every call, so that sessions opened in one call serve the next.
    """

    def __init__(self, fn: Callable[..., Any], name: str, max_concurrency: int) -> None:
        self._fn, self._name = fn, name
        self._places = asyncio.Semaphore(max_concurrency)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: dict[Call, asyncio.Task[None]] = {}  # touched in the loop only
        self._answered: threading.Event | None = None  # set by the loop, once it is asked whether it lives

    def start(self, call: Call, arguments: tuple[Any, ...]) -> None:
        """Begin in the loop."""
        if self._answered is not None and not self._answered.wait(GRACE):
            call.set_exception(RuntimeError("an earlier call still blocks its event loop; " + _BLOCKS))
            return
        with self._lock:  # so that `close` comes before or after, and nothing is lost in between
            self._running_loop().call_soon_threadsafe(self._begin, call, arguments)

    def cancel(self, call: Call) -> None:
        """Ask the loop to cancel its task."""
        call.cancel()
        self._ask(call)

    def stop(self, call: Call) -> str:
        """Cancel its task; say so if the loop does not answer."""
        never_began = call.cancel()
        answered = self._ask(call)
        if answered is None:
            return "its event loop is closed"
        if not answered.wait(GRACE):
            return "it blocks its event loop and could not be cancelled; " + _BLOCKS
        return "it waited for its place among max_concurrency" if never_began else "it was cancelled"

    def close(self) -> None:
        """Cancel every task and end the thread; one that is blocked is left to end by itself."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
            if loop is not None:
                loop.call_soon_threadsafe(loop.stop)
        if thread is not None and thread is not threading.current_thread():
            thread.join(5 * GRACE)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # and no thread's current one
            self._loop = runner.get_loop()
            self._thread = threading.Thread(target=_run_loop, args=(runner,), name=self._name, daemon=True)
            self._thread.start()
        return self._loop

    def _ask(self, call: Call) -> threading.Event | None:
        """Have the call's task cancelled, and be told of it; None where there is no loop."""
        loop, answered = self._loop, threading.Event()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._cancel, call)
                loop.call_soon_threadsafe(answered.set)
                self._answered = answered
                return answered
        except RuntimeError:  # closed meanwhile
            self._answered = None
        return None

    def _begin(self, call: Call, arguments: tuple[Any, ...]) -> None:
        task = asyncio.get_running_loop().create_task(self._run(call, arguments))
        self._tasks[call] = task
        task.add_done_callback(functools.partial(self._ended, call))

    def _ended(self, call: Call, task: asyncio.Task[None]) -> None:
        self._tasks.pop(call, None)
        if task.cancelled():  # perhaps before its first line: what it would have caught never reached it
            _fail(call, RuntimeError("its task was cancelled"))

    def _cancel(self, call: Call) -> None:
        if task := self._tasks.get(call):
            task.cancel()

    async def _run(self, call: Call, arguments: tuple[Any, ...]) -> None:
        try:
            async with self._places:
                if not call.set_running_or_notify_cancel():
                    return
                call.begins()
                result = await self._fn(*arguments)
        except asyncio.CancelledError:
            raise  # `_ended` sees to it
        except BaseException as error:
            _fail(call, error)
        else:
            call.set_result(result)
        finally:
            del call


def _fail(call: Call, error: BaseException) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled before
        call.set_exception(error)


_BLOCKS = "declare it with `def`, and it runs in a thread, or await what it waits for"


def _run_loop(runner: asyncio.Runner) -> None:
    with runner:  # which cancels what is left, and closes the loop
        runner.get_loop().run_forever()
