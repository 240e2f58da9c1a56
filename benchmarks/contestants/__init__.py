"""What takes part: each way to a gradient and to the norms, in JAX here and in PyTorch beside it.

Nothing is imported here: the PyTorch worker runs on a Python that need not have JAX.
"""
