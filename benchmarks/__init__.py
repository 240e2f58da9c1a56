"""What the norms of every term cost, next to the other ways to get them.

Run from the repository's root, with jaxreg installed or on PYTHONPATH::

    python -m benchmarks --torch-python PYTHON   # two cases timed, as Markdown tables
    python -m benchmarks upgrad --torch-python PYTHON  # conflict-free steps in place of the plain sum
    python -m benchmarks moving                  # norms now and then, and rules that move weights
    python -m benchmarks accumulate              # micro-batches: memory and time
    python -m benchmarks compile                 # compile time of 32 terms
    python -m benchmarks programs --tpu v5e:2x4  # flops, bytes and collectives of the programs
    python -m benchmarks client --torch-python PYTHON  # the client's own work a step
    python -m benchmarks host                    # terms outside XLA, and the cost of telemetry
    python -m benchmarks soak                    # 10,000 steps that fail and are cancelled: leaks?

Every contestant is checked against float64 on the shapes that are timed, before it is timed. What is
computed stands in ``cases``, who computes it in ``contestants`` (``torch_*`` in PyTorch, in a process of
their own), how it is timed and checked in ``measure``; ``commands`` puts them together, and ``results`` has
the tables.
"""
