"""Every built-in term once more, as PyTorch's own functions compute it.

A peer gets x and the data as float64 tensors and returns what an oracle of `library_cases` returns: a number
a token, which the test reduces, or the value itself. The derivative is PyTorch's.
"""

import pytest
from library_cases import CASES, LENGTHS, MASK, B, K, T, V, fisher, start

torch = pytest.importorskip("torch")
F = torch.nn.functional
Categorical, Normal = torch.distributions.Categorical, torch.distributions.Normal
kl_divergence = torch.distributions.kl_divergence

REAL = torch.tensor(MASK)
COUNTS = torch.tensor(LENGTHS)


def kl(p, q):
    return kl_divergence(Categorical(logits=p), Categorical(logits=q))


def ppo(ratio, a, low=0.8, high=1.2):
    return torch.maximum(-ratio * a, -ratio.clamp(low, high) * a)


def gspo(x, d):
    mean = torch.where(REAL, x - d["sampler"], 0.0).sum(1) / COUNTS.clamp_min(1)
    return ppo(mean.exp()[:, None].expand(B, T), d["advantages"])


def dpo(x, d):
    scores = (d["weights"] * torch.where(REAL, x - d["ref"], 0.0)).sum(1)
    return -F.logsigmoid(0.1 * (scores[0:4:2] - scores[1:4:2])).mean()


def simpo(x, d):
    weights = d["weights"] * REAL
    means = (weights * x).sum(1)[:4] / weights.sum(1)[:4]
    return -F.logsigmoid(2.0 * (means[0::2] - means[1::2]) - 0.5).mean()


def reverse_kl_topk(x, d):
    return kl_divergence(Categorical(logits=x), Categorical(logits=d["teacher"]))


def js(x, d):
    p, q = Categorical(logits=x), Categorical(logits=d["ref_logits"])
    middle = Categorical(probs=(p.probs + q.probs) / 2)
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


def gaussian_kl(x, mean, log_var):
    posterior = Normal(x[..., :K], (x[..., K:] / 2).exp())
    return kl_divergence(posterior, Normal(mean, (log_var / 2).exp())).sum(-1)


def gkd(x, reference, beta):
    p, q = Categorical(logits=x), Categorical(logits=reference)
    middle = Categorical(probs=(1 - beta) * p.probs + beta * q.probs)
    return beta * kl_divergence(q, middle) + (1 - beta) * kl_divergence(p, middle)


def bucket(x):
    return Categorical(probs=torch.cat([x.exp(), 1 - x.exp().sum(-1, keepdim=True)], -1))


def like(value, surrogate):
    """The value, with the gradient of the surrogate."""
    return value.detach() + surrogate - surrogate.detach()


def chosen(name):
    """The peer of sampled tokens' logprobs, as one of logits."""
    return lambda z, d: PEERS[name](Categorical(logits=z).log_prob(d["target_tokens"]), d)


def centred(x, d):
    mean = torch.sum(x * d["weights"] * REAL) / torch.sum(d["weights"] * REAL)
    return (x - mean).clamp(-0.5, 0.5) ** 2


def repetition(z, d, window=32):
    p = F.softmax(z, -1)
    rows = []
    for b in range(B):
        for t in range(T):
            said = set(
                d["target_tokens"][b, max(0, t - window) : t][REAL[b, max(0, t - window) : t]].tolist()
            )
            others = sorted(said - {int(d["target_tokens"][b, t])})
            zeros = torch.zeros(len(others), dtype=p.dtype)
            rows.append(F.binary_cross_entropy(p[b, t, others], zeros, reduction="sum"))
    return torch.stack(rows).reshape(B, T)


def cosine(x, d):
    a, b = (torch.where(REAL, v, 0.0) for v in (x, d["ref"]))
    return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-16)


def gram(rows, mode):
    unit = F.normalize(rows, dim=1, eps=1e-8)
    away = unit @ unit.T - torch.eye(len(rows), dtype=rows.dtype)
    if mode == "spectral":
        return torch.linalg.matrix_norm(away, 2)
    return away.fill_diagonal_(0).square().sum() if mode == "soft" else away.square().sum()


def orthogonality(mode, axis):
    def value(x, d):
        matrices = [x[b, :n] for b, n in enumerate(LENGTHS) if n]
        return torch.stack([gram(m if axis == "rows" else m.T, mode) for m in matrices]).mean()

    return value


def gradient_penalty(x, d):
    f = torch.where(REAL, x, 0.0).pow(3).sum()
    (slope,) = torch.autograd.grad(f, x, create_graph=True)
    return (torch.linalg.vector_norm(slope[COUNTS > 0], dim=1) - 1).square().mean()


def leaves(p):
    return [p["body"], p["head"]["b"], p["head"]["w"]]


def matrices(p):
    return [p["body"], p["head"]["w"]]


def from_start(p, weights=None):
    weights = leaves(weights) if weights else [1.0] * 3
    pairs = zip(leaves(p), leaves(start()), weights, strict=True)
    return sum(
        (torch.as_tensor(w) * F.mse_loss(a, torch.tensor(b), reduction="none")).sum() for a, b, w in pairs
    )


norm = torch.linalg.vector_norm
PEERS = {
    "CrossEntropy": lambda x, d: F.nll_loss(
        x.flatten()[:, None], torch.zeros(x.numel(), dtype=torch.long), reduction="none"
    ).reshape(x.shape),
    "CrossEntropy of logits": lambda x, d: F.cross_entropy(
        x.transpose(1, 2), d["target_tokens"], reduction="none"
    ),
    "ImportanceSampling": lambda x, d: -(x - d["sampler"]).exp() * d["advantages"],
    "PPO": lambda x, d: ppo((x - d["sampler"]).exp(), d["advantages"]),
    "PPO, dual clip": lambda x, d: torch.where(
        d["advantages"] < 0,
        torch.minimum(ppo((x - d["sampler"]).exp(), d["advantages"]), -1.3 * d["advantages"]),
        ppo((x - d["sampler"]).exp(), d["advantages"]),
    ),
    "CISPO": lambda x, d: -(x - d["sampler"]).exp().clamp(0, 4).detach() * x * d["advantages"],
    "DRO": lambda x, d: 0.5 * 0.05 * F.mse_loss(x, d["sampler"], reduction="none") - x * d["advantages"],
    "GSPO": gspo,
    "DPO": dpo,
    "SimPO": simpo,
    "ReverseKLTopK": reverse_kl_topk,
    "KLTopK": lambda x, d: F.kl_div(
        F.log_softmax(x, -1), d["teacher"], log_target=True, reduction="none"
    ).sum(-1),
    "ReverseKLTopK, bucket": lambda x, d: kl_divergence(bucket(x), bucket(d["teacher_top"])),
    "KLTopK, bucket": lambda x, d: kl_divergence(bucket(d["teacher_top"]), bucket(x)),
    "ReverseKLTopK, ignore": lambda x, d: like(
        (x.exp() * (x - d["teacher_top"])).sum(-1), (x.exp() * (x - d["teacher_top"]).detach()).sum(-1)
    ),
    "KLTopK, ignore": lambda x, d: F.kl_div(x, d["teacher_top"], log_target=True, reduction="none").sum(-1),
    "KLTopK, renormalize": lambda x, d: kl(d["teacher_top"], x),
    "L1": lambda x, d: F.l1_loss(x, torch.zeros_like(x), reduction="none"),
    "L1 of probs": lambda x, d: x.exp(),
    "L2": lambda x, d: 0.5 * F.mse_loss(x, torch.zeros_like(x), reduction="none"),
    "L2, mean, clipped": centred,
    "L2, number": lambda x, d: F.mse_loss(x, torch.full_like(x, -1.0), reduction="none"),
    "ElasticNet": lambda x, d: 0.3 * x.abs() + 0.7 * x.square(),
    "Entropy": lambda x, d: Categorical(logits=x).entropy(),
    "Entropy, maximize": lambda x, d: -Categorical(logits=x).entropy(),
    "Entropy, temperature": lambda x, d: (
        Categorical(logits=x / 2.5).entropy() / torch.log(torch.tensor(float(V), dtype=x.dtype))
    ),
    "Entropy, sampled": lambda x, d: like(-x, x.detach() * -x),
    "Entropy, pathwise": lambda x, d: x.neg(),
    "Entropy, off-policy": lambda x, d: like(-x, (x - d["sampler"]).exp().detach() * x.detach() * -x),
    "KL, k1": lambda x, d: like(x - d["ref"], (x - d["ref"]).detach() * x),
    "KL, k1, pathwise": lambda x, d: x - d["ref"],
    "KL, k3, score": lambda x, d: like(
        torch.expm1(d["ref"] - x) - (d["ref"] - x), (x - d["ref"]).detach() * x
    ),
    "KL, k3, off-policy": lambda x, d: like(
        torch.expm1(d["ref"] - x) - (d["ref"] - x),
        (x - d["sampler"]).exp().detach() * (torch.expm1(d["ref"] - x) - (d["ref"] - x)),
    ),
    "KL, k2": lambda x, d: 0.5 * F.mse_loss(x, d["ref"], reduction="none"),
    "KL, k3": lambda x, d: torch.expm1(d["ref"] - x) - (d["ref"] - x),
    "KL": lambda x, d: kl(x, d["ref_logits"]),
    "KL, reverse": lambda x, d: kl(d["ref_logits"], x),
    "KL, symmetric": lambda x, d: (kl(x, d["ref_logits"]) + kl(d["ref_logits"], x)) / 2,
    "JS": js,
    "JS, generalized": lambda x, d: gkd(x, d["ref_logits"], 0.2),
    "JS, 0": lambda x, d: kl(d["ref_logits"], x),
    "JS, 1": lambda x, d: kl(x, d["ref_logits"]),
    "ConfidencePenalty": lambda x, d: -Categorical(logits=x).entropy(),
    "LabelSmoothing": lambda x, d: F.cross_entropy(
        x.transpose(1, 2), d["target_tokens"], label_smoothing=1.0, reduction="none"
    ),
    "Focal": lambda x, d: (1 - x.exp()).square() * -x,
    "ZLoss": lambda x, d: torch.logsumexp(x, -1).square(),
    "Unlikelihood": lambda x, d: F.binary_cross_entropy(x.exp(), torch.zeros_like(x), reduction="none"),
    "Repetition": repetition,
    "Repetition, window": lambda x, d: repetition(x, d, 1),
    "Length": lambda x, d: (F.relu(COUNTS - 2.0) / 2 * torch.where(REAL, x, 0.0).sum(1))[:4].mean(),
    "LogRatioL2": lambda x, d: F.mse_loss(x, d["ref"], reduction="none"),
    "LogRatioL2, score": lambda x, d: like(
        (x - d["ref"]).square(), (x - d["ref"]).square() + (x - d["ref"]).square().detach() * x
    ),
    "Consistency": lambda x, d: F.mse_loss(x, d["ref"], reduction="none"),
    "Consistency, l1": lambda x, d: F.l1_loss(x, d["ref"], reduction="none"),
    "Consistency, cosine": cosine,
    "Consistency, kl": lambda x, d: kl(x, d["ref_logits"]),
    "GaussianKL": lambda x, d: gaussian_kl(x, torch.zeros(K).to(x), torch.zeros(K).to(x)),
    "GaussianKL, prior": lambda x, d: gaussian_kl(x, d["prior_mean"], d["prior_log_var"]),
    "GradientPenalty": gradient_penalty,
    "WeightL1": lambda p, d: sum(norm(a.flatten(), 1) for a in leaves(p)),
    "WeightL2": lambda p, d: sum(norm(a) ** 2 for a in p["head"].values()),
    "GroupLasso": lambda p, d: sum(len(m) ** 0.5 * norm(m, dim=0).sum() for m in matrices(p)),
    "GroupLasso, rows": lambda p, d: sum(m.shape[1] ** 0.5 * norm(m, dim=1).sum() for m in matrices(p)),
    "GroupLasso, leaves": lambda p, d: sum(a.numel() ** 0.5 * norm(a) for a in leaves(p)),
    "NuclearNorm": lambda p, d: sum(torch.linalg.matrix_norm(m, "nuc") for m in matrices(p)),
    "SpectralNorm": lambda p, d: sum(torch.linalg.matrix_norm(m, 2) for m in matrices(p)),
    "L2SP": lambda p, d: from_start(p),
    "EWC": lambda p, d: from_start(p, fisher()),
    "WeightOrthogonality": lambda p, d: sum(gram(m, "hard") for m in matrices(p)),
} | {
    f"Orthogonality, {mode}, {axis}": orthogonality(mode, axis)
    for mode in ("soft", "hard", "spectral")
    for axis in ("rows", "columns")
}
LOGITS = " of logits"
PEERS |= {
    name: chosen(name.removesuffix(LOGITS)) for name in CASES if name.endswith(LOGITS) and name not in PEERS
}
assert PEERS.keys() == CASES.keys()
