"""Terms that are no arrays: a query over HTTP, a solver, a judge. They run beside the compiled pass.

Imports ``base``, ``batch`` and ``core``. Read first: `regularizer.py`.
"""

from jaxreg.host.errors import HostTermError as HostTermError
from jaxreg.host.errors import HostTermTimeout as HostTermTimeout
from jaxreg.host.regularizer import HostRegularizer as HostRegularizer
from jaxreg.host.rows import Row as Row
