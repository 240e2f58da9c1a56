"""What the built-in terms share: how they are declared, what they read, and the masked operations.

Imports ``base`` and ``batch``. Read first: `term.py`.
"""
