"""Aggregators in NumPy and float64, from the gradients themselves, and the gradients to try them on."""

import numpy as np
from scipy.optimize import brentq, nnls

KINDS = ("random", "conflicting", "parallel", "opposite", "zero", "deficient", "scaled")


def gradients(kind, count, cases, seed=0):
    """[cases, count, D] float64."""
    rng = np.random.default_rng([seed, KINDS.index(kind), count])
    rows = rng.normal(size=(cases, count, max(count + 3, 8)))
    if kind == "conflicting":
        rows = rows - 1.5 * rows.mean(1, keepdims=True)
    if kind == "parallel":
        rows = rows[:, :1] * rng.uniform(0.5, 2, (cases, count, 1))
    if kind == "opposite":
        signs = np.where(np.arange(count) % 2, -1.0, 1.0)[:, None]
        rows = signs * rows[:, :1] * rng.uniform(0.5, 2, (cases, count, 1))
    if kind == "zero":
        rows[np.arange(cases), rng.integers(0, count, cases)] = 0
    if kind == "deficient":
        rank = max(1, count // 2)
        rows = rng.normal(size=(cases, count, rank)) @ rng.normal(size=(cases, rank, rows.shape[2]))
    if kind == "scaled":
        rows = rows * 10.0 ** rng.uniform(-6, 6, (cases, count, 1))
    return rows


def units(rows):
    lengths = np.linalg.norm(rows, axis=1)
    return lengths, rows / np.where(lengths > 0, lengths, 1)[:, None]


def _regularized(unit, eps):
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 1)
    return cosines + eps * np.eye(len(unit))


def _above(q, least):
    """argmin xᵀQx over x ≥ least."""
    root = np.linalg.cholesky(q)
    return least + nnls(root.T, np.linalg.solve(root, -q @ least), maxiter=1000)[0]


def upgrad(rows, eps=1e-4):
    lengths, unit = units(rows)
    q = _regularized(unit, eps)
    return sum(length * _above(q, own) @ unit for length, own in zip(lengths, np.eye(len(rows)), strict=True))


def dualproj(rows, eps=1e-4):
    lengths, unit = units(rows)
    largest = lengths.max() or 1.0
    return largest * _above(_regularized(unit, eps), lengths / largest) @ unit


def hull(rows):
    """The shortest vector of the convex hull."""
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    size = np.linalg.norm(rows, axis=1).min()
    weights = nnls(
        np.vstack([rows.T / size, np.ones(len(rows))]), np.r_[np.zeros(rows.shape[1]), 1], maxiter=10000
    )[0]
    return weights @ rows / weights.sum(), weights / weights.sum()


def mgda(rows):
    return hull(rows)[0]


def cagrad(rows, c=0.4):
    scale = np.linalg.norm(rows)
    rows = rows / scale
    mean = rows.mean(0)
    radius = c * np.linalg.norm(mean)
    present = rows[np.linalg.norm(rows, axis=1) > 0]
    if radius < 1e-9:
        return scale * mean

    def length(log):
        shift = np.exp(log) / radius
        weights = nnls_simplex(present + shift * mean)
        return np.linalg.norm(weights @ present), weights

    low, high = np.log(1e-9), 1e-9
    if length(low)[0] <= 1e-9:
        return np.zeros_like(mean)
    at = brentq(lambda log: np.log(max(length(log)[0], 1e-12)) - log, low, high, xtol=1e-13)
    found, weights = length(at)
    if found <= 1e-3 * (weights @ np.linalg.norm(present, axis=1)):
        return np.zeros_like(mean)
    return scale * (mean + radius * (weights @ present) / found)


def nnls_simplex(rows):
    size = np.linalg.norm(rows, axis=1).min() or 1.0
    matrix = np.vstack([rows.T / size, np.ones(len(rows))])
    weights = nnls(matrix, np.r_[np.zeros(rows.shape[1]), 1], maxiter=10000)[0]
    return weights / weights.sum()


def imtlg(rows):
    lengths, unit = units(rows)
    gram = rows @ rows.T
    scale = np.abs(gram).max()
    if np.linalg.matrix_rank(unit, tol=1e-6) == (lengths > 0).sum():
        kept = lengths > 0
        weights = np.zeros(len(rows))
        weights[kept] = np.linalg.solve(unit[kept] @ unit[kept].T, np.ones(kept.sum())) / lengths[kept]
    else:
        weights = np.linalg.pinv(gram / scale, rcond=1e-10, hermitian=True) @ lengths
    total = weights.sum()
    return np.zeros(rows.shape[1]) if abs(total) < 1e-7 * np.abs(weights).max() else weights @ rows / total


def config(rows):
    lengths, unit = units(rows)
    direction = np.linalg.pinv(unit, rcond=1e-6) @ (lengths > 0)
    length = np.linalg.norm(direction)
    if length < 1e-10:  # opposite gradients: nothing but rounding
        return direction * 0
    direction = direction / length
    return (rows @ direction).sum() * direction


def alignedmtl(rows):
    scale = np.linalg.norm(rows)
    left, values, right = np.linalg.svd(rows / scale, full_matrices=False)
    kept = values > 1e-5 * values.max()
    left, right = left[:, kept], right[kept]
    return scale * values[kept].min() * (left.sum(0) @ right)


def fairgrad(rows, alpha=1.0):
    """Damped Newton in float64 on the convex function whose gradient is the equation."""
    lengths, unit = units(rows)
    kept = lengths > 0
    cosines, power = unit[kept] @ unit[kept].T + 1e-6 * np.eye(kept.sum()), 1 / alpha
    right = lengths[kept] ** (power - 1)
    y = right ** (1 / (1 + power))
    for _ in range(60):
        slope = cosines @ y - right * y**-power
        step = np.linalg.solve(cosines + np.diag(power * right * y ** (-power - 1)), -slope)
        size = 1.0
        while np.any(y + size * step <= 0) or _worth(cosines, right, power, y + size * step) > _worth(
            cosines, right, power, y
        ) + 1e-4 * size * (slope @ step):
            size /= 2
            if size < 1e-12:
                break
        y = y + size * step if size >= 1e-12 else y
        if np.abs(slope).max() < 1e-14:
            break
    return y @ unit[kept], y


def _worth(cosines, right, power, y):
    barrier = np.log(y) if power == 1 else y ** (1 - power) / (1 - power)
    return y @ cosines @ y / 2 - right @ barrier


def pcgrad(rows, orders):
    total = np.zeros(rows.shape[1])
    for i, order in enumerate(orders):
        own = rows[i].copy()
        for j in order:
            if j != i and (along := own @ rows[j]) < 0 and rows[j].any():
                own -= along / (rows[j] @ rows[j]) * rows[j]
        total += own
    return total


def gradvac(rows, orders, targets, beta):
    total, targets = np.zeros(rows.shape[1]), targets.copy()
    for i, order in enumerate(orders):
        own = rows[i].copy()
        for j in order:
            if j == i or not rows[j].any() or not rows[i].any():
                continue
            length, other = np.linalg.norm(own), np.linalg.norm(rows[j])
            cosine, target = own @ rows[j] / ((length * other) or 1.0), targets[i, j]
            if cosine < target:
                sine, wanted = np.sqrt(max(0, 1 - cosine**2)), np.sqrt(1 - target**2)
                own = own + length * (target * sine - cosine * wanted) / (other * wanted) * rows[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        total += own
    return total, targets


def pcd(rows, tau=0.02):
    """Of a first step, whose averages are its own squares."""
    lengths, unit = units(rows)
    if not lengths[0]:
        return np.zeros(rows.shape[1])
    kept = lengths[1:] > 0
    second, own = unit[1:][kept], (lengths / np.sqrt(lengths**2 + 1e-8))[1:][kept]
    first = unit[0] * lengths[0] / np.sqrt(lengths[0] ** 2 + 1e-8)
    q = second @ second.T + 1e-6 * np.eye(len(second))
    root = np.linalg.cholesky(q)
    duals = nnls(root.T, np.linalg.solve(root, tau * own - second @ first), maxiter=1000)[0] if len(q) else []
    direction = first + (duals @ second if len(q) else 0)
    size = 1 + np.abs(duals).sum()
    if np.any(second @ direction - tau * own < -1e-4 * size):
        return rows[0]
    length = np.linalg.norm(direction)
    return np.zeros_like(direction) if length < 1e-6 * size else direction * lengths[0] / length
