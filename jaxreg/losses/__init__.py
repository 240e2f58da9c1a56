"""Base losses, by what they learn from.

Imports ``base``, ``batch`` and ``terms``. Read first: `likelihood.py`.
"""

from jaxreg.losses.distillation import KLTopK as KLTopK
from jaxreg.losses.distillation import ReverseKLTopK as ReverseKLTopK
from jaxreg.losses.gspo import GSPO as GSPO
from jaxreg.losses.likelihood import CrossEntropy as CrossEntropy
from jaxreg.losses.policy import CISPO as CISPO
from jaxreg.losses.policy import DRO as DRO
from jaxreg.losses.policy import PPO as PPO
from jaxreg.losses.policy import ImportanceSampling as ImportanceSampling
from jaxreg.losses.preference import DPO as DPO
from jaxreg.losses.preference import SimPO as SimPO
