"""The commands that users type: a file each, and what they share.

Imports ``base``, ``recorder``, ``testing`` and ``watching``. Read first: `main.py`.
"""
