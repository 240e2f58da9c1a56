"""What can go wrong with a term that runs outside XLA."""

from __future__ import annotations


class HostTermError(RuntimeError):
    """A host term failed; what it raised itself is the cause.

    Attributes:
      term: its name.
    """

    def __init__(self, term: str, what: str) -> None:
        super().__init__(f"host term {term!r}: {what}")
        self.term = term


class HostTermTimeout(HostTermError, TimeoutError):
    """A host term gave no value within its ``timeout``."""
