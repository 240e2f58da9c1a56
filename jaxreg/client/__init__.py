"""Remote fine-tuning: the server runs the model, the loss is computed and differentiated here.

Imports ``base``, ``batch``, ``core``, ``events``, ``host`` and ``recorder``, to say what went wrong.
Read first: `step.py`, where a step is one line.
"""

from jaxreg.client import payload as payload
from jaxreg.client.check import BackendReport as BackendReport
from jaxreg.client.check import check_backend as check_backend
from jaxreg.client.custom import forward_backward_custom as forward_backward_custom
from jaxreg.client.custom import forward_backward_custom_async as forward_backward_custom_async
from jaxreg.client.embedded import EmbeddedTrainingClient as EmbeddedTrainingClient
from jaxreg.client.errors import BadReply as BadReply
from jaxreg.client.errors import LogprobDrift as LogprobDrift
from jaxreg.client.errors import NonFiniteGradient as NonFiniteGradient
from jaxreg.client.errors import RemoteError as RemoteError
from jaxreg.client.errors import RequestFailed as RequestFailed
from jaxreg.client.errors import RequestTimedOut as RequestTimedOut
from jaxreg.client.finish import CustomFuture as CustomFuture
from jaxreg.client.torch_bridge import CustomLoss as CustomLoss
from jaxreg.client.torch_bridge import as_custom_loss as as_custom_loss
from jaxreg.client.types import AdamParams as AdamParams
from jaxreg.client.types import CustomResult as CustomResult
from jaxreg.client.types import Datum as Datum
from jaxreg.client.types import Drift as Drift
