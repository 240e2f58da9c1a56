"""Every built-in term with an example, and an oracle in NumPy or SciPy float64, written from the formula.

An oracle gets x and the case's data and returns a number a token [B, T] (or a value [B, T, K], or a number a
datum [B]), which the test reduces; or, for a term without a named reduction, the value itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

scipy = pytest.importorskip("scipy")
special = pytest.importorskip("scipy.special")
stats = pytest.importorskip("scipy.stats")

B, T, K, V = 6, 5, 3, 7
LENGTHS = np.array([5, 3, 4, 1, 0, 0])  # the last pair is padding
MASK = np.arange(T) < LENGTHS[:, None]
R, L = jr.regularizers, jr.losses


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    lp = -rng.uniform(0.1, 3, (B, T))
    top = rng.normal(size=(B, T, K))
    return {
        "lp": lp,
        "ref": -rng.uniform(0.1, 3, (B, T)),
        "sampler": lp + 0.3 * rng.normal(size=(B, T)),
        "advantages": rng.normal(size=(B, T)),
        "top": special.log_softmax(np.concatenate([top, rng.normal(size=(B, T, 1))], -1), -1)[..., :K],
        "teacher": special.log_softmax(rng.normal(size=(B, T, K)), -1),
        "teacher_top": special.log_softmax(rng.normal(size=(B, T, K + 1)), -1)[..., :K],
        "logits": rng.normal(size=(B, T, V)),
        "ref_logits": rng.normal(size=(B, T, V)),
        "target_tokens": rng.integers(0, V, (B, T)),
        "unwanted": rng.integers(0, 2, (B, T)).astype(float),
        "weights": rng.uniform(0.2, 2, (B, T)),
        "posterior": rng.normal(size=(B, T, 2 * K)),  # means, then log-variances
        "prior_mean": rng.normal(size=(B, T, K)),
        "prior_log_var": rng.normal(size=(B, T, K)),
    }


def params() -> dict[str, Any]:
    rng = np.random.default_rng(8)
    return {"head": {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}, "body": rng.normal(size=(3, 5))}


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[..., Any]  # of a reduction, where the term has one
    x: str  # which array it is a function of, or "params"
    oracle: Callable[..., Any]
    reduces: bool = True
    pairs: bool = False
    surrogate: Callable[..., Any] | None = None  # what its gradient is the gradient of
    key: bool = False
    rtol: float = 1e-6


def softmax(z):
    return special.softmax(z, -1)


def entropy(z):
    return stats.entropy(softmax(z), axis=-1)


def kl(p, q):
    return stats.entropy(softmax(p), softmax(q), axis=-1)


def gkd(p, q, beta):
    m = (1 - beta) * p + beta * q
    return beta * special.rel_entr(q, m).sum(-1) + (1 - beta) * special.rel_entr(p, m).sum(-1)


def ppo(ratio, a, low, high):
    return -np.minimum(ratio * a, np.clip(ratio, low, high) * a)


def dual(loss, a, c=1.3):
    return np.where(a < 0, np.minimum(loss, -c * a), loss)


def pairwise(scores, beta, gamma=0.0):
    z = beta * (scores[0:4:2] - scores[1:4:2]) - gamma  # the real pairs
    return np.mean(np.log1p(np.exp(-z)))


def cispo(x, d, x0):
    return -np.clip(np.exp(x0 - d["sampler"]), 0, 4) * x * d["advantages"]


def gspo(x, d):
    mean = ((x - d["sampler"]) * MASK).sum(1) / np.maximum(LENGTHS, 1)
    return ppo(np.exp(mean)[:, None] * np.ones((1, T)), d["advantages"], 0.8, 1.2)


def bucket(lp):
    p = np.exp(lp)
    return np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1)


def reverse_kl_topk(x, d, frozen=None):
    p = softmax(x)
    at = x if frozen is None else frozen
    return (p * (special.log_softmax(at, -1) - special.log_softmax(d["teacher"], -1))).sum(-1)


def repetition(z, d, window=32):
    p = softmax(z)
    loss = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        said = {d["target_tokens"][b, s] for s in range(max(0, t - window), t) if MASK[b, s]}
        for c in said - {d["target_tokens"][b, t]}:
            loss[b, t] -= np.log(1 - p[b, t, c])
    return loss


def gram(rows, mode):
    u = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-8)
    away = u @ u.T - np.diag(np.linalg.norm(rows, axis=1) > 0)
    if mode == "spectral":
        return np.abs(np.linalg.eigvalsh(away)).max()
    return ((away - np.diag(np.diag(away))) ** 2).sum() if mode == "soft" else (away**2).sum()


def per_datum_gram(x, d, mode, columns=False):
    rows = [x[b, :n] for b, n in enumerate(LENGTHS) if n]
    return np.mean([gram(r.T if columns else r, mode) for r in rows])


def cosine(x, d):
    pairs = [(x[b, :n].ravel(), d["ref"][b, :n].ravel()) for b, n in enumerate(LENGTHS)]
    return np.array([1 - a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8) for a, b in pairs])


def cubes(x, batch):
    return jnp.sum(jnp.where(batch.mask, x, 0.0) ** 3, axis=1)


def gradient_penalty(x, d):
    norms = np.linalg.norm(np.where(MASK, 3 * x**2, 0), axis=1)
    return np.mean((norms[LENGTHS > 0] - 1) ** 2)


def halves(x, batch):
    return x[..., :K], x[..., K:]


def gaussian_kl(x, m=0.0, s=1.0):
    """−H(q) − E_q[log p], by Gauss–Hermite quadrature, which is exact for log p, a square."""
    mean, scale = x[..., :K], np.exp(x[..., K:] / 2)
    nodes, weights = np.polynomial.hermite.hermgauss(8)
    z = mean[..., None] + np.sqrt(2) * scale[..., None] * nodes
    m, s = (np.broadcast_to(a, mean.shape)[..., None] for a in (m, s))
    cross = (stats.norm.logpdf(z, m, s) * weights).sum(-1) / np.sqrt(np.pi)
    return (-stats.norm(scale=scale).entropy() - cross).sum(-1)


def leaves(p):
    return [p["body"], p["head"]["b"], p["head"]["w"]]


def matrices(p):
    return [p["body"], p["head"]["w"]]


def start():
    return {"head": {"w": np.ones((4, 3)), "b": np.zeros(3)}, "body": np.full((3, 5), 0.5)}


def fisher():
    return {"head": {"w": np.full((4, 3), 0.3), "b": np.arange(3.0)}, "body": np.full((3, 5), 2.0)}


def distance(p, f=None):
    f = leaves(f) if f else [1.0] * 3
    return sum((c * (a - b) ** 2).sum() for a, b, c in zip(leaves(p), leaves(start()), f, strict=True))


def picked(d, z):
    return -np.take_along_axis(special.log_softmax(z, -1), d["target_tokens"][..., None], -1)[..., 0]


SAMPLER = {"sampler": "sampler"}
OF_LOGITS = {"inputs": "logits"}


def of_logits(formula):
    """The formula of the targets' logprobs, as one of the logits."""
    return lambda z, d, *frozen: formula(-picked(d, z), d, *(-picked(d, f) for f in frozen))


CASES = {
    "CrossEntropy": Case(lambda r: L.CrossEntropy(reduction=r), "lp", lambda x, d: -x),
    "CrossEntropy of logits": Case(
        lambda r: L.CrossEntropy(inputs="logits", reduction=r), "logits", lambda x, d: picked(d, x)
    ),
    "ImportanceSampling": Case(
        lambda r: L.ImportanceSampling(reduction=r, **SAMPLER),
        "lp",
        lambda x, d: -np.exp(x - d["sampler"]) * d["advantages"],
    ),
    "PPO, dual clip": Case(
        lambda r: L.PPO(dual_clip=1.3, reduction=r, **SAMPLER),
        "lp",
        lambda x, d: dual(ppo(np.exp(x - d["sampler"]), d["advantages"], 0.8, 1.2), d["advantages"]),
    ),
    "PPO": Case(
        lambda r: L.PPO(reduction=r, **SAMPLER),
        "lp",
        lambda x, d: ppo(np.exp(x - d["sampler"]), d["advantages"], 0.8, 1.2),
    ),
    "CISPO": Case(
        lambda r: L.CISPO(reduction=r, **SAMPLER),
        "lp",
        lambda x, d: cispo(x, d, x),
        surrogate=cispo,
    ),
    "DRO": Case(
        lambda r: L.DRO(reduction=r, **SAMPLER),
        "lp",
        lambda x, d: -(x * d["advantages"] - 0.5 * 0.05 * (x - d["sampler"]) ** 2),
    ),
    "GSPO": Case(lambda r: L.GSPO(reduction=r, **SAMPLER), "lp", gspo),
    "DPO": Case(
        lambda: L.DPO(reference="ref"),
        "lp",
        lambda x, d: pairwise((d["weights"] * MASK * (x - d["ref"])).sum(1), 0.1),
        reduces=False,
        pairs=True,
    ),
    "SimPO": Case(
        lambda: L.SimPO(),
        "lp",
        lambda x, d: pairwise(
            (d["weights"] * MASK * x).sum(1)[:4] / (d["weights"] * MASK).sum(1)[:4], 2.0, 0.5
        ),
        reduces=False,
        pairs=True,
    ),
    "ReverseKLTopK": Case(
        lambda r: L.ReverseKLTopK(reference="teacher", reduction=r),
        "top",
        reverse_kl_topk,
        surrogate=reverse_kl_topk,
    ),
    "KLTopK": Case(
        lambda r: L.KLTopK(reference="teacher", reduction=r),
        "top",
        lambda x, d: special.rel_entr(np.exp(d["teacher"]), softmax(x)).sum(-1),
    ),
    "ReverseKLTopK, bucket": Case(
        lambda r: L.ReverseKLTopK(reference="teacher_top", tail="bucket", reduction=r),
        "top",
        lambda x, d: special.rel_entr(bucket(x), bucket(d["teacher_top"])).sum(-1),
    ),
    "KLTopK, bucket": Case(
        lambda r: L.KLTopK(reference="teacher_top", tail="bucket", reduction=r),
        "top",
        lambda x, d: special.rel_entr(bucket(d["teacher_top"]), bucket(x)).sum(-1),
    ),
    "ReverseKLTopK, ignore": Case(
        lambda r: L.ReverseKLTopK(reference="teacher_top", tail="ignore", reduction=r),
        "top",
        lambda x, d: (np.exp(x) * (x - d["teacher_top"])).sum(-1),
        surrogate=lambda x, d, x0: (np.exp(x) * (x0 - d["teacher_top"])).sum(-1),
    ),
    "KLTopK, ignore": Case(
        lambda r: L.KLTopK(reference="teacher_top", tail="ignore", reduction=r),
        "top",
        lambda x, d: (np.exp(d["teacher_top"]) * (d["teacher_top"] - x)).sum(-1),
    ),
    "KLTopK, renormalize": Case(
        lambda r: L.KLTopK(reference="teacher_top", reduction=r),
        "top",
        lambda x, d: special.rel_entr(softmax(d["teacher_top"]), softmax(x)).sum(-1),
    ),
    "L1": Case(lambda r: R.L1(reduction=r), "logits", lambda x, d: np.abs(x)),
    "L1 of probs": Case(lambda r: R.L1(target="probs", reduction=r), "lp", lambda x, d: np.exp(x)),
    "L2": Case(lambda r: R.L2(reduction=r, strength=0.5), "logits", lambda x, d: 0.5 * x**2),
    "L2, mean, clipped": Case(
        lambda r: R.L2(center="mean", clip=0.5, reduction=r),
        "lp",
        lambda x, d: np.clip(x - np.average(x, weights=d["weights"] * MASK), -0.5, 0.5) ** 2,
    ),
    "L2, number": Case(lambda r: R.L2(center=-1.0, reduction=r), "lp", lambda x, d: (x + 1) ** 2),
    "ElasticNet": Case(
        lambda r: R.ElasticNet(alpha=0.3, reduction=r), "lp", lambda x, d: 0.3 * np.abs(x) + 0.7 * x**2
    ),
    "Entropy": Case(lambda r: R.Entropy(reduction=r), "logits", lambda x, d: entropy(x)),
    "Entropy, maximize": Case(
        lambda r: R.Entropy(mode="maximize", reduction=r), "logits", lambda x, d: -entropy(x)
    ),
    "Entropy, temperature": Case(
        lambda r: R.Entropy(temperature=2.5, normalize=True, reduction=r),
        "logits",
        lambda x, d: entropy(x / 2.5) / np.log(V),
    ),
    "Entropy, sampled": Case(
        lambda r: R.Entropy(reduction=r), "lp", lambda x, d: -x, surrogate=lambda x, d, x0: -x0 * x
    ),
    "Entropy, pathwise": Case(lambda r: R.Entropy(gradient="pathwise", reduction=r), "lp", lambda x, d: -x),
    "Entropy, off-policy": Case(
        lambda r: R.Entropy(reduction=r, **SAMPLER),
        "lp",
        lambda x, d: -x,
        surrogate=lambda x, d, x0: -np.exp(x0 - d["sampler"]) * x0 * x,
    ),
    "KL, k1": Case(
        lambda r: R.KL(reference="ref", estimator="k1", reduction=r),
        "lp",
        lambda x, d: x - d["ref"],
        surrogate=lambda x, d, x0: (x0 - d["ref"]) * x,
    ),
    "KL, k1, pathwise": Case(
        lambda r: R.KL(reference="ref", estimator="k1", gradient="pathwise", reduction=r),
        "lp",
        lambda x, d: x - d["ref"],
    ),
    "KL, k3, score": Case(
        lambda r: R.KL(reference="ref", gradient="score", reduction=r),
        "lp",
        lambda x, d: np.exp(d["ref"] - x) - (d["ref"] - x) - 1,
        surrogate=lambda x, d, x0: (x0 - d["ref"]) * x,
    ),
    "KL, k3, off-policy": Case(
        lambda r: R.KL(reference="ref", reduction=r, **SAMPLER),
        "lp",
        lambda x, d: np.exp(d["ref"] - x) - (d["ref"] - x) - 1,
        surrogate=lambda x, d, x0: np.exp(x0 - d["sampler"]) * (np.exp(d["ref"] - x) - (d["ref"] - x)),
    ),
    "KL, k2": Case(
        lambda r: R.KL(reference="ref", estimator="k2", reduction=r),
        "lp",
        lambda x, d: (x - d["ref"]) ** 2 / 2,
    ),
    "KL, k3": Case(
        lambda r: R.KL(reference="ref", reduction=r),
        "lp",
        lambda x, d: np.exp(d["ref"] - x) - (d["ref"] - x) - 1,
    ),
    "KL": Case(
        lambda r: R.KL(reference="ref_logits", reduction=r), "logits", lambda x, d: kl(x, d["ref_logits"])
    ),
    "KL, reverse": Case(
        lambda r: R.KL(reference="ref_logits", direction="reverse", reduction=r),
        "logits",
        lambda x, d: kl(d["ref_logits"], x),
    ),
    "KL, symmetric": Case(
        lambda r: R.KL(reference="ref_logits", symmetric=True, reduction=r),
        "logits",
        lambda x, d: (kl(x, d["ref_logits"]) + kl(d["ref_logits"], x)) / 2,
    ),
    "JS": Case(
        lambda r: R.JS(reference="ref_logits", reduction=r),
        "logits",
        lambda x, d: np.array(
            [
                [
                    (stats.entropy(p, (p + q) / 2) + stats.entropy(q, (p + q) / 2)) / 2
                    for p, q in zip(softmax(x[b]), softmax(d["ref_logits"][b]), strict=True)
                ]
                for b in range(B)
            ]
        ),
    ),
    "JS, generalized": Case(
        lambda r: R.JS(reference="ref_logits", beta=0.2, reduction=r),
        "logits",
        lambda x, d: gkd(softmax(x), softmax(d["ref_logits"]), 0.2),
    ),
    "JS, 0": Case(
        lambda r: R.JS(reference="ref_logits", beta=0.0, reduction=r),
        "logits",
        lambda x, d: kl(d["ref_logits"], x),
    ),
    "JS, 1": Case(
        lambda r: R.JS(reference="ref_logits", beta=1.0, reduction=r),
        "logits",
        lambda x, d: kl(x, d["ref_logits"]),
    ),
    "ConfidencePenalty": Case(lambda r: R.ConfidencePenalty(reduction=r), "logits", lambda x, d: -entropy(x)),
    "LabelSmoothing": Case(
        lambda r: R.LabelSmoothing(reduction=r),
        "logits",
        lambda x, d: -special.log_softmax(x, -1).mean(-1),
    ),
    "Focal": Case(lambda r: R.Focal(reduction=r), "lp", lambda x, d: -((1 - np.exp(x)) ** 2) * x),
    "ZLoss": Case(lambda r: R.ZLoss(reduction=r), "logits", lambda x, d: special.logsumexp(x, -1) ** 2),
    "Unlikelihood": Case(lambda r: R.Unlikelihood(reduction=r), "lp", lambda x, d: -np.log1p(-np.exp(x))),
    "Repetition": Case(lambda r: R.Repetition(reduction=r), "logits", repetition),
    "Repetition, window": Case(
        lambda r: R.Repetition(window=1, reduction=r), "logits", lambda x, d: repetition(x, d, 1)
    ),
    "Length": Case(
        lambda: R.Length(target=2.0),
        "lp",
        lambda x, d: np.mean((np.maximum(LENGTHS - 2, 0) / 2 * (x * MASK).sum(1))[:4]),
        reduces=False,
    ),
    "LogRatioL2": Case(
        lambda r: R.LogRatioL2(reference="ref", reduction=r), "lp", lambda x, d: (x - d["ref"]) ** 2
    ),
    "LogRatioL2, score": Case(
        lambda r: R.LogRatioL2(reference="ref", gradient="score", reduction=r),
        "lp",
        lambda x, d: (x - d["ref"]) ** 2,
        surrogate=lambda x, d, x0: (x - d["ref"]) ** 2 + (x0 - d["ref"]) ** 2 * x,
    ),
    "Consistency": Case(
        lambda r: R.Consistency(reference="ref", reduction=r), "lp", lambda x, d: (x - d["ref"]) ** 2
    ),
    "Consistency, l1": Case(
        lambda r: R.Consistency(reference="ref", metric="l1", reduction=r),
        "lp",
        lambda x, d: np.abs(x - d["ref"]),
    ),
    "Consistency, cosine": Case(
        lambda r: R.Consistency(reference="ref", metric="cosine", reduction=r), "lp", cosine
    ),
    "Consistency, kl": Case(
        lambda r: R.Consistency(reference="ref_logits", metric="kl", reduction=r),
        "logits",
        lambda x, d: kl(x, d["ref_logits"]),
    ),
    "GaussianKL": Case(
        lambda r: jr.of(halves, R.GaussianKL(reduction=r)), "posterior", lambda x, d: gaussian_kl(x)
    ),
    "GaussianKL, prior": Case(
        lambda r: jr.of(
            halves, R.GaussianKL(prior_mean="prior_mean", prior_log_var="prior_log_var", reduction=r)
        ),
        "posterior",
        lambda x, d: gaussian_kl(x, d["prior_mean"], np.exp(d["prior_log_var"] / 2)),
    ),
    "GradientPenalty": Case(
        lambda: R.GradientPenalty(fn=cubes), "lp", gradient_penalty, reduces=False, key=True
    ),
}
CASES |= {
    f"Orthogonality, {mode}, {axis}": Case(
        lambda mode=mode, axis=axis: R.Orthogonality(mode=mode, axis=axis),
        "logits",
        lambda x, d, mode=mode, axis=axis: per_datum_gram(x, d, mode, axis == "columns"),
        reduces=False,
    )
    for mode in ("soft", "hard", "spectral")
    for axis in ("rows", "columns")
}
CASES |= {
    "WeightL1": Case(
        lambda: R.WeightL1(), "params", lambda p, d: sum(np.abs(a).sum() for a in leaves(p)), False
    ),
    "WeightL2": Case(
        lambda: R.WeightL2(params="head"),
        "params",
        lambda p, d: (p["head"]["w"] ** 2).sum() + (p["head"]["b"] ** 2).sum(),
        False,
    ),
    "GroupLasso": Case(
        lambda: R.GroupLasso(),
        "params",
        lambda p, d: sum(np.sqrt(len(m)) * np.linalg.norm(m, axis=0).sum() for m in matrices(p)),
        False,
    ),
    "GroupLasso, rows": Case(
        lambda: R.GroupLasso(groups="rows"),
        "params",
        lambda p, d: sum(np.sqrt(m.shape[1]) * np.linalg.norm(m, axis=1).sum() for m in matrices(p)),
        False,
    ),
    "GroupLasso, leaves": Case(
        lambda: R.GroupLasso(groups="leaves"),
        "params",
        lambda p, d: sum(np.sqrt(a.size) * np.linalg.norm(a) for a in leaves(p)),
        False,
    ),
    "NuclearNorm": Case(
        lambda: R.NuclearNorm(),
        "params",
        lambda p, d: sum(np.linalg.norm(m, "nuc") for m in matrices(p)),
        False,
    ),
    "SpectralNorm": Case(
        lambda: R.SpectralNorm(iterations=200),
        "params",
        lambda p, d: sum(np.linalg.norm(m, 2) for m in matrices(p)),
        False,
    ),
    "L2SP": Case(lambda: R.L2SP(reference=start()), "params", lambda p, d: distance(p), False),
    "EWC": Case(
        lambda: R.EWC(reference=start(), fisher=fisher()), "params", lambda p, d: distance(p, fisher()), False
    ),
    "WeightOrthogonality": Case(
        lambda: R.WeightOrthogonality(mode="hard"),
        "params",
        lambda p, d: sum(gram(m, "hard") for m in matrices(p)),
        False,
    ),
}
CASES |= {
    f"{name} of logits": Case(
        lambda r, make=make, more=more: make(reduction=r, **OF_LOGITS, **more),
        "logits",
        of_logits(CASES[name].oracle),
        surrogate=of_logits(CASES[name].surrogate) if CASES[name].surrogate else None,
    )
    for name, make, more in [
        ("ImportanceSampling", L.ImportanceSampling, SAMPLER),
        ("PPO", L.PPO, SAMPLER),
        ("CISPO", L.CISPO, SAMPLER),
        ("DRO", L.DRO, SAMPLER),
        ("GSPO", L.GSPO, SAMPLER),
        ("KL, k1", functools.partial(R.KL, estimator="k1"), {"reference": "ref"}),
        ("KL, k3", R.KL, {"reference": "ref"}),
        ("LogRatioL2", R.LogRatioL2, {"reference": "ref"}),
        ("Focal", R.Focal, {}),
        ("Unlikelihood", R.Unlikelihood, {}),
    ]
}
