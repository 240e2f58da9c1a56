"""The flight recorder: keep the last steps, write them when one fails, and find what went wrong first.

Imports ``base``, ``batch``, ``core``, ``events`` and ``host``. Read first: `recorder.py`.
"""
