"""A teacher's answers per class, and whether its classes are in another order than the student's."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist

__all__ = ['AnswerCounter', 'ClassOrder', 'find_order']

MAX_CLASSES = 2000  # whose counts take 64 MB; teachers of more are not looked at
# A mixed image counts if its larger share is ahead by this much
MIN_MARGIN = 0.4
# Our choice. A weak teacher that confuses similar classes gives the wrong answer up to twice as often as the right one;
# a teacher in another order hardly ever gives the right one.
WEAK_RATIO, MIN_RATIO = 2., 3.
MIN_SHARE = 1 / 3
MAX_P_VALUE = 0.01


class ClassOrder(NamedTuple):
    """An order of classes that explains a teacher's answers."""
    moved: List[int]  # the student's classes that another class of the teacher's fits better
    teacher_classes: List[int]  # the class of the teacher's for each class of the student's
    agreement: float  # share of the counted images whose label the teacher finds in this order
    agreement_now: float  # ... and in the present one


class AnswerCounter:
    """Counts a teacher's answers to the images of each label, on the device and without waiting for it.

    Half of every batch goes into one table of counts and half into another, so that an order that is found in one can
    be checked in the other.

    Args:
        num_classes: Number of labels.
        class_map: Teacher class per label, if the teacher's logits were chosen by such a map.
        class_names: What the labels are called, for messages.
    """

    def __init__(
            self,
            num_classes: int,
            class_map: Optional[torch.Tensor] = None,
            class_names: Sequence[str] = (),
    ) -> None:
        self.num_classes = num_classes
        self.class_map = list(range(num_classes)) if class_map is None else class_map.tolist()
        self.class_names = list(class_names)
        self.is_counting = 2 <= num_classes <= MAX_CLASSES
        self.counts: Optional[torch.Tensor] = None  # (2 * classes * classes): half, label, answer
        self._batches = 0

    @torch.no_grad()
    def update(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Count the answers to a batch.

        Args:
            logits: The teacher's, (B, classes).
            target: Class indices (B,) or soft labels (B, classes), whose largest is the label.

        Returns:
            The share of the images whose label is the answer, as a tensor () on the device.
        """
        answers = logits.argmax(dim=1)
        labels = target if target.ndim == 1 else target.argmax(dim=1)
        if self.is_counting and logits.shape[1] == self.num_classes:
            is_clear = torch.ones_like(labels)
            if target.ndim > 1:
                first, second = target.topk(2, dim=1).values.unbind(1)
                is_clear = (first - second >= MIN_MARGIN).long()
            size = len(labels)
            halves = (torch.arange(size, device=labels.device) * 2 // size + self._batches) % 2
            self._batches += 1
            if self.counts is None:
                self.counts = torch.zeros(2 * self.num_classes ** 2, dtype=torch.long, device=labels.device)
            self.counts = self.counts.to(labels.device)  # the task may have moved
            # bincount would wait for the device
            self.counts.index_add_(0, (halves * self.num_classes + labels) * self.num_classes + answers, is_clear)
        return (answers == labels).float().mean()

    def _total(self) -> Optional[torch.Tensor]:
        if self.counts is None or not (dist.is_available() and dist.is_initialized()):
            return self.counts
        counts = self.counts.clone()
        dist.all_reduce(counts)
        return counts

    def read(self) -> Optional[np.ndarray]:
        """Return the counts (2, classes, classes) by half, label and answer; None if there are none.

        All processes have to call this together.
        """
        counts = self._total()
        return None if counts is None else counts.cpu().numpy().reshape(2, self.num_classes, self.num_classes)

    def stop(self) -> None:
        """Count no more, and free the memory."""
        self.counts, self.is_counting = None, False

    def state_dict(self) -> Dict[str, Any]:
        """Return the counts of all processes, which have to call this together."""
        counts = self._total()
        return dict(counts=None if counts is None else counts.cpu().clone())

    def load_state_dict(self, state: Dict[str, Any], device: torch.device, is_primary: bool = True) -> None:
        """Go on from `state_dict`. One process takes the counts, the others start from 0."""
        counts = state['counts']
        if counts is not None and self.is_counting and len(counts) == 2 * self.num_classes ** 2:
            self.counts = counts.to(device, copy=True) if is_primary else torch.zeros_like(counts, device=device)

    def class_order(self, counts: np.ndarray) -> Optional[ClassOrder]:
        """Find the order of classes that explains the counts much better than the present one; None if none does."""
        order = find_order(counts)
        if order is None:
            return None
        total, classes = counts.sum(axis=0), np.arange(self.num_classes)
        return ClassOrder(
            [int(label) for label in classes[order != classes]],
            [self.class_map[answer] for answer in order],
            float(total[classes, order].sum() / total.sum()),
            float(total[classes, classes].sum() / total.sum()))


def _best_order(counts: np.ndarray) -> np.ndarray:
    """The answer for each label, each given once, that explains most; the label itself where that makes no difference.

    Labels count alike, however many images they have, but for those of very few.
    """
    from scipy.optimize import linear_sum_assignment  # takes half a second to import, and is needed once in a run
    shares = counts / (counts.sum(axis=1, keepdims=True) + 2.)
    return linear_sum_assignment(shares + 1e-6 * np.eye(len(counts)), maximize=True)[1]


def _cycles(order: np.ndarray) -> List[List[int]]:
    """Labels that take each other's places."""
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


def find_order(counts: np.ndarray) -> Optional[np.ndarray]:
    """Find an order of answers that fits the labels much better than the given one.

    An order that is found in one half of the images is judged by the other half, so that chance does not speak for it,
    and so is each cycle of labels that take each other's places. It counts if its answers are `MIN_RATIO`
    times as frequent as the labels themselves, and if chance does not explain that (a binomial test).

    Args:
        counts: (2, C, C), images by half, label and answer.

    Returns:
        The answer that means each label (C,), or None if the given order is as good.
    """
    from scipy.stats import binomtest  # see _best_order
    labels = np.arange(counts.shape[1])
    order = _best_order(counts.sum(axis=0))
    tables = []  # (C, 5): hits of the found answer and of the label, their shares, and whether the label is moved
    for fit, judge in (counts, counts[::-1]):
        found = _best_order(fit)
        hits = np.stack([judge[labels, found], judge[labels, labels]], axis=1)
        # a label without images speaks for itself
        shares = (hits + [0., 0.25]) / (judge.sum(axis=1) + 0.25)[:, None]
        tables.append(np.concatenate([hits, shares, np.ones((len(labels), 1))], axis=1) * (found != labels)[:, None])
    table = tables[0] + tables[1]
    result = labels.copy()
    cycles = _cycles(order)
    for group in (sum(cycles, []), *cycles):  # all together, for each alone may have few images
        hits, label_hits, share, label_share, moved = table[group].sum(axis=0)
        is_better = (
            hits >= max(MIN_RATIO * label_hits, 1) and share >= max(MIN_RATIO * label_share, MIN_SHARE * moved))
        if is_better:
            chance = binomtest(int(hits), int(hits + label_hits), WEAK_RATIO / (WEAK_RATIO + 1), alternative='greater')
            if chance.pvalue < MAX_P_VALUE / len(labels):
                result[group] = order[group]
    return None if (result == labels).all() else result
