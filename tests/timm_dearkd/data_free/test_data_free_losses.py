"""Each loss against its equation written out in float64, and its gradient against finite differences."""
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

from timm_dearkd.data_free import losses
from timm_dearkd.data_free.losses import (
    BatchNormStats,
    competition_loss,
    easiest_positive_loss,
    intra_divergence_loss,
    l2_prior,
    total_variation,
    triplet_loss,
)

TARGETS = torch.tensor([0, 0, 0, 1, 1, 2])  # the last one is alone


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_gradient(function, x, eps=1e-4):
    """Central differences in a few directions, in the precision that the function has."""
    x = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(function(x), x)
    for seed in range(3):
        direction = numbers(*x.shape, seed=100 + seed).to(x)
        with torch.no_grad():
            slope = (function(x + eps * direction) - function(x - eps * direction)) / (2 * eps)
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-6)


def test_total_variation():
    x = numbers(2, 3, 5, 4)
    norms = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        total = 0.
        for b, c, i, j in np.ndindex(*x.shape):
            if i + dy < 5 and 0 <= j + dx < 4:
                total += (x[b, c, i + dy, j + dx] - x[b, c, i, j]).item() ** 2
        norms.append(math.sqrt(total))
    assert total_variation(x).item() == pytest.approx(sum(norms), rel=1e-12)
    assert_gradient(total_variation, x)


def test_l2_prior():
    x = numbers(3, 2, 4, 4)
    assert l2_prior(x).item() == pytest.approx(np.mean([np.linalg.norm(image) for image in x.numpy()]), rel=1e-12)
    assert_gradient(l2_prior, x)


def slow_terms(features, targets, margin):
    """Eq. 11 and 12 per anchor, with loops."""
    features, targets = features.double().numpy(), targets.tolist()
    easiest, triplets = [], []
    for a in range(len(targets)):
        def distance(i, a=a):
            return np.sqrt(((features[a] - features[i]) ** 2).sum())
        positives = [distance(i) for i in range(len(targets)) if i != a and targets[i] == targets[a]]
        negatives = [distance(i) for i in range(len(targets)) if targets[i] != targets[a]]
        if positives:
            easiest.append(-min(positives))
        if positives and negatives:
            triplets.append(max(0., max(positives) - min(negatives) + margin))
    return np.mean(easiest) if easiest else 0., np.mean(triplets) if triplets else 0.


@pytest.mark.parametrize('targets', [TARGETS, torch.zeros(6).long(), torch.arange(6)], ids=['mixed', 'one', 'apart'])
@pytest.mark.parametrize('margin', [0., 1., 5.])
def test_diversity(targets, margin):
    features = numbers(6, 7)
    ep, triplet = slow_terms(features, targets, margin)
    assert easiest_positive_loss(features, targets).item() == pytest.approx(ep, rel=1e-5)
    assert triplet_loss(features, targets, margin).item() == pytest.approx(triplet, rel=1e-5)
    total = intra_divergence_loss(features, targets, 50., 0.5, margin)
    assert total.item() == pytest.approx(50 * ep + 0.5 * triplet, rel=1e-5)


def test_gradients_of_diversity(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)  # it computes in float32 at the least
    for function in (easiest_positive_loss, triplet_loss, intra_divergence_loss):
        assert_gradient(lambda x, function=function: function(x, TARGETS), numbers(6, 7))
    twins = numbers(6, 7)
    twins[1] = twins[0]
    twins.requires_grad_()
    intra_divergence_loss(twins, TARGETS).backward()
    assert twins.grad.isfinite().all()


def test_competition():
    teacher, student = 3 * numbers(4, 5), 3 * numbers(4, 5, seed=1)
    p, q = (np.exp(z / 3.) / np.exp(z / 3.).sum(1, keepdims=True) for z in (teacher.numpy(), student.numpy()))
    m = (p + q) / 2
    js = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2
    assert competition_loss(teacher, student).item() == pytest.approx(1 - js.mean(), rel=1e-5)
    assert competition_loss(teacher, teacher).item() == pytest.approx(1., rel=1e-6)
    far = torch.tensor([[1e4, 0.], [0., 1e4]])
    assert competition_loss(far, far.flip(1)).item() == pytest.approx(1 - math.log(2), rel=1e-6)


def test_gradient_of_the_competition():
    """Against finite differences."""
    teacher, student = numbers(3, 4).float(), numbers(3, 4, seed=1).float().requires_grad_()
    gradient, = torch.autograd.grad(competition_loss(teacher, student), student)
    for index in np.ndindex(3, 4):
        step = torch.zeros(3, 4)
        step[index] = 0.05
        difference = competition_loss(teacher, student + step) - competition_loss(teacher, student - step)
        assert gradient[index].item() == pytest.approx(difference.item() / 0.1, abs=2e-5)


def _rows(x):
    """(B, C, ...) as (values, C)."""
    return x.double().transpose(0, 1).flatten(1).T


class Net(nn.Module):
    """BatchNorm with statistics of its own after two convolutions, with a shortcut between them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        for i, bn in enumerate((self.bn1, self.bn2)):
            bn.running_mean.copy_(numbers(4, seed=i))
            bn.running_var.copy_(numbers(4, seed=i + 5).abs() + 0.5)
        self.eval().requires_grad_(False)

    def forward(self, x, taps=None):
        a = self.conv1(x)
        b = torch.relu(self.bn1(a))
        c = self.conv2(b) + b
        if taps is not None:
            taps += [a, c]
        return self.bn2(c).mean((2, 3))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('relative', [False, True])
def test_batch_norm_statistics(relative, channels_last):
    net, x = Net(), numbers(3, 3, 9, 8)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    net = net.double()
    taps = []
    net(x, taps)
    expected = 0.
    for tap, bn, weight in zip(taps, (net.bn1, net.bn2), (3., 1.)):
        tap = tap.transpose(0, 1).flatten(1).numpy()
        mean, var = bn.running_mean.numpy(), bn.running_var.numpy()
        scales = (np.sqrt(var + bn.eps), var + bn.eps) if relative else (1., 1.)
        expected += weight * np.linalg.norm((tap.mean(1) - mean) / scales[0])
        expected += weight * np.linalg.norm((tap.var(1) - var) / scales[1])
    with BatchNormStats(net, relative=relative, first_weight=3.) as stats:
        logits = net(x)
        assert stats.loss().item() == pytest.approx(expected, rel=1e-5)
        assert logits.equal(net(x)) and stats.loss() > 0


def test_averaged_statistics_do_not_depend_on_widths():
    """Root mean squares over channels, and a mean over layers by their weights, with loops."""
    net, x = Net().double(), numbers(3, 3, 9, 8)
    taps = []
    net(x, taps)
    terms = []
    for tap, bn in zip(taps, (net.bn1, net.bn2)):
        means, variances = [], []
        for channel, values in enumerate(tap.transpose(0, 1).flatten(1)):
            mean, var = bn.running_mean[channel].item(), bn.running_var[channel].item() + bn.eps
            means.append(((values.mean().item() - mean) / math.sqrt(var)) ** 2)
            variances.append(((values.var(correction=0).item() - bn.running_var[channel].item()) / var) ** 2)
        terms.append(math.sqrt(np.mean(means)) + math.sqrt(np.mean(variances)))
    for first, expected in ((1., np.mean(terms)), (3., (3 * terms[0] + terms[1]) / 4)):
        with BatchNormStats(net, relative=True, first_weight=first, averaged=True) as stats:
            net(x)
            assert stats.loss().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('devices', [('cpu',), ()], ids=['kernels', 'no kernels'])
def test_gradient_of_batch_norm_statistics(devices, monkeypatch):
    """With the loss of the logits at the same time, against autograd through the plain definition."""
    monkeypatch.setattr(losses, 'KERNEL_DEVICES', devices)
    net, x = Net().double(), numbers(3, 3, 9, 8)

    def plain(x):
        taps = []
        logits = net(x, taps)
        loss = logits.square().sum()
        for tap, bn in zip(taps, (net.bn1, net.bn2)):
            loss = loss + (tap.mean((0, 2, 3)) - bn.running_mean).norm()
            loss = loss + (tap.var((0, 2, 3), correction=0) - bn.running_var).norm()
        return loss

    x.requires_grad_()
    total = plain(x)
    expected, = torch.autograd.grad(total, x)
    with BatchNormStats(net) as stats:
        logits = net(x)
        loss = logits.square().sum() + stats.loss()
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        actual, = torch.autograd.grad(loss, x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_batch_norm_statistics_of_half_precision_are_not_rounded():
    """They are those of the rounded maps, in float64."""
    bn = nn.BatchNorm2d(4).eval()
    x = (3 + torch.randn(8, 4, 9, 9)).bfloat16().requires_grad_()
    taken = x.detach().double().transpose(0, 1).flatten(1)
    expected = taken.mean(1).norm() + (taken.var(1, correction=0) - 1).norm()
    with BatchNormStats(bn) as stats:
        bn(x)
        assert stats.loss().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('name', [
    'resnet18', 'efficientnet_lite0', 'densenet121',
    'repvgg_a0',  # runs its layers in another order than it lists them in
    'repvit_m0_9',  # BatchNorm1d in its head
])
def test_every_batch_norm_of_a_timm_cnn(name):
    model = timm.create_model(name, num_classes=3).eval().requires_grad_(False)
    inputs = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for layer in layers.values():  # statistics that differ between layers
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    handles = [m.register_forward_pre_hook(lambda m, args, n=n: inputs.update({n: args[0]})) for n, m in layers.items()]
    x = torch.randn(3, 3, 64, 64)
    before = model(x)
    for handle in handles:
        handle.remove()
    expected = sum(
        (_rows(inputs[n]).mean(0) - m.running_mean).norm()
        + (_rows(inputs[n]).var(0, correction=0) - m.running_var).norm() for n, m in layers.items())
    with BatchNormStats(model) as stats:
        assert model(x).equal(before)
        assert stats.loss().item() == pytest.approx(expected.item(), rel=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model(x).equal(before)


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match='has no BatchNorm layers'):
        BatchNormStats(timm.create_model('test_vit'))
