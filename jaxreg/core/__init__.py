"""Named terms become one pure function, compiled once, that says what every term did.

Imports ``base`` and ``batch``; it knows no term, sink or screen. Read first: `spec.py`, then `step.py`.
"""
