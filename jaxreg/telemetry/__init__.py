"""Events for everything that happens, sinks that write them down, and something to look at."""

from jaxreg.telemetry.events import Event as Event
from jaxreg.telemetry.events import attach as attach
from jaxreg.telemetry.events import attached as attached
from jaxreg.telemetry.events import detach as detach
from jaxreg.telemetry.events import emit as emit
from jaxreg.telemetry.log import Inputs as Inputs
from jaxreg.telemetry.log import log as log
