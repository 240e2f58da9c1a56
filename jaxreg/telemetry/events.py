"""TEMPORARY: until all import from jaxreg._events."""
from jaxreg._events import *  # noqa
from jaxreg._events import LOGGER as LOGGER, Event as Event, emit as emit, attach as attach, detach as detach, attached as attached, listening as listening
