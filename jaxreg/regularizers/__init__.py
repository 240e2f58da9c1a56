"""Regularizers, by what they are a function of."""

from jaxreg.regularizers.distributions import KL as KL
from jaxreg.regularizers.distributions import Entropy as Entropy
from jaxreg.regularizers.distributions import ZLoss as ZLoss
from jaxreg.regularizers.parameters import L2SP as L2SP
from jaxreg.regularizers.pointwise import L1 as L1
from jaxreg.regularizers.pointwise import L2 as L2
