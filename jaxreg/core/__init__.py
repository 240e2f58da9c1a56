"""Named terms become one pure function, compiled once, that says what every term did.

Imports ``base``; it knows no term, no batch, no sink and no screen. Read first: `spec.py`, then `step.py`.
"""
