"""Compose named loss terms into one compiled JAX objective, and see what every term does."""

from jaxreg import client as client
from jaxreg import host as host
from jaxreg import losses as losses
from jaxreg import regularizers as regularizers
from jaxreg import telemetry as telemetry
from jaxreg import testing as testing
from jaxreg._version import __version__ as __version__
from jaxreg.batch import TokenBatch as TokenBatch
from jaxreg.compose import compose as compose
from jaxreg.norms import GradNorms as GradNorms
from jaxreg.objective import CompositeLoss as CompositeLoss
from jaxreg.output import BaseLossOutput as BaseLossOutput
from jaxreg.output import CustomLossOutput as CustomLossOutput
from jaxreg.output import RegularizerOutput as RegularizerOutput
from jaxreg.spec import RegularizerSpec as RegularizerSpec
