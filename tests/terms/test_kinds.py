"""Which term belongs to which kind of fault. A new term must say; the tests of a kind run over all of it."""

import dataclasses

import pytest
import test_estimators
import test_overflow
import test_params_terms
import test_top_k
import test_whole_distributions
from library_cases import CASES

import jaxreg as jr

KINDS = {
    # Sums or means over tokens: a named reduction, token_mean by default; weights of 0, holes, shards.
    "tokens": "CrossEntropy ImportanceSampling PPO CISPO DRO GSPO ReverseKLTopK KLTopK L1 L2 ElasticNet "
    "Entropy KL ZLoss JS ConfidencePenalty LabelSmoothing Focal LogRatioL2 Unlikelihood"
    " Consistency Repetition GaussianKL",
    # Of a datum's tokens that count, as a whole.
    "sequence": "GSPO DPO SimPO Length Consistency GradientPenalty Orthogonality Repetition",
    "pairs": "DPO SimPO",
    # Ratios of probabilities: log-ratios of ±100 are ordinary.
    "ratio": "ImportanceSampling PPO CISPO DRO GSPO KL LogRatioL2 Entropy",
    # On a clip's edge the whole gradient of one side.
    "clip": "PPO CISPO GSPO L2 Unlikelihood Repetition GaussianKL",
    # Of sampled tokens, whose gradient is that of an expectation: gradient="score" | "pathwise".
    "estimator": "Entropy KL LogRatioL2",
    "top_k": "ReverseKLTopK KLTopK",
    # Whole distributions of any leading axes, a padded vocabulary's too.
    "distribution": "CrossEntropy Entropy KL JS ConfidencePenalty LabelSmoothing ZLoss Focal LogRatioL2",
    # Token numbers are read: what is no word is refused.
    "targets": "CrossEntropy ImportanceSampling PPO CISPO DRO GSPO DPO SimPO KL LogRatioL2 Focal "
    "Unlikelihood Repetition",
    # Scales from 1e-18 to 1e18.
    "scale": "Consistency Orthogonality GradientPenalty GaussianKL WeightL1 WeightL2 GroupLasso NuclearNorm "
    "SpectralNorm L2SP EWC WeightOrthogonality",
    "parameters": "WeightL1 WeightL2 GroupLasso NuclearNorm SpectralNorm L2SP EWC WeightOrthogonality",
    # Matrices, perhaps stacked by layers.
    "matrices": "GroupLasso NuclearNorm SpectralNorm WeightOrthogonality",
}
KINDS = {kind: set(names.split()) for kind, names in KINDS.items()}
TERMS = {
    name: kind
    for room in (jr.losses, jr.regularizers)
    for name, kind in vars(room).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def arguments(term):
    return {field.name for field in dataclasses.fields(term)}


def names(terms):
    return {type(term).__name__ for term in terms}


def test_every_term_says_what_it_is_and_stands_before_the_contract():
    assert set().union(*KINDS.values()) == TERMS.keys()
    assert {name.partition(",")[0].partition(" of ")[0] for name in CASES} == TERMS.keys()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("tokens", lambda term: "reduction" in arguments(term)),
        ("pairs", lambda term: getattr(term, "rows_together", 1) == 2),
        ("estimator", lambda term: "gradient" in arguments(term)),
        ("top_k", lambda term: "tail" in arguments(term)),
        ("parameters", lambda term: getattr(term, "place", None) == "params"),
        ("matrices", lambda term: "layers" in arguments(term)),
        ("targets", lambda term: bool({"targets", "tokens"} & arguments(term))),
    ],
)
def test_a_kind_is_what_the_terms_themselves_say(kind, says):
    assert {name for name, term in TERMS.items() if says(term)} == KINDS[kind]


def test_every_token_term_averages_by_default():
    defaults = {f.name: f.default for term in KINDS["tokens"] for f in dataclasses.fields(TERMS[term])}
    assert defaults["reduction"] == "token_mean"
    for name in KINDS["tokens"]:
        (reduction,) = (f.default for f in dataclasses.fields(TERMS[name]) if f.name == "reduction")
        assert reduction == "token_mean", name


def test_the_tests_of_a_kind_run_over_all_of_it():
    overflow = [*test_overflow.TERMS, *test_overflow.SUMMED, *test_overflow.EXACT]
    assert names(overflow) == KINDS["ratio"]
    assert names(make() for make, *_ in test_estimators.TERMS) == KINDS["estimator"]
    assert {make.__name__ for make in test_top_k.LOSSES} == KINDS["top_k"]
    assert names(term for term, _ in test_whole_distributions.TERMS.values()) == KINDS["distribution"]
    assert {n.partition(",")[0] for n in test_params_terms.MATRICES} == KINDS["matrices"]
    assert {n.partition(",")[0] for n in test_params_terms.TERMS} == KINDS["parameters"]
    assert names(test_whole_distributions.OF_TARGETS) == KINDS["targets"]
