import math

import pytest
import torch

from distill_hooks import dearkd_loss, hard_label_loss, hidden_loss


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


def test_total_is_equation_6():
    loss = dearkd_loss(torch.tensor(2.), torch.tensor(3.), torch.tensor(5.), alpha=0.25, beta=0.5)
    assert loss.item() == 0.25 * 2 + 0.75 * 3 + 0.5 * 5


def test_hard_labels_may_be_known():
    logits, teacher = torch.randn(5, 3), torch.randn(5, 3)
    assert hard_label_loss(logits, teacher.argmax(1)).equal(hard_label_loss(logits, teacher))
