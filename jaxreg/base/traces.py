"""Tracebacks without the frames between a caller and what it called, as JAX leaves out its own."""

from __future__ import annotations

import types

import jax


def lean(error: BaseException, folder: str) -> None:
    """Leave out, in place, the frames of files in ``folder``, but for the one that raised.

    JAX's own setting brings them back: ``JAX_TRACEBACK_FILTERING=off``.

    Example:
      >>> try:
      ...     1 / 0
      ... except ZeroDivisionError as error:
      ...     lean(error, "/no/such/folder")
      ...     error.__traceback__.tb_next is None
      True
    """
    # A setting that not every release of JAX declares as an attribute.
    if getattr(jax.config, "jax_traceback_filtering", None) in ("off", "tracebackhide"):
        return
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    kept = None
    for i, frame in reversed(list(enumerate(frames))):
        inside = frame.tb_frame.f_code.co_filename.startswith(folder)
        if not inside or i == len(frames) - 1:
            kept = types.TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__traceback__ = kept
