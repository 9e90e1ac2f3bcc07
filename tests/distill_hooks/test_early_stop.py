import copy

import pytest
import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from distill_hooks import DearKDTask, Teacher, TwoStageSchedule

SMALL = {'regnety_002': dict(depth=8), 'densenet121': dict(growth_rate=4, block_config=(1, 1, 1, 1))}


def create(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SMALL.get(name, {})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def count(function):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize('name,stage,fold', [
    ('regnety_002', 2, ''), ('test_resnet', 2, ''), ('test_convnext', 1, ''), ('test_efficientnet', 2, ''),
    ('densenet121', 2, ''), ('regnety_002', 2, 'before'), ('test_resnet', 2, 'after')])
def test_the_stage_of_a_cnn_costs_what_timms_own_early_exit_costs(name, stage, fold):
    """The same maps, bit for bit, and timm's `stop_early` counts the operations; BatchNorm folded at any time."""
    model, x = create(name), torch.randn(2, 3, 64, 64)
    layer = [info['module'] for info in model.feature_info][stage]
    teacher = Teacher(copy.deepcopy(model), [layer])
    if fold == 'after':
        teacher(x, with_logits=False)
    if fold:
        teacher.fold_batchnorm((3, 64, 64))
    logits, (expected,) = teacher(x)
    none, (found,) = teacher(x, with_logits=False)
    assert found.equal(expected) and logits.shape == (2, 5) and none is None
    flops = count(lambda: teacher(x, with_logits=False))
    assert flops == count(lambda: model.forward_intermediates(
        x, indices=[stage], stop_early=True, intermediates_only=True))
    assert flops < count(lambda: teacher(x))
    assert set(teacher.state_dict()) == {f'model.{key}' for key in teacher.model.state_dict()}
    assert teacher(x)[0].equal(logits)  # the whole model is as it was


@pytest.mark.parametrize('layer,stages', [('s3.b2', 3), ('s2.b1.conv2.bn', 2), ('stem', 0)])
def test_a_layer_named_by_hand(layer, stages):
    """Its cost is counted in a sequence of the stages up to the one that it is in."""
    model, x = create('regnety_002'), torch.randn(2, 3, 64, 64)
    teacher = Teacher(copy.deepcopy(model), [layer])
    assert teacher(x, with_logits=False)[1][0].equal(teacher(x)[1][0])
    modules = nn.Sequential(model.stem, *(getattr(model, f's{number}') for number in range(1, stages + 1)))
    assert count(lambda: teacher(x, with_logits=False)) == count(lambda: modules(x))


def test_several_layers_and_other_layers_later():
    teacher, x = Teacher(create('test_resnet'), ['layer3', 'layer1']), torch.randn(2, 3, 32, 32)
    for _ in range(2):
        assert all(map(torch.equal, teacher(x, with_logits=False)[1], teacher(x)[1]))
        teacher.set_layers(['layer4', 'conv1'])  # a later one than before
    assert Teacher(create('test_resnet'))(x, with_logits=False) == (None, [])


class InPlace(nn.Module):
    """Changes the map of `conv` in place, and adds the outputs of two layers."""
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.down = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 4, stride=2), nn.Linear(4, 4)

    def forward(self, x):
        x = self.act(self.conv(x))
        return self.head((x + self.up(self.down(x))[..., :x.shape[2], :x.shape[3]]).mean((2, 3)))


@pytest.mark.parametrize('layer', ['conv', 'down'])
def test_a_model_that_timm_cannot_stop_runs_whole(layer):
    teacher, x = Teacher(InPlace().eval(), [layer]), torch.randn(2, 3, 9, 9)
    assert teacher(x, with_logits=False)[1][0].equal(teacher(x)[1][0])
    assert count(lambda: teacher(x, with_logits=False)) == count(lambda: teacher(x))


def test_alpha_1_needs_no_labels():
    """The task's hidden loss is the same as with labels, and the teacher stops after its layer."""
    def make(alpha):
        torch.manual_seed(0)
        student = timm.create_model('test_vit', num_classes=5, img_size=64)
        return DearKDTask(student, create('test_resnet'), TwoStageSchedule(4, alpha=alpha), hooks='2', verbose=False)

    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    task, other = make(1.), make(0.5)
    result, expected = task(x, labels), other(x, labels)
    assert result['hidden_loss'].equal(expected['hidden_loss']) and result['ce_loss'].equal(expected['ce_loss'])
    assert set(result) == {'loss', 'output', 'ce_loss', 'hidden_loss'} == {*task.log_names, 'output'}
    model = other.teacher.model
    rest = nn.Sequential(model.layer3, model.layer4, model.global_pool, model.fc)
    feature, = other.teacher(x)[1]
    saved = count(lambda: rest(feature)) + count(lambda: other.trainable_module.head_dist(torch.randn(2, 64)))
    assert count(lambda: task(x, labels)) + saved == count(lambda: other(x, labels))


@pytest.mark.slow
def test_the_stopped_teacher_compiles_without_a_graph_break():
    teacher, x = Teacher(create('regnety_002'), ['s2']), torch.randn(2, 3, 64, 64)
    expected = teacher(x)[1][0]
    teacher.compile(backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(teacher(x, with_logits=False)[1][0], expected, atol=1e-5, rtol=1e-5)
