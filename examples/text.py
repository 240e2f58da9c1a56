"""English prose that stands on every Python installation, and a bigram table of it."""

from __future__ import annotations

import pydoc_data.topics

import numpy as np


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """The language reference as bytes (uint8): what to learn, and every tenth topic, held out."""
    topics = [body.encode() for _, body in sorted(pydoc_data.topics.topics.items())]
    held_out = b"\n\n".join(topics[::10])
    text = b"\n\n".join(body for i, body in enumerate(topics) if i % 10)
    return np.frombuffer(text, np.uint8), np.frombuffer(held_out, np.uint8)


def bigram_table(text: np.ndarray) -> np.ndarray:
    """Log-probabilities [256, 256] of the next byte given this one, with add-0.1 smoothing."""
    counts = np.full((256, 256), 0.1)
    np.add.at(counts, (text[:-1], text[1:]), 1)
    return np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)


def bits_per_byte_of_table(held_out: np.ndarray, text: np.ndarray) -> float:
    """What the table alone reaches on the held-out text."""
    return float(-bigram_table(text)[held_out[:-1], held_out[1:]].mean() / np.log(2))
