import copy

import pytest
import timm
import torch
import torch.nn as nn

from distill_hooks import Teacher
from distill_hooks.fold import fold_batchnorm


def trained(name):
    """A model whose BatchNorm modules are not the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.3)
    return model


def count(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize('name,layer', [
    ('regnetx_002', 's2'), ('resnet18', 'layer2'), ('efficientnet_lite0', 'blocks.2')])
def test_logits_and_features_stay(name, layer):
    """Against the same model with its BatchNorm, in the teacher that train.py builds."""
    model = trained(name)
    plain, folded = (Teacher(copy.deepcopy(model), [layer], in_chans=1, mean=[0.4], std=[0.3]) for _ in range(2))
    number = folded.fold_batchnorm((1, 64, 64))
    assert number == count(plain.model) > 0 and count(folded.model) == 0
    x = torch.randn(2, 1, 64, 64)
    for a, b in zip(plain(x)[1] + [plain(x)[0]], folded(x)[1] + [folded(x)[0]]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_tf32_is_off_while_outputs_are_compared(monkeypatch):
    """On CUDA, convolutions and matrix products would round their inputs to 10 bits of significand."""
    def rounds(call, is_allowed):
        def rounded(x, weight, *args):
            if is_allowed():
                x, weight = (((t.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32) for t in (x, weight))
            return call(x, weight, *args)
        return rounded

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(nn.functional, 'conv2d', rounds(nn.functional.conv2d, lambda: cudnn.allow_tf32))
    monkeypatch.setattr(nn.functional, 'linear', rounds(nn.functional.linear, lambda: matmul.allow_tf32))
    model, x = trained('resnet18'), torch.randn(1, 3, 64, 64)
    number, seen = count(model), []

    def run():
        seen.append(matmul.allow_tf32)
        return [model(x)]

    matmul.allow_tf32 = True
    try:
        assert fold_batchnorm(model, run) == number > 0
        assert cudnn.allow_tf32 and matmul.allow_tf32 and seen == [False, False]
    finally:
        matmul.allow_tf32 = False


def test_a_convolution_that_is_used_twice_is_left_alone():
    """Its output is the input of a BatchNorm and of a shortcut."""
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            nn.init.uniform_(self.bn.running_var, 2., 3.)

        def forward(self, x):
            x = self.conv(x)
            return x + self.bn(x).relu()

    model = PreActivation().eval()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 8, 8)
    assert fold_batchnorm(model, lambda: [model(x)]) == 0
    assert count(model) == 1 and all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_is_read_keeps_its_output():
    model = trained('resnet18')
    teacher = Teacher(copy.deepcopy(model), ['layer1.0.bn1', 'layer2.0.conv1'])
    assert teacher.fold_batchnorm((3, 32, 32)) == count(model) - 2
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(Teacher(model, teacher.layers)(x)[1], teacher(x)[1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_features_that_would_change_keep_the_batchnorm():
    """The layer's output is that of a convolution inside it; the BatchNorm stands outside."""
    class Model(nn.Module):
        num_classes = 2

        def __init__(self):
            super().__init__()
            self.layer, self.bn, self.head = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Linear(4, 2)
            nn.init.uniform_(self.bn.running_var, 2., 3.)

        def forward(self, x):
            return self.head(self.bn(self.layer(x)).relu().mean((2, 3)))

    teacher = Teacher(Model(), ['layer'])
    x = torch.randn(1, 3, 8, 8)
    before = teacher(x)[1][0]
    assert teacher.fold_batchnorm((3, 8, 8)) == 0 and teacher(x)[1][0].equal(before)


@pytest.mark.parametrize('change', [
    lambda model: nn.utils.parametrizations.weight_norm(model.conv1),
    lambda model: setattr(model, 'bn1', nn.BatchNorm2d(64, track_running_stats=False)),
], ids=['parametrised', 'without statistics'])
def test_what_cannot_be_folded_is_left(change):
    model = trained('resnet18')
    change(model)
    teacher = Teacher(model.eval())
    assert teacher.fold_batchnorm((3, 32, 32)) == 19  # of 20
