"""The version, where whatever needs it can import it."""

__version__ = "0.2.0"
