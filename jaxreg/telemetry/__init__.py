"""Sinks that write events down, and warnings; users also find here what records a run and what shows it.

Imports ``base``, ``core``, ``events``, ``recorder`` and ``watching``. Read first: `jsonl.py`.
"""

from jaxreg.base.events import Event as Event
from jaxreg.base.events import attach as attach
from jaxreg.base.events import attached as attached
from jaxreg.base.events import detach as detach
from jaxreg.base.events import emit as emit
from jaxreg.events.log import Inputs as Inputs
from jaxreg.events.log import log as log
from jaxreg.recorder.diagnose import Finding as Finding
from jaxreg.recorder.diagnose import diagnose as diagnose
from jaxreg.recorder.recorder import FlightRecorder as FlightRecorder
from jaxreg.recorder.recorder import RecordedStep as RecordedStep
from jaxreg.recorder.recorder import read_recording as read_recording
from jaxreg.recorder.recording import Lost as Lost
from jaxreg.recorder.replay import Replay as Replay
from jaxreg.recorder.replay import replay as replay
from jaxreg.telemetry.jsonl import JSONL as JSONL
from jaxreg.telemetry.logs import Logging as Logging
from jaxreg.telemetry.otel import OpenTelemetry as OpenTelemetry
from jaxreg.telemetry.tensorboard import TensorBoard as TensorBoard
from jaxreg.telemetry.wandb import WandB as WandB
from jaxreg.telemetry.warnings import Warnings as Warnings
from jaxreg.telemetry.wire import TinkerMetrics as TinkerMetrics
from jaxreg.telemetry.wire import tinker_metrics as tinker_metrics
from jaxreg.watching.console import LiveTable as LiveTable
from jaxreg.watching.console import watch as watch
from jaxreg.watching.plots import plot as plot
from jaxreg.watching.report import report as report
from jaxreg.watching.run import Run as Run
from jaxreg.watching.run import Tail as Tail
from jaxreg.watching.run import read_run as read_run
