"""What reads a run and shows it: a live table, curves, a report. It sees files and events, no objective.

Imports ``base``, and of ``core`` the names of the schema. Read first: `run.py`.
"""
