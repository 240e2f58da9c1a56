"""Compose named loss terms into one compiled JAX objective, and see what every term does."""

from jaxreg import aggregation as aggregation
from jaxreg import client as client
from jaxreg import earlier as _earlier  # noqa: F401
from jaxreg import host as host
from jaxreg import losses as losses
from jaxreg import memory as memory
from jaxreg import regularizers as regularizers
from jaxreg import telemetry as telemetry
from jaxreg import testing as testing
from jaxreg import weighting as weighting
from jaxreg.base.releases import WrongGradientsWarning as WrongGradientsWarning
from jaxreg.base.version import __version__ as __version__
from jaxreg.batch.token_batch import TokenBatch as TokenBatch
from jaxreg.core.accumulate import accumulate as accumulate
from jaxreg.core.accumulate import add_part as add_part
from jaxreg.core.accumulate import finish_parts as finish_parts
from jaxreg.core.compose import MixedReductionsWarning as MixedReductionsWarning
from jaxreg.core.compose import compose as compose
from jaxreg.core.conflicts import Conflict as Conflict
from jaxreg.core.norms import GradNorms as GradNorms
from jaxreg.core.objective import CompositeLoss as CompositeLoss
from jaxreg.core.objective import NormsNotComputedWarning as NormsNotComputedWarning
from jaxreg.core.output import AggregationOutput as AggregationOutput
from jaxreg.core.output import BaseLossOutput as BaseLossOutput
from jaxreg.core.output import CustomLossOutput as CustomLossOutput
from jaxreg.core.output import RegularizerOutput as RegularizerOutput
from jaxreg.core.part_outputs import merge_outputs as merge_outputs
from jaxreg.core.restore import StateChangedWarning as StateChangedWarning
from jaxreg.core.spec import RegularizerSpec as RegularizerSpec
from jaxreg.core.stacking import stack as stack
from jaxreg.terms.view import of as of
