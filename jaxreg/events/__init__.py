"""From an objective's output to the events of a step, and from JAX's compiling to those of a program.

Imports ``base`` and ``core``. Read first: `log.py`.
"""

from jaxreg.events import compiles as compiles
