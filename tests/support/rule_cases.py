"""Every rule as its paper has it: loops in NumPy and float64 over values, norms and magnitudes [steps, K].

The first column is the base loss. Each gives the weights [steps, K - 1] of the others after every step, those
that weigh all losses divided by the base loss's.
"""

import itertools

import jax
import numpy as np
import optax

import jaxreg as jr

W = jr.weighting


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def adaptive_kl(v, n, a):
    w, found = 1.0, []
    for step in v:
        w *= 1 + 0.1 * np.clip(step[1] / 0.8 - 1, -0.2, 0.2)
        found.append([w])
    return found


def dual_ascent(v, n, a):
    w, found = 1.0, []
    for step in v:
        w = max(0.0, w + 0.05 * (step[1] - 1.2))
        found.append([w])
    return found


def geco(v, n, a):
    w, average, found = 1.0, v[0][1], []
    for t, step in enumerate(v):
        average = step[1] if t == 0 else 0.9 * average + 0.1 * step[1]
        w *= np.exp(0.05 * (average - 1.2))
        found.append([w])
    return found


def gradient_share(v, n, a):
    w, found = 1.0, []  # as the weights given
    for step in n:
        w = 0.9 * w + 0.1 * 0.3 * step[0] / step[1]
        found.append([w])
    return found


def averaged(asked, decay):
    last, found = np.ones_like(asked[0]), []
    for step in asked:
        last = decay * last + (1 - decay) * step
        found.append(last[1:] / last[0])
    return found


def gradient_balance(v, n, a):
    return averaged([step.mean() / step for step in n], 0.9)


def lr_annealing(v, n, a):
    largest, means = a
    return averaged([np.r_[1.0, big[0] / mean[1:]] for big, mean in zip(largest, means, strict=True)], 0.9)


def ntk(v, n, a):
    return averaged([step.sum() / step for step in v**2], 0.5)


def gradnorm(v, n, a):
    w, found = np.ones(v.shape[1]), []
    for value, norm in zip(v, n, strict=True):
        lengths, rates = w * norm, value / v[0]
        target = lengths.mean() * (rates / rates.mean()) ** 1.5
        w = w - 0.01 * np.sign(lengths - target) * norm
        w = w * len(w) / w.sum()
        found.append(w[1:] / w[0])
    return found


def softadapt(v, n, a):
    found = [np.ones(v.shape[1] - 1)]
    for last, value in itertools.pairwise(v):
        change = value - last
        w = softmax(0.1 * change / np.abs(change).sum())
        found.append(w[1:] / w[0])
    return found


def relobralo(v, n, a):
    w, found, count = np.ones(v.shape[1]), [np.ones(v.shape[1] - 1)], v.shape[1]
    key = jax.random.split(jax.random.key(3))[0]  # one was drawn at the first step, too
    for last, value in itertools.pairwise(v):
        key, draw = jax.random.split(key)
        keeps = 1 - float(jax.random.bernoulli(draw, np.float32(1 - 0.7)))
        since_first, since_last = (count * softmax(value / (0.5 * then)) for then in (v[0], last))
        w = 0.9 * (keeps * w + (1 - keeps) * since_first) + 0.1 * since_last
        found.append(w[1:] / w[0])
    return found


def dwa(v, n, a):
    found = [np.ones(v.shape[1] - 1)]
    for last, value in itertools.pairwise(v):
        w = softmax(value / last / 2)
        found.append(w[1:] / w[0])
    return found


def famo(v, n, a):
    logits, last, found = np.zeros(v.shape[1]), None, []
    for value in v:
        logs = np.log(value)
        if last is not None:
            p = softmax(logits)
            slope = (np.diag(p) - np.outer(p, p)) @ (last - logs)
            logits = logits - 0.025 * (slope + 0.001 * logits)
        w = softmax(logits) / value
        last = logs
        found.append(w[1:] / w[0])
    return found


def uncertainty(v, n, a):
    s, found = np.zeros(v.shape[1]), []
    for value in v:
        s = s - 0.05 * (1 - np.exp(-s) * value)
        w = np.exp(-s)
        found.append(w[1:] / w[0])
    return found


SGD = optax.sgd(0.05)
CASES = {
    "adaptive_kl": (W.adaptive_kl("a", target=0.8), adaptive_kl),
    "dual_ascent": (W.dual_ascent("a", bound=1.2, rate=0.05), dual_ascent),
    "geco": (W.geco("a", bound=1.2, rate=0.05, decay=0.9), geco),
    "gradient_share": (W.gradient_share("a", share=0.3), gradient_share),
    "gradient_balance": (W.gradient_balance(), gradient_balance),
    "lr_annealing": (W.lr_annealing(), lr_annealing),
    "ntk": (W.ntk(decay=0.5), ntk),
    "gradnorm": (W.gradnorm(rate=0.01), gradnorm),
    "softadapt": (W.softadapt(), softadapt),
    "relobralo": (W.relobralo(temperature=0.5, lookback=0.7, seed=3), relobralo),
    "dwa": (W.dwa(), dwa),
    "famo": (W.famo(), famo),
    "uncertainty": (W.uncertainty(optimizer=SGD), uncertainty),
}
