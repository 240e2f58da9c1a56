"""What replaces the plain sum of the terms' weighted gradients: functions from their Gramian to coefficients.

Imports ``base``; it knows no objective, so each is of use by itself. Read first: `aggregator.py`, then
`cone.py`.
"""

from jaxreg.aggregation.aggregator import Aggregator as Aggregator
from jaxreg.aggregation.aggregator import Combination as Combination
from jaxreg.aggregation.bargaining import FairGrad as FairGrad
from jaxreg.aggregation.bargaining import NashMTL as NashMTL
from jaxreg.aggregation.cone import DualProj as DualProj
from jaxreg.aggregation.cone import UPGrad as UPGrad
from jaxreg.aggregation.hull import MGDA as MGDA
from jaxreg.aggregation.hull import CAGrad as CAGrad
from jaxreg.aggregation.plain import Mean as Mean
from jaxreg.aggregation.plain import Random as Random
from jaxreg.aggregation.plain import Sum as Sum
from jaxreg.aggregation.priority import PCD as PCD
from jaxreg.aggregation.spectral import IMTLG as IMTLG
from jaxreg.aggregation.spectral import AlignedMTL as AlignedMTL
from jaxreg.aggregation.spectral import ConFIG as ConFIG
from jaxreg.aggregation.surgery import GradVac as GradVac
from jaxreg.aggregation.surgery import PCGrad as PCGrad
