"""Rules that turn a step's output into the next step's weights: pure ``init`` and ``update``, as in optax.

Imports ``base``. Read first: `rule.py`, then `targets.py`.
"""

from jaxreg.weighting.balances import gradient_balance as gradient_balance
from jaxreg.weighting.balances import gradnorm as gradnorm
from jaxreg.weighting.balances import lr_annealing as lr_annealing
from jaxreg.weighting.balances import ntk as ntk
from jaxreg.weighting.balances import ntk_trace as ntk_trace
from jaxreg.weighting.chain import chain as chain
from jaxreg.weighting.progress import dwa as dwa
from jaxreg.weighting.progress import famo as famo
from jaxreg.weighting.progress import relobralo as relobralo
from jaxreg.weighting.progress import softadapt as softadapt
from jaxreg.weighting.progress import uncertainty as uncertainty
from jaxreg.weighting.rule import Rule as Rule
from jaxreg.weighting.rule import custom as custom
from jaxreg.weighting.targets import adaptive_kl as adaptive_kl
from jaxreg.weighting.targets import dual_ascent as dual_ascent
from jaxreg.weighting.targets import geco as geco
from jaxreg.weighting.targets import gradient_share as gradient_share
from jaxreg.weighting.targets import schedule as schedule
from jaxreg.weighting.wrappers import clip as clip
from jaxreg.weighting.wrappers import ema as ema
from jaxreg.weighting.wrappers import every as every
from jaxreg.weighting.wrappers import freeze as freeze
from jaxreg.weighting.wrappers import normalize as normalize
from jaxreg.weighting.wrappers import warmup as warmup
