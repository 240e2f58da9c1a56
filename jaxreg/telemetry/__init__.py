"""Events for everything that happens, sinks that write them down, and something to look at."""

from jaxreg._events import Event as Event
from jaxreg._events import attach as attach
from jaxreg._events import attached as attached
from jaxreg._events import detach as detach
from jaxreg._events import emit as emit
from jaxreg.telemetry.diagnose import Finding as Finding
from jaxreg.telemetry.diagnose import diagnose as diagnose
from jaxreg.telemetry.jsonl import JSONL as JSONL
from jaxreg.telemetry.log import Inputs as Inputs
from jaxreg.telemetry.log import log as log
from jaxreg.telemetry.logs import Logging as Logging
from jaxreg.telemetry.otel import OpenTelemetry as OpenTelemetry
from jaxreg.telemetry.recorder import FlightRecorder as FlightRecorder
from jaxreg.telemetry.recorder import RecordedStep as RecordedStep
from jaxreg.telemetry.recorder import read_recording as read_recording
from jaxreg.telemetry.recording import Lost as Lost
from jaxreg.telemetry.replay import Replay as Replay
from jaxreg.telemetry.replay import replay as replay
from jaxreg.telemetry.tensorboard import TensorBoard as TensorBoard
from jaxreg.telemetry.wandb import WandB as WandB
from jaxreg.telemetry.warnings import Warnings as Warnings
from jaxreg.telemetry.wire import TinkerMetrics as TinkerMetrics
from jaxreg.telemetry.wire import tinker_metrics as tinker_metrics
