"""Terms that remember: a moving reference, running scales, wrapped around any other term.

Imports ``base``, ``batch`` and ``core``. Read first: `wrapper.py`.
"""

from jaxreg.memory.advantages import RunningAdvantages as RunningAdvantages
from jaxreg.memory.reference import MovingReference as MovingReference
from jaxreg.memory.scale import RunningScale as RunningScale
