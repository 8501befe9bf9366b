"""The examples' data and model: scikit-learn's digits (real 8 x 8 images) and a small network in plain NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """Images as rows of 64 values in [0, 1], float32, and the digit that each one shows."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Network(NamedTuple):
    """64 inputs, 64 hidden units with ReLU, 10 classes. Weights of shape (out, in), as in torch."""

    weight1: np.ndarray
    bias1: np.ndarray
    weight2: np.ndarray
    bias2: np.ndarray

    def logits(self, images: np.ndarray) -> np.ndarray:
        hidden = np.maximum(images @ self.weight1.T + self.bias1, 0)
        return hidden @ self.weight2.T + self.bias2


def load() -> Digits:
    """The 1797 images, three quarters to train with, shuffled the same way each time. Nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("The digits come with scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1347], order[1347:]
    return Digits(images[train], labels[train], images[test], labels[test])


def train(digits: Digits, epochs: int = 60, batch: int = 32, rate: float = 0.1, momentum: float = 0.9) -> Network:
    """Stochastic gradient descent on the cross entropy, a tenth of a second of it."""
    rng = np.random.default_rng(1)
    shapes = [(64, 64), (64,), (10, 64), (10,)]
    parameters = [rng.normal(0, 0.18, s).astype(np.float32) if len(s) == 2 else np.zeros(s, np.float32) for s in shapes]
    steps = [np.zeros_like(p) for p in parameters]
    one_hot = np.eye(10, dtype=np.float32)
    for _ in range(epochs):
        order = rng.permutation(len(digits.train_labels))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            images, truth = digits.train_images[rows], one_hot[digits.train_labels[rows]]
            weight1, bias1, weight2, bias2 = parameters
            hidden = np.maximum(images @ weight1.T + bias1, 0)
            logits = hidden @ weight2.T + bias2
            likely = np.exp(logits - logits.max(1, keepdims=True))
            error = (likely / likely.sum(1, keepdims=True) - truth) / len(rows)
            hidden_error = (error @ weight2) * (hidden > 0)
            gradients = (hidden_error.T @ images, hidden_error.sum(0), error.T @ hidden, error.sum(0))
            steps = [momentum * step - rate * gradient for step, gradient in zip(steps, gradients, strict=True)]
            parameters = [p + step for p, step in zip(parameters, steps, strict=True)]
    return Network(*parameters)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the rows whose largest logit is the label's."""
    return float((np.asarray(logits).argmax(1) == labels).mean())
