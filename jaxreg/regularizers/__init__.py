"""Regularizers, by what they are a function of.

Imports ``base``, ``batch`` and ``terms``. Read first: `distributions.py`.
"""

from jaxreg.regularizers.distributions import LabelSmoothing as LabelSmoothing
from jaxreg.regularizers.distributions import ZLoss as ZLoss
from jaxreg.regularizers.divergences import JS as JS
from jaxreg.regularizers.divergences import KL as KL
from jaxreg.regularizers.entropy import ConfidencePenalty as ConfidencePenalty
from jaxreg.regularizers.entropy import Entropy as Entropy
from jaxreg.regularizers.gaussian import GaussianKL as GaussianKL
from jaxreg.regularizers.matrices import GroupLasso as GroupLasso
from jaxreg.regularizers.matrices import NuclearNorm as NuclearNorm
from jaxreg.regularizers.matrices import SpectralNorm as SpectralNorm
from jaxreg.regularizers.matrices import WeightOrthogonality as WeightOrthogonality
from jaxreg.regularizers.parameters import EWC as EWC
from jaxreg.regularizers.parameters import L2SP as L2SP
from jaxreg.regularizers.parameters import WeightL1 as WeightL1
from jaxreg.regularizers.parameters import WeightL2 as WeightL2
from jaxreg.regularizers.pointwise import L1 as L1
from jaxreg.regularizers.pointwise import L2 as L2
from jaxreg.regularizers.pointwise import ElasticNet as ElasticNet
from jaxreg.regularizers.sequences import Length as Length
from jaxreg.regularizers.sequences import Repetition as Repetition
from jaxreg.regularizers.structure import Consistency as Consistency
from jaxreg.regularizers.structure import GradientPenalty as GradientPenalty
from jaxreg.regularizers.structure import Orthogonality as Orthogonality
from jaxreg.regularizers.tokens import Focal as Focal
from jaxreg.regularizers.tokens import LogRatioL2 as LogRatioL2
from jaxreg.regularizers.tokens import Unlikelihood as Unlikelihood
