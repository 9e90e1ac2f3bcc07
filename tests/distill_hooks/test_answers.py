import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill_hooks.answers import agreement, count_answers, find_order


def draw(rng, chances, counts, order=None):
    """Random answers of a teacher: (2, C, C) for `chances` (C, C) and images per label in two random halves."""
    halves = [rng.binomial(counts, 0.5)]
    halves.append(counts - halves[0])
    answers = np.stack([[rng.multinomial(n, p) for n, p in zip(half, chances)] for half in halves])
    return answers if order is None else answers[:, :, order]


def teacher(rng, num_classes, accuracy, kind):
    """Chances of each answer (C, C): errors go to any class, to one or two similar ones, or do not ask the image."""
    labels = np.arange(num_classes)
    errors = np.full((num_classes, num_classes), 1 / num_classes)
    if kind == 'similar':
        errors = 0.1 * errors
        errors[labels, np.minimum(labels ^ 1, num_classes - 1)] += 0.9
    elif kind == 'few':
        errors = rng.dirichlet(np.full(num_classes, 0.1), size=num_classes)
    elif kind == 'same':
        errors = np.tile(rng.dirichlet(np.full(num_classes, 0.1)), (num_classes, 1))
    return accuracy * np.eye(num_classes) + (1 - accuracy) * errors


@pytest.mark.parametrize('num_classes', [2, 3, 10, 100])
def test_a_weak_teacher_in_the_right_order_is_left_alone(num_classes):
    """Of 40 % accuracy, confused between similar classes; few images and many, as many of each class or not."""
    for seed in range(12 if num_classes < 100 else 2):
        rng = np.random.default_rng(seed)
        for images in (1, 2, 3, 5, 20, 200):
            spread = rng.lognormal(0, seed % 2, num_classes)
            counts = np.maximum(1, (images * spread).astype(int))
            for kind, accuracy in (('any', 0.4), ('similar', 0.4), ('few', 0.4), ('any', 0.1), ('same', 0.)):
                chances = teacher(rng, num_classes, accuracy, kind)
                assert find_order(draw(rng, chances, counts)) is None, (seed, images, kind, accuracy)


@pytest.mark.parametrize('num_classes,images,accuracy', [
    (2, 16, 0.9), (3, 8, 0.95), (10, 8, 0.9), (10, 20, 0.7), (100, 6, 0.9), (100, 20, 0.7)])
def test_another_order_is_found(num_classes, images, accuracy):
    """All classes moved, from few images; and two of them, from a few more."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        chances = teacher(rng, num_classes, accuracy, 'similar' if seed % 2 else 'any')
        order = np.roll(rng.permutation(num_classes), 1) if num_classes > 3 else np.roll(np.arange(num_classes), 1)
        found = find_order(draw(rng, chances, np.full(num_classes, images), order))
        assert found is not None and (order[found.answers] == np.arange(num_classes)).mean() >= 0.9
        order = np.arange(num_classes)
        order[[0, -1]] = order[[-1, 0]]  # not the two that are alike: those are told apart by good teachers alone
        assert (find_order(draw(rng, chances, np.full(num_classes, 60), order)).answers == order).all()


def test_counts_and_agreement_are_those_by_hand():
    """Every other image of a label is in the second half; the label of a mixed image is its larger share."""
    torch.manual_seed(0)
    seen = [0] * 4
    counts, expected = torch.zeros(2, 4, 4, dtype=torch.long), np.zeros((2, 4, 4), dtype=int)
    for _ in range(5):
        logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
        answers = [row.index(max(row)) for row in logits.tolist()]
        for label, answer in zip(labels.tolist(), answers):
            expected[seen[label] % 2, label, answer] += 1
            seen[label] += 1
        count_answers(counts, logits, labels)
        mixed = 0.6 * F.one_hot(labels, 4) + 0.4 * F.one_hot((labels + 1) % 4, 4)
        for target in (labels, mixed):
            share = sum(a == b for a, b in zip(answers, labels.tolist())) / 7
            assert agreement(logits, target).item() == pytest.approx(share)
    assert (counts.numpy() == expected).all()


def test_counting_waits_for_nothing():
    """Tensors without data show any attempt to read them."""
    logits, labels = torch.randn(4, 3, device='meta'), torch.zeros(4, dtype=torch.long, device='meta')
    counts = torch.zeros(2, 3, 3, dtype=torch.long, device='meta')
    count_answers(counts, logits, labels)
    for target in (labels, torch.rand(4, 3, device='meta')):
        assert agreement(logits, target).is_meta


def test_the_agreement_in_both_orders_is_told():
    labels = torch.arange(3).repeat(10)
    counts = torch.zeros(2, 3, 3, dtype=torch.long)
    count_answers(counts, F.one_hot((labels + 1) % 3, 3).float(), labels)
    order = find_order(counts.numpy())
    assert order.answers == [1, 2, 0] and order.moved == [0, 1, 2]
    assert (order.agreement, order.agreement_now) == (1., 0.)
