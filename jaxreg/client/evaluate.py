"""The objective at some logprobs, and its gradient; host terms run beside what is compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxreg.base.events import listening
from jaxreg.batch.packing import pad
from jaxreg.client.errors import NonFiniteGradient, RemoteError
from jaxreg.client.host_terms import joined
from jaxreg.client.telling import Telling
from jaxreg.client.wire import first_nonfinite
from jaxreg.client.work import Evaluated, Work
from jaxreg.core.spec import BASE
from jaxreg.events.log import Inputs
from jaxreg.recorder.diagnose import diagnose


def evaluate(work: Work, logprobs: Sequence[np.ndarray], told: Telling) -> Evaluated:
    """All of it, by one compiled program and the host terms, of which those that read logprobs start here.

    Raises:
      NonFiniteGradient: naming the terms, and the first datum and token.
      HostTermError: see `HostRegularizer`.
    """
    told.lap("forward")
    # Views that cannot be written: host functions must not edit what the compiled pass reads meanwhile.
    work.calls.start(work.packed.data, [np.broadcast_to(values, values.shape) for values in logprobs])
    if listening():
        told.inputs = Inputs(work.compiled, list(logprobs), work.packed.batch, work.state, work.key)
    try:
        done = _differentiate(work, logprobs)
        told.lap("objective")
        if work.calls.terms:
            done = joined(work, done, work.calls.collect())
    except RemoteError:
        raise  # it says so itself
    except Exception as error:  # a host term's, beside what is compiled or inside it
        error.add_note("No gradient was sent: the remote model is as it was.")
        raise
    told.lap("host")
    return done


def _differentiate(work: Work, logprobs: Sequence[np.ndarray]) -> Evaluated:
    """The compiled terms at ragged logprobs."""
    batch = work.packed.batch
    inputs = Inputs(work.compiled, pad(logprobs, *batch.shape), batch, work.state, work.key)
    (_, output), gradient = work.compiled.value_and_grad(inputs.x, batch, state=work.state, key=work.key)
    host = np.asarray(gradient)
    gradients = batch.unpack(host)  # without padding, where a term may have left what it likes
    if not np.isfinite(host).all() and (found := first_nonfinite(gradients)):
        findings = diagnose(inputs)  # it compiles, but only after a failure
        terms = tuple(dict.fromkeys(f.term for f in findings if f.where == "gradient" and f.term))
        guilty = " and ".join("the base loss" if name == BASE else f"term {name!r}" for name in terms)
        nobody = "the weighted sum: the gradient of each term alone is finite"
        raise NonFiniteGradient.at(found, guilty or nobody, terms)
    return Evaluated(output, gradients)
