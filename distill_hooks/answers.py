"""Compare the order of a teacher's classes with that of the student's."""
from typing import List, NamedTuple, Optional

import numpy as np
import torch

MAX_CLASSES = 2000  # their counts take 64 MB
# Our choices. A weak teacher that confuses similar classes gives the wrong answer up to twice as often as the right
# one. A teacher in another order almost never gives the right one.
WEAK_RATIO, MIN_RATIO = 2., 3.
MIN_SHARE = 1 / 3
MAX_P_VALUE = 0.01


class ClassOrder(NamedTuple):
    """An order of classes that explains a teacher's answers much better."""
    answers: List[int]  # the teacher's answer for each label
    agreement: float  # share of images with the right answer in this order
    agreement_now: float  # share of images with the right answer in the present order

    @property
    def moved(self) -> List[int]:
        """The labels whose answer is another class."""
        return [label for label, answer in enumerate(self.answers) if answer != label]


def agreement(answers: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the share of images whose label is the teacher's answer, on the device.

    Args:
        answers: The teacher's logits (B, classes), or its labels (B,).
        target: Class indices (B,), or soft labels (B, classes), of which the largest counts.
    """
    labels = target if target.ndim == 1 else target.argmax(dim=1)
    answers = answers if answers.ndim == 1 else answers.argmax(dim=1)
    return (answers == labels).float().mean()


def count_answers(counts: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Count the answers to a batch, without waiting for the device.

    Every other image of a label goes into the second half of the counts, so that `find_order` can find an order in one
    half and test it on the other.

    Args:
        counts: Number of images by half, label and answer (2, classes, classes). Changed in place.
        logits: The teacher's logits (B, classes).
        labels: Class indices (B,).
    """
    earlier = (labels.unsqueeze(1) == labels).long().tril(-1).sum(dim=1)  # images of the same label in this batch
    halves = (counts.sum(dim=(0, 2))[labels] + earlier) % 2
    places = (halves * counts.shape[1] + labels) * counts.shape[2] + logits.argmax(dim=1)
    counts.view(-1).index_add_(0, places, torch.ones_like(places))  # bincount would wait for the device


def _best_order(counts: np.ndarray) -> np.ndarray:
    """Assign one answer to each label, so that most images are explained.

    Ties keep the label itself. All labels have the same weight, except those with very few images, which have less.
    """
    from scipy.optimize import linear_sum_assignment  # the import takes 0.5 s, and one call per run needs it
    shares = counts / (counts.sum(axis=1, keepdims=True) + 2.)
    return linear_sum_assignment(shares + 1e-6 * np.eye(len(counts)), maximize=True)[1]


def _cycles(order: np.ndarray) -> List[List[int]]:
    """Return the cycles of a permutation that are longer than 1."""
    cycles, seen = [], set()
    for start in range(len(order)):
        cycle, label = [], start
        while label not in seen:
            seen.add(label)
            cycle.append(label)
            label = int(order[label])
        if len(cycle) > 1:
            cycles.append(cycle)
    return cycles


def find_order(counts: np.ndarray) -> Optional[ClassOrder]:
    """Find an order of classes that explains a teacher's answers much better.

    An order found in one half of the images is tested on the other half, as a whole and cycle by cycle of its
    permutation. It is accepted if its answers are `MIN_RATIO` times as frequent as the labels themselves, and if a
    binomial test rejects chance.

    Args:
        counts: Number of images by half, label and answer (2, C, C).

    Returns:
        The order, or None if no order is much better than the present one.
    """
    from scipy.special import bdtrc  # scipy.stats.binomtest is the same, but takes 3 s to import
    labels = np.arange(counts.shape[1])
    order = _best_order(counts.sum(axis=0))
    tables = []  # (C, 5): hits of the found answer and of the label, the share of each, and 1 if they differ
    for fit, judge in (counts, counts[::-1]):
        found = _best_order(fit)
        hits = np.stack([judge[labels, found], judge[labels, labels]], axis=1)
        # a label without images keeps its place
        shares = (hits + [0., 0.25]) / (judge.sum(axis=1) + 0.25)[:, None]
        tables.append(np.concatenate([hits, shares, np.ones((len(labels), 1))], axis=1) * (found != labels)[:, None])
    table = tables[0] + tables[1]
    result = labels.copy()
    cycles = _cycles(order)
    for group in (sum(cycles, []), *cycles):  # all together too: a single cycle may have few images
        hits, label_hits, share, label_share, moved = table[group].sum(axis=0)
        is_better = (
            hits >= max(MIN_RATIO * label_hits, 1) and share >= max(MIN_RATIO * label_share, MIN_SHARE * moved))
        if is_better:
            # the probability of so many hits or more
            p_value = bdtrc(int(hits) - 1, int(hits + label_hits), WEAK_RATIO / (WEAK_RATIO + 1))
            if p_value < MAX_P_VALUE / len(labels):
                result[group] = order[group]
    if (result == labels).all():
        return None
    total = counts.sum(axis=0)
    return ClassOrder(
        result.tolist(), float(total[labels, result].sum() / total.sum()),
        float(total[labels, labels].sum() / total.sum()))
