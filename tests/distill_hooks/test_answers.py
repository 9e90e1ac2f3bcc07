import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill_hooks import AnswerCounter
from distill_hooks.answers import find_order


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
        assert found is not None and (order[found] == np.arange(num_classes)).mean() >= 0.9
        order = np.arange(num_classes)
        order[[0, -1]] = order[[-1, 0]]  # not the two that are alike: those are told apart by good teachers alone
        assert (find_order(draw(rng, chances, np.full(num_classes, 60), order)) == order).all()


def test_counts_are_those_by_hand():
    torch.manual_seed(0)
    counter, expected = AnswerCounter(4), np.zeros((4, 4), dtype=int)
    for i in range(5):
        logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
        target = labels
        if i > 2:  # Mixup; then images of which no label is far ahead are not counted
            share = 0.9 if i == 3 else 0.6
            target = share * F.one_hot(labels, 4) + (1 - share) * F.one_hot((labels + 1) % 4, 4)
        agreement = counter.update(logits, target)
        answers = [row.index(max(row)) for row in logits.tolist()]
        assert agreement.item() == pytest.approx(sum(a == b for a, b in zip(answers, labels.tolist())) / 7)
        for label, answer in zip(labels.tolist(), answers) if i < 4 else ():
            expected[label, answer] += 1
    counts = counter.read()
    assert (counts.sum(axis=0) == expected).all() and abs(int(counts[0].sum()) - int(counts[1].sum())) <= 4
    again = AnswerCounter(4)
    again.load_state_dict(counter.state_dict(), torch.device('cpu'))
    for c in (counter, again):
        c.update(torch.eye(4), torch.tensor([0, 0, 1, 2]))
    assert (again.read().sum(axis=0) == counter.read().sum(axis=0)).all() and again.read().sum() == expected.sum() + 4
    other = AnswerCounter(4)  # of another process
    other.load_state_dict(counter.state_dict(), torch.device('cpu'), is_primary=False)
    assert other.read().sum() == 0
    counter.stop()
    counter.update(torch.eye(4), torch.arange(4))
    assert counter.read() is None and counter.state_dict() == dict(counts=None)


@pytest.mark.parametrize('soft', [False, True])
def test_counting_waits_for_nothing(soft):
    """Tensors without data show any attempt to read them."""
    counter = AnswerCounter(3)
    target = torch.rand(4, 3, device='meta') if soft else torch.zeros(4, dtype=torch.long, device='meta')
    assert counter.update(torch.randn(4, 3, device='meta'), target).is_meta
    assert counter.counts.is_meta and counter.counts.shape == (18,)


def test_what_is_not_counted():
    for counter, size in ((AnswerCounter(2001), 2001), (AnswerCounter(5), 7), (AnswerCounter(1), 1)):
        assert counter.update(torch.randn(3, size), torch.zeros(3, dtype=torch.long)).shape == ()
        assert counter.read() is None


def test_the_order_is_told_in_classes_of_the_teacher():
    """The map that the teacher has already is part of it."""
    counter = AnswerCounter(3, class_map=torch.tensor([5, 0, 9]))
    labels = torch.arange(3).repeat(10)
    counter.update(F.one_hot((labels + 1) % 3, 3).float(), labels)
    order = counter.class_order(counter.read())
    assert order.moved == [0, 1, 2] and order.teacher_classes == [0, 9, 5]
    assert (order.agreement, order.agreement_now) == (1., 0.)
