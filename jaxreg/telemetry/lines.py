"""A file of JSON lines that several writers append to, and that a crash or a full disk leaves readable.

- A line is one ``write`` to a file opened with ``O_APPEND``: the system puts it at the end and whole, whoever
  else appends, threads and processes (on local file systems; NFS does not promise it).
- What a full disk took of a line is cut off again, and the line waits. Nothing is cut unless the file still
  ends with exactly those bytes; another's whole line ends with a newline and a part of a line never does, so
  it is safe. Not guaranteed: another's line that is written between that look and the cut, which are a
  microsecond apart, on a disk that has no room, would be lost.
- Where the part cannot be cut off (another's line stands behind it already), the line that it has spoilt is
  lost to readers, and the next one begins with a newline.
- Where another writer is killed in the middle of a line, the next one is glued to it, and lost, too.
- Nothing is synced line by line: a killed process loses only what waits, a power cut the last seconds, too.

Libraries of JSON lines, and logging's handlers, write through a buffer: a line may leave it in parts, and one
that a full disk cut stays cut.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxreg.base.events import LOGGER

BLOCK = 2**16  # bytes read at once, from the file's end
SETTLE = 0.05  # seconds; a living writer has ended its line by then


class LineFile:
    """Appends lines, and keeps those that the disk does not take.

    Args:
      path: the file; it and its folder are made where they are missing.
      backlog: how many lines wait for room at most; then the oldest are dropped.

    Raises:
      OSError: the file cannot be opened for appending.
      ValueError: it is something else than a file of JSON lines.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = LineFile(Path(folder, "run.jsonl"), backlog=10)
      ...     file.append(b'{"step":0}' + bytes([10]))
      ...     file.append(b'{"step":1}' + bytes([10]))
      ...     list(file.from_the_end())
      ...     file.close()
      [b'', b'{"step":1}', b'{"step":0}']
    """

    def __init__(self, path: Path, backlog: int) -> None:
        if backlog < 1:
            raise ValueError(
                f"backlog is the number of lines that may wait for room, at least 1; got {backlog}"
            )
        self.path = path
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=backlog)
        self._lock = threading.RLock()  # reentrant: what is logged here may come back as an event
        self._troubled, self._dropped = False, 0
        self._newline = b""  # what stands before the next line, where the last one was left without its end
        self._fd: int | None = _open(path)
        try:
            self._mend(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, line: bytes) -> None:
        """Write a line, which ends with a newline, or keep it for later. After `close` it does nothing."""
        with self._lock:
            if self._fd is None:
                return
            full = len(self._waiting) == self._waiting.maxlen
            self._waiting.append(line)
            self._dropped += full
            self._drain(self._fd)
            if self._troubled and full and self._dropped == 1:
                LOGGER.error(
                    "%s: %d lines wait for room, and from now on the oldest of them are dropped",
                    self.path,
                    len(self._waiting),
                )

    def from_the_end(self) -> Iterator[bytes]:
        """What stands between the newlines, the last first; reads only what is asked for."""
        if self._fd is not None:
            yield from _backwards(self._fd)

    def close(self) -> None:
        """Write what waits, if it can be written. Further calls do nothing."""
        with self._lock:
            if (fd := self._fd) is None:
                return
            self._drain(fd)
            self._fd = None
            if lost := len(self._waiting) + self._dropped:
                LOGGER.error("%s: closed, and %d lines could not be written: they are lost", self.path, lost)
            try:
                os.close(fd)
            except OSError as error:  # some file systems tell only now what they did not write
                LOGGER.error("%s: %s while closing; its last lines may be missing", self.path, error.strerror)

    def _drain(self, fd: int) -> None:
        """Write what waits, the oldest first, as long as it goes."""
        written = 0
        while self._waiting:
            if (trouble := self._write(fd, self._waiting[0])) is not None:
                self._tell(trouble)
                return
            self._waiting.popleft()
            written += 1
        if self._troubled:
            self._troubled, dropped, self._dropped = False, self._dropped, 0
            LOGGER.warning(
                "%s: can be written again; %d lines that waited are in it, %d were dropped",
                self.path,
                written,
                dropped,
            )

    def _write(self, fd: int, line: bytes) -> str | None:
        """One line whole, or nothing of it and what was in the way."""
        data = self._newline + line
        try:
            taken = os.write(fd, data)
        except OSError as error:  # then nothing was written: part of it would have been a short write
            return error.strerror or str(error)
        if taken == len(data):
            self._newline = b""
            return None
        if not _cut(fd, data[:taken]):
            self._newline = b"\n"
        return f"took {taken} of {len(data)} bytes; is the disk full?"

    def _tell(self, trouble: str) -> None:
        if not self._troubled:
            self._troubled = True
            LOGGER.error(
                "%s: cannot be written (%s); the run goes on, and up to %d lines wait until there is room",
                self.path,
                trouble,
                self._waiting.maxlen,
            )

    def _mend(self, fd: int) -> None:
        """End the line of a writer that was killed in the middle of it, or cut it off."""
        if os.fstat(fd).st_size and os.pread(fd, 1, 0) != b"{":
            raise ValueError(
                f"{self.path} is there and is no file of JSON lines (it does not begin with '{{'); nothing "
                f"was changed. Give the path of a new file, or of one that JSONL has written"
            )
        if not next(_backwards(fd)):
            return
        time.sleep(SETTLE)
        if not (torn := next(_backwards(fd))):
            return
        if _is_object(torn):
            self._newline = b"\n"
            with contextlib.suppress(OSError):  # a full disk: then it is written with the next line
                os.write(fd, self._newline)
                self._newline = b""
        elif _cut(fd, torn):
            LOGGER.warning(
                "%s: the last line was torn, as by a crash; its %d bytes are cut off", self.path, len(torn)
            )
        else:
            self._newline = b"\n"


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        why = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            why = "a part of its path is a file, not a folder"
        raise OSError(
            error.errno, f"{why}: give the path of a file in a folder that can be written", str(path)
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path} is no regular file; give the path of one, or of none yet")
    return fd


def _cut(fd: int, part: bytes) -> bool:
    """Take these bytes off the file's end; False if it does not end with them."""
    try:
        start = os.fstat(fd).st_size - len(part)
        # A lone newline may be the end of another's line.
        if start < 0 or not part.strip() or os.pread(fd, len(part), start) != part:
            return False
        os.ftruncate(fd, start)
    except OSError:
        return False
    return True


def _backwards(fd: int) -> Iterator[bytes]:
    """What stands between the file's newlines, the last first (empty, where a newline ends the file)."""
    position, block, rest = os.fstat(fd).st_size, BLOCK, b""
    while position:
        start = max(0, position - block)
        rest, *lines = (os.pread(fd, position - start, start) + rest).split(b"\n")
        position, block = start, BLOCK if lines else 2 * block
        yield from reversed(lines)
    yield rest


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
