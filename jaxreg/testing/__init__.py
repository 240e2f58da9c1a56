"""Checks: that this JAX computes right on this machine, and that a term of your own keeps the contract.

Imports ``base``, ``batch`` and ``core``. Read first: `terms.py`.
"""

from jaxreg.testing.aggregators import AggregatorCheckError as AggregatorCheckError
from jaxreg.testing.aggregators import check_aggregator as check_aggregator
from jaxreg.testing.numerics import NumericsReport as NumericsReport
from jaxreg.testing.numerics import check_numerics as check_numerics
from jaxreg.testing.rules import RuleCheckError as RuleCheckError
from jaxreg.testing.rules import check_rule as check_rule
from jaxreg.testing.terms import TermCheckError as TermCheckError
from jaxreg.testing.terms import check_term as check_term
