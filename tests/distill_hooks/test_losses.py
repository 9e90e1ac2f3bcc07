import math

import pytest
import torch

from distill_hooks import dearkd_loss, hard_label_loss, hidden_loss, soft_label_loss


def test_hidden_loss_is_equation_4():
    aligned, feature_map = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = sum(
        (float(a) - float(f)) ** 2 for a, f in zip(aligned.flatten(), feature_map.flatten())) / feature_map.numel()
    assert hidden_loss(aligned, feature_map).item() == pytest.approx(expected, rel=1e-5)
    std = torch.tensor([1., 2., 4.])
    scaled = torch.stack([feature_map[:, c] / float(std[c]) for c in range(3)], dim=1)
    torch.testing.assert_close(hidden_loss(aligned, feature_map, std), hidden_loss(aligned, scaled))


def test_hard_label_loss_is_equation_5():
    logits, teacher = torch.randn(4, 6), torch.randn(4, 6)
    expected = 0.
    for row, decision in zip(logits.double(), teacher):
        label = max(range(6), key=lambda c: float(decision[c]))
        expected -= math.log(math.exp(row[label]) / sum(math.exp(value) for value in row)) / 4
    assert hard_label_loss(logits, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert hard_label_loss(logits, 3 * teacher + 5).item() == pytest.approx(expected, rel=1e-5)


def test_soft_label_loss_is_a_divergence():
    """Of the softened probabilities, with loops. Its gradient is the one of the logits' difference for a high T."""
    logits, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    expected = 0.
    for row, answer in zip(logits.tolist(), teacher.tolist()):
        q, p = ([math.exp(z / 4.) / sum(math.exp(v / 4.) for v in values) for z in values] for values in (row, answer))
        expected += 16. * sum(a * math.log(a / b) for a, b in zip(p, q)) / 4
    assert soft_label_loss(logits, teacher, 4.).item() == pytest.approx(expected, rel=1e-4)
    assert soft_label_loss(teacher, teacher + 3., 4.).item() == pytest.approx(0., abs=1e-5)
    gradient, = torch.autograd.grad(soft_label_loss(logits, teacher, 1e3), logits)
    difference = (logits - teacher).detach()
    torch.testing.assert_close(gradient, (difference - difference.mean(1, keepdim=True)) / 24, rtol=0.05, atol=1e-3)


def test_total_is_equation_6():
    loss = dearkd_loss(torch.tensor(2.), torch.tensor(3.), torch.tensor(5.), alpha=0.25, beta=0.5)
    assert loss.item() == 0.25 * 2 + 0.75 * 3 + 0.5 * 5


def test_hard_labels_may_be_known():
    logits, teacher = torch.randn(5, 3), torch.randn(5, 3)
    assert hard_label_loss(logits, teacher.argmax(1)).equal(hard_label_loss(logits, teacher))
