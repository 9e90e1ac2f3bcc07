"""timm's distillation tasks with our `Teacher`, against timm's own and against losses by hand."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask

import timm_dearkd  # noqa: F401
from distill_hooks import DearKDTask, FeatureTask, LogitTask, Teacher, TokenTask, TwoStageSchedule

KINDS = {'logit': LogitTask, 'feature': FeatureTask, 'token': TokenTask}
TIMMS = {'logit': LogitDistillationTask, 'feature': FeatureDistillationTask, 'token': TokenDistillationTask}
LOSSES = {'logit': 'kd_loss', 'feature': 'kd_loss', 'token': 'distill_loss'}


def make_student(kind='token', **kwargs):
    torch.manual_seed(0)
    name, size = ('deit_tiny_distilled_patch16_224', dict(depth=1, embed_dim=24, img_size=32)) if kind == 'token' else (
        'test_resnet', {})
    return timm.create_model(name, num_classes=3, **{**size, **kwargs})


def make_teacher(name='test_resnet', num_classes=3, **kwargs):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


def make(kind, student=None, teacher=None, **kwargs):
    given = ('img_size', 'class_map', 'mean', 'std', 'input_size')
    of_teacher = dict(input_size=(3, 32, 32)) | {key: kwargs.pop(key) for key in given if key in kwargs}
    kwargs = dict(criterion=torch.nn.CrossEntropyLoss(), verbose=False) | kwargs
    student = student or make_student(kind)
    if kind == 'dearkd':
        student = timm.create_model('test_dearkd', num_classes=3, img_size=32)
    teacher = Teacher.for_student(student, teacher or make_teacher(), **of_teacher)
    if kind == 'dearkd':
        return DearKDTask(student, teacher, TwoStageSchedule(2), **kwargs)
    torch.manual_seed(2)  # of the projection
    return KINDS[kind](student, teacher, **kwargs)


def batch(in_chans=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, in_chans, 32, 32, generator=generator), torch.arange(6) % 3


@pytest.mark.parametrize('kind,normalisation,compiled', [
    *((kind, normalisation, False) for kind in KINDS for normalisation in ('same', 'other')),
    ('feature', 'same', True)])
def test_losses_and_gradients_are_those_of_timms_task(kind, normalisation, compiled):
    """To the last bit where nothing has to be adapted; in another normalisation, up to rounding."""
    teacher, student = make_teacher('test_convnext'), make_student(kind)
    if normalisation == 'other':
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.5)}
    else:
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, **{k: student.pretrained_cfg[k] for k in ('mean', 'std')}}
    ours = make(kind, copy.deepcopy(student), copy.deepcopy(teacher), task_loss_weight=0.3)
    torch.manual_seed(2)
    theirs = TIMMS[kind](
        student, teacher, criterion=torch.nn.CrossEntropyLoss(), task_loss_weight=0.3, verbose=False)
    grads = []
    for task in (ours, theirs):
        task.train()
        if compiled:
            task.compile(backend='eager')
        result = task(*batch())
        result['loss'].backward()
        grads.append((result, [p.grad for p in task.get_trainable_module().parameters()]))
    (result, gradients), (expected, expected_gradients) = grads
    exact = dict(atol=0, rtol=0) if normalisation == 'same' else dict(atol=1e-5, rtol=1e-4)
    assert set(expected) <= set(result) and expected[LOSSES[kind]] > 0
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, **exact)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, b, **exact)
    assert not any(module.training for module in ours.teacher.modules())
    assert not any(p.requires_grad for p in ours.teacher.parameters())


@pytest.mark.parametrize('case', ['grey student', 'grey', 'classes', 'size', 'all'])
@pytest.mark.parametrize('kind', KINDS)
def test_what_the_teacher_sees_and_says(kind, case):
    """Channels, size and classes, from forwards of the plain models and losses by hand."""
    in_chans = 1 if case in ('grey student', 'grey', 'all') else 3
    class_map = [4, 0, 3] if case in ('classes', 'all') and kind != 'feature' else None
    size = 48 if case in ('size', 'all') else None
    teacher = make_teacher(num_classes=5 if case in ('classes', 'all') else 3, in_chans=1 if case == 'grey' else 3)
    student = make_student(kind, in_chans=in_chans)
    mean, std = [0.4, 0.5, 0.6][:in_chans], [0.3, 0.2, 0.4][:in_chans]
    task = make(
        kind, student, teacher, mean=mean, std=std, img_size=size, class_map=class_map,
        input_size=(in_chans, 32, 32)).train(kind == 'token')  # in eval mode it has one output
    images, labels = batch(in_chans)
    result = task(images, labels)

    x = images * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    own_mean, own_std = (torch.tensor(teacher.pretrained_cfg[key]) for key in ('mean', 'std'))
    if case == 'grey':
        own_mean, own_std = own_mean.mean().view(1), own_std.mean().view(1)
    x = (x - own_mean.view(1, -1, 1, 1)) / own_std.view(1, -1, 1, 1)
    if size:
        x = F.interpolate(x, (size, size), mode='bilinear', antialias=True)
    logits = teacher(x)
    logits = logits if class_map is None else logits[:, class_map]
    if kind == 'feature':
        _, features = task.trainable_module(images)
        expected = F.mse_loss(features, teacher.forward_head(teacher.forward_features(x), pre_logits=True))
    else:
        output = student(images) if kind == 'logit' else student(images)[1]
        expected = (logits.softmax(1) * (logits.log_softmax(1) - output.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(result[LOSSES[kind]], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result['task_loss'], F.cross_entropy(result['output'], labels))


@pytest.mark.parametrize('kind', ['dearkd', *KINDS])
def test_errors_are_found_before_training(kind):
    fixed = make_teacher('swin_tiny_patch4_window7_224', img_size=64, embed_dim=24, num_heads=(1, 2, 4, 8))
    with pytest.raises(ValueError, match=r'SwinTr.* 32x32 pixels \(.*\). --kd-teacher-img-size 64 resizes') as error:
        make(kind, teacher=fixed)
    assert '\n' not in str(error.value)
    make(kind, teacher=fixed, img_size=64)(*batch())
    with pytest.raises(ValueError, match='does not take images of 48x48 pixels.*--kd-teacher-img-size 64 resizes'):
        make(kind, teacher=fixed, img_size=48)
    with pytest.raises(ValueError, match=r'takes 1 channel\(s\), the student 3. Set --in-chans 1'):
        make(kind, teacher=make_teacher(in_chans=1))
    if kind == 'feature':
        make(kind, teacher=make_teacher(num_classes=7))  # its classes do not matter
        plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
        with pytest.raises(ValueError, match='Sequential gives no pooled features.*--kd-distill-type logit'):
            make(kind, teacher=plain)
    else:
        with pytest.raises(ValueError, match='knows 7 classes, the student 3.*--kd-class-map'):
            make(kind, teacher=make_teacher(num_classes=7))
        with pytest.raises(ValueError, match='has 2 entries, the student 3 classes'):
            make(kind, teacher=make_teacher(num_classes=7), class_map=[6, 2])


@pytest.mark.parametrize('kind', KINDS)
def test_a_checkpoint_knows_its_teacher(kind):
    """Restores weights, projection and average. Refuses another teacher or class map. Older files have no teacher."""
    def task(teacher=None, class_map=None):
        made = make(kind, teacher=teacher or make_teacher('test_convnext'), class_map=class_map)
        made.setup_ema(decay=0.5)
        return made

    before, after = task(), task()
    torch.optim.SGD(before.trainable_module.parameters(), lr=0.1).step(lambda: before(*batch())['loss'].backward())
    before.update_ema()
    for ema in (False, True):
        state = before.get_checkpoint_state(ema=ema)
        weights, extra = (state[key + ('_ema' if ema else '')] for key in ('state_dict', 'task_state'))
        after.load_checkpoint_state(weights, extra, ema=ema)
        trained = after.get_trainable_module(ema=ema).state_dict()
        assert all(value.equal(trained[key]) for key, value in
                   before.get_trainable_module(ema=ema).state_dict().items())
    others = [(make_teacher('test_convnext', in_chans=3, ls_init_value=0.5), None), (None, [1, 0, 2])]
    for teacher, class_map in others[:1] if kind == 'feature' else others:
        with pytest.raises(ValueError, match='another teacher, class map or kind.*--kd-class-map'):
            task(teacher, class_map).load_checkpoint_state(weights, extra)
    after.load_checkpoint_state(weights, {k: v for k, v in extra.items() if k != 'teacher'})
    after.load_checkpoint_state(weights, None)
