"""How it is measured: answers checked against float64, turns taken, tables made.

Nothing is imported here: the PyTorch worker runs on a Python that need not have JAX.
"""
