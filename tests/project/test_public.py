"""A change of the public face is seen in review: its listing is part of the repository."""

import importlib.util
import inspect

import pytest
from places import ROOT

LISTING = ROOT / "docs" / "public.txt"


@pytest.fixture(scope="module")
def public():
    spec = importlib.util.spec_from_file_location("public", ROOT / "docs" / "public.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_listing_is_what_the_package_offers(public):
    assert public.listing().splitlines() == LISTING.read_text().splitlines(), "run python docs/public.py"


def test_a_name_has_a_docstring_and_a_function_or_a_term_an_example(public):
    bare, without = [], []
    for module in public.MODULES:
        for name, value in public.public_names(module):
            if not (doc := inspect.getdoc(value)):
                bare.append(f"{module}.{name}")
            elif ">>>" not in doc and needs_example(module, name, value):
                without.append(f"{module}.{name}")
    assert not bare, bare
    assert not without, without


def needs_example(module, name, value):
    """What users call; what they are handed (results, errors) shows in the examples of what hands it out."""
    handed = (
        "Output",
        "Report",
        "Result",
        "Future",
        "Drift",
        "Finding",
        "RecordedStep",
        "Replay",
        "CustomLoss",
    )
    if inspect.isclass(value):
        return not issubclass(value, Exception) and not name.endswith(handed)
    return callable(value) and (module, name) != ("jaxreg.telemetry", "watch")  # it waits for a Ctrl-C
