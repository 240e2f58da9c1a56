"""What everything else stands on, and what knows nothing of terms: events, arrays, numbers, paths, tables.

Imports no other room. Read first: `events.py`, who is told what.
"""
