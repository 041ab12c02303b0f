"""Whether a model draws the digit that it is asked for, and whether it only copies what it has seen.

Judged at the originals' size, 8x8 in 0..16. A support vector machine, trained on the training split, reads the samples;
its accuracy on the test split, which nothing was trained on, says how far it can be trusted. Copies are looked for by
the distance to the nearest training picture, against that of the test split's pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from snapgen.data.digits import NAMES, digit_caption, enlarged, load_digits, reduced
from snapgen.evaluate import draw
from snapgen.metrics.pictures import as_tensor

QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9)
NEAR = 0.01  # a sample nearer to a training picture than this share of the test split's is counted as near


def score_digits(
    pipe: Any,
    *,
    steps: int,
    guidance: float,
    per_digit: int,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw `per_digit` samples of each digit and judge them.

    Returns:
        What :func:`judge` does.

    Raises:
        ValueError: `per_digit` is less than 1, or scikit-learn is not installed.
    """
    if per_digit < 1:
        raise ValueError(f"per_digit: got {per_digit}; must be at least 1")
    asked = [digit for digit in range(10) for _ in range(per_digit)]
    captions = [digit_caption(digit) for digit in asked]
    pictures = draw(pipe, captions, steps=steps, guidance=guidance, seed=seed, console=console)
    return judge(as_tensor(pictures), asked)


def judge(pictures: Tensor, asked: Sequence[int]) -> dict[str, Any]:
    """Scores of pictures [N, 3, R, R] in [-1, 1] of the digits `asked` [N].

    Returns:
        recognised: share of them that the classifier reads as what was asked for; per_digit the same for each digit.
        classifier_accuracy: its share right on the test split, `classifier_tests` pictures.
        distance: quantiles (QUANTILES; the first is the least) of the distance to the nearest training picture, of the
            samples and of the test split's pictures. Samples of a model that copies lie far below.
        near: share of the samples nearer to a training picture than all but 0.01 of the test split are. Guidance draws
            what is typical, and that has near neighbours, so this may be above 0.01 without a copy.
        nearer_to_training: share of the samples whose nearest picture, among the test split and as many of the training
            split, is of the training split (after Meehan et al. 2020, "A non-parametric test to detect data-copying").
            0.5 where samples are no nearer to what was trained on than to other digits; 2/3 where each lies around a
            training picture, however wide (a third of the training split is among them). It sees a leaning long before
            there is a copy. Its standard error is 0.5 / sqrt(N) or more.
    """
    from sklearn.svm import SVC

    wanted = np.asarray(asked)
    samples = reduced(pictures).flatten(1)
    resolution = pictures.shape[-1]
    # Originals are enlarged and reduced as the samples were, so that both are equally soft.
    (train, train_digits), (test, test_digits) = (
        (reduced(enlarged(originals, resolution)).flatten(1), digits)
        for originals, digits in (load_digits("train"), load_digits("test"))
    )
    reader = SVC(gamma="scale", C=10.0).fit(train.numpy(), train_digits)
    right = reader.predict(samples.numpy()) == wanted
    distances = {"samples": nearest(samples, train), "test": nearest(test, train)}
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(test)]
    to_train, to_test = nearest(samples, train[chosen]), nearest(samples, test)
    quantiles = torch.tensor(QUANTILES)
    limit = distances["test"].quantile(NEAR)
    return {
        "recognised": float(right.mean()),
        "per_digit": {NAMES[digit]: float(right[wanted == digit].mean()) for digit in sorted(set(asked))},
        "samples": len(asked),
        "classifier_accuracy": float(reader.score(test.numpy(), test_digits)),
        "classifier_tests": len(test),
        "distance": {name: found.quantile(quantiles).tolist() for name, found in distances.items()},
        "near": float((distances["samples"] < limit).float().mean()),
        "nearer_to_training": float((to_train < to_test).float().mean()),
    }


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """The Euclidean distance of each point [N, D] to the nearest of `others` [M, D]: [N]."""
    # Not by products of matrices: their rounding would hide small distances.
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def print_digits(scores: dict[str, dict[str, Any]], console: Console) -> None:
    """A table with one row for each named set of scores."""
    table = Table(title="Handwritten digits by class prompt")
    for name in ("", "recognised", "weakest digit", "median distance to training", "nearer to training"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in scores.items():
        weakest = min(row["per_digit"], key=row["per_digit"].get)
        own, real = (row["distance"][name][QUANTILES.index(0.5)] for name in ("samples", "test"))
        table.add_row(
            name,
            f"{row['recognised']:.1%}",
            f"{weakest}, {row['per_digit'][weakest]:.0%}",
            f"{own:.1f} (held-out digits {real:.1f})",
            f"{row['nearer_to_training']:.1%}",
        )
    console.print(table)
    some = next(iter(scores.values()))
    console.print(
        f"The classifier reads {some['classifier_accuracy']:.1%} of {some['classifier_tests']} held-out digits right. "
        f"Nearer to training: 50% where nothing leans to it, 67% where each sample lies around a training picture."
    )
