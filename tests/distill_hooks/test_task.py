import copy
import math
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

import timm_dearkd  # noqa: F401
from distill_hooks import DearKDTask, Teacher, TwoStageSchedule
from distill_hooks.task import parse_hook

EPOCHS = dict(stage1=0, anneal=8, last=9)


def make(student='test_dearkd', teacher='test_resnet', schedule=None, student_kwargs=None, class_map=None, **kwargs):
    """A task with 5 classes; `teacher` is a model, a name to create, or a number of classes."""
    torch.manual_seed(0)
    model = timm.create_model(student, num_classes=5, **{'img_size': 32, **(student_kwargs or {})})
    if isinstance(teacher, int):
        teacher = timm.create_model('test_resnet', num_classes=teacher)
    elif isinstance(teacher, str):
        teacher = timm.create_model(teacher, num_classes=5)
    teacher = kwargs.pop('teacher_model', teacher)
    if class_map is not None:
        teacher = Teacher.for_student(model, teacher, class_map=class_map)
    kwargs.setdefault('normalize_features', False)
    return DearKDTask(model, teacher, schedule or TwoStageSchedule(10, 8), **kwargs)


def batch(size=4, in_chans=3):
    return torch.randn(size, in_chans, 32, 32), torch.arange(size) % 5


@pytest.mark.parametrize('epoch', EPOCHS.values())
@pytest.mark.parametrize('student', ['test_dearkd', 'test_vit2'])
def test_losses_are_those_of_the_equations(epoch, student):
    """Every loss from forwards made apart: timm's own features, and the branches by hand. test_vit2 has no [CLS]."""
    hooks = ['2:1', '4:layer2']
    task = make(student, hooks=hooks).eval()
    task.set_epoch(epoch)
    model, trainable, cnn = task.trainable_module.student, task.trainable_module, task.teacher.model
    images, labels = batch()
    result = task(images, labels)

    taken = {}
    for name in ('layer1', 'layer2'):
        getattr(cnn, name).register_forward_hook(lambda m, a, out, name=name: taken.__setitem__(name, out))
    teacher_logits = cnn(task.teacher.prepare_input(images))
    ce = F.cross_entropy(model(images), labels)
    tokens, maps = model.forward_intermediates(images, indices=[1, 3])
    pooled = model.fc_norm(tokens[:, model.num_prefix_tokens:].mean(1))
    logit = F.cross_entropy(trainable.head_dist(pooled), teacher_logits.argmax(-1))
    hidden = sum(
        F.mse_loss(aligner(m, taken[name].shape[-2:]), taken[name])
        for aligner, m, name in zip(trainable.aligners, maps, ('layer1', 'layer2'))) / 2

    expected = {0: 0.5 * ce + 0.5 * logit + 10 * hidden, 8: 0.75 * ce + 0.25 * logit, 9: ce}[epoch]
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['output'], model(images))
    torch.testing.assert_close(result['ce_loss'], ce)
    assert ('hidden_loss' in result) == (epoch == 0) and ('logit_loss' in result) == (epoch < 9)
    assert set(result) - {'output'} <= set(task.log_names)


@pytest.mark.parametrize('stage2', ['anneal', 'ce'])
def test_the_teacher_costs_one_forward_and_no_more(stage2):
    task = make(schedule=TwoStageSchedule(10, 5, stage2))
    calls, features = [], []
    task.teacher.model.register_forward_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    task.teacher.model.layer3.register_forward_hook(  # runs after layer2, which teaches
        lambda *a: features.append(len(task.teacher.capture._features)))
    for epoch in (0, 5, 9):
        task.set_epoch(epoch)
        task(*batch())
        assert not task.teacher.capture._features
    assert features == [1] + [0] * (len(calls) - 1)  # kept while the forward ran, in stage I only
    assert calls == [False] * (1 if stage2 == 'ce' else 2)
    assert task.teacher.capture.enabled == (stage2 == 'ce')  # in 'anneal' the last forward kept none


def test_the_teacher_is_left_alone():
    """No gradient, no BatchNorm update, not in the optimiser, the EMA, the checkpoint or the exported weights."""
    task = make()
    teacher = task.teacher
    before = copy.deepcopy(teacher.state_dict())
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(trainable, 'adamw', lr=1e-2, weight_decay=0.1)
    task.setup_ema(decay=0.5)
    task.train()
    for epoch in (0, 8, 9):
        task.set_epoch(epoch)
        task(*batch())['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    of_teacher = {id(p) for p in teacher.parameters()}
    assert not of_teacher & {id(p) for group in optimizer.param_groups for p in group['params']}
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state) == {'state_dict', 'task_state', 'state_dict_ema', 'task_state_ema'}
    assert set(state['state_dict']) == set(state['state_dict_ema']) == set(trainable.student.state_dict())
    assert set(state['task_state']) == {'aligners', 'head_dist', 'teacher', 'blocks'}
    assert not any('layer1' in k or 'aligner' in k or 'head_dist' in k for k in state['state_dict'])
    assert not any('teacher' in n or 'layer1' in n for n, _ in task.get_trainable_module(ema=True).named_parameters())


def test_branches_take_gradients_only_in_their_stage():
    task = make().train()
    trainable = task.trainable_module
    for epoch, head_dist, aligners in ((0, True, True), (8, True, False), (9, False, False), (0, True, True)):
        task.set_epoch(epoch)
        task.zero_grad()
        task(*batch())['loss'].backward()
        assert all((p.grad is not None) == head_dist for p in trainable.head_dist.parameters())
        assert all((p.grad is not None) == aligners for p in trainable.aligners.parameters())
        assert all(p.grad is not None for p in trainable.student.parameters())


def test_resume(tmp_path):
    """A checkpoint brings back student, aligner and head_dist; the next step is the same to the bit."""
    task = make(normalize_features=True)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=1e-3)

    def step(task, optimizer, seed):
        torch.manual_seed(seed)
        result = task(*batch())
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        return result['loss'].item()

    step(task, optimizer, 1)
    path = os.path.join(tmp_path, 'last.pth.tar')
    torch.save({**task.get_checkpoint_state(), 'optimizer': optimizer.state_dict(), 'epoch': 0, 'version': 2}, path)
    expected = step(task, optimizer, 2)

    other = make(normalize_features=True)
    other_optimizer = create_optimizer_v2(other.get_trainable_module(), 'adamw', lr=1e-3)
    assert resume_task_checkpoint(other, path, other_optimizer) == 1
    assert step(other, other_optimizer, 2) == expected
    for p, q in zip(task.trainable_module.parameters(), other.trainable_module.parameters()):
        assert p.equal(q)

    for wrong in (make(teacher='test_convnext'), make(hooks='4:1'), make(hooks=['2', '4']), make(hooks='3')):
        with pytest.raises(ValueError, match='another teacher, class map or other hooks.*--dearkd-hooks'):
            resume_task_checkpoint(wrong, path)
    plain = make()
    resume_task_checkpoint(plain, path)
    assert plain.feature_std is None  # what --no-dearkd-normalize-features says now counts


def test_resuming_what_was_trained_without_a_teacher(tmp_path):
    student = make().trainable_module.student
    path = str(tmp_path / 'last.pth.tar')
    for contents in (ClassificationTask(student).get_checkpoint_state(), student.state_dict()):
        torch.save(contents, path)
        with pytest.raises(ValueError, match='trained without DearKD.*--initial-checkpoint'):
            resume_task_checkpoint(make(), path)
        needs_none = make(schedule=TwoStageSchedule(10, 0, 'ce'))
        resume_task_checkpoint(needs_none, path)
        assert needs_none.trainable_module.student.head.weight.equal(student.head.weight)


def test_resuming_the_average(tmp_path):
    """Student and branches of the EMA come back; of a run without EMA, it begins with the weights themselves."""
    task, path = make(), str(tmp_path / 'last.pth.tar')
    task.setup_ema(decay=0.5)
    for p in task.trainable_module.parameters():
        p.data.add_(1.)
    task.update_ema()
    for ema in (True, False):
        torch.save({**task.get_checkpoint_state(), **(task.get_checkpoint_state(ema=True) if ema else {})}, path)
        other = make()
        other.setup_ema(decay=0.5)
        load_task_ema_checkpoint(other, path)
        expected = dict(task.get_trainable_module(ema=ema).named_parameters())
        for name, p in other.get_trainable_module(ema=True).named_parameters():
            assert p.equal(expected[name if ema else name.removeprefix('module.')]), name


def test_feature_std_is_fixed_by_the_first_batch():
    task = make(normalize_features=True)
    images, labels = batch(8)
    feature = task.teacher(images)[1][0]
    task(images, labels)
    std = feature.double().transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(task.feature_std[0], torch.maximum(std, std.mean() / 10).float())
    first = task.feature_std[0].clone()
    task(*batch())
    assert task.feature_std[0].equal(first)
    aligned = task.trainable_module.eval()(images, [feature.shape[-2:]])[2][0]
    expected = F.mse_loss(aligned, feature / first.view(1, -1, 1, 1))
    torch.testing.assert_close(task(images, labels)['hidden_loss'], expected)


def test_feature_std_of_a_task_in_one_process_of_a_group(tmp_path, monkeypatch, caplog):
    """A task that is not distributed asks no other process, and warns if there are others."""
    def refuse(*args, **kwargs):
        raise AssertionError('waits for other processes')

    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, 'all_reduce', refuse)
        task = make(normalize_features=True)
        assert task(*batch(8))['loss'].isfinite() and 'of this process' not in caplog.text
        with monkeypatch.context() as patched:
            patched.setattr(torch.distributed, 'get_world_size', lambda group=None: 2)
            assert make(normalize_features=True)(*batch(8))['loss'].isfinite()
        assert 'of this process alone' in caplog.text
        other = make(normalize_features=True).prepare_distributed()
        with pytest.raises(AssertionError, match='waits'):
            other(*batch(8))
    finally:
        torch.distributed.destroy_process_group()


def test_feature_std_is_that_of_the_first_finite_batch():
    """One infinite value would make all deviations NaN, for the whole run."""
    task, clean = make(normalize_features=True), make(normalize_features=True)
    images, labels = batch(8)
    broken = images.clone()
    broken[0, 0, 0, 0] = math.inf
    assert not task(broken, labels)['loss'].isfinite() and task.feature_std is None
    task(images, labels)
    clean(images, labels)
    assert task.feature_std[0].equal(clean.feature_std[0])


@pytest.mark.parametrize('labels_of', ['dataset', 'teacher'])
def test_a_teacher_without_a_finite_answer_gives_no_hard_label(labels_of):
    """argmax of NaN is class 0."""
    task = make(schedule=TwoStageSchedule(10, 8, beta=0.), labels=labels_of)
    images, labels = batch(8)
    assert task(images, labels)['loss'].isfinite()
    teacher = task.teacher.forward
    task.teacher.forward = lambda *args, **kwargs: (
        teacher(*args, **kwargs)[0].index_fill(0, torch.tensor([3]), math.nan), [])
    found = task(images, labels)
    assert found['loss'].isnan() and found['ce_loss'].isfinite() == (labels_of == 'dataset')


def test_feature_std_follows_the_task_to_another_device():
    task = make(normalize_features=True, hooks=['4:2'])
    task.set_epoch(0)
    task(*batch())
    task.to('meta')
    assert task(*(t.to('meta') for t in batch()))['hidden_loss'].device.type == 'meta'


def test_a_batch_without_deviation_leaves_the_features_as_they_are():
    """One image, and a map of one value per channel."""
    task, plain = make(normalize_features=True, hooks='4:layer4'), make(hooks='4:layer4')
    images, labels = batch(1)
    assert task.teacher(images)[1][0].shape[-2:] == (1, 1)
    assert task.train(False)(images, labels)['hidden_loss'] == plain.train(False)(images, labels)['hidden_loss']


def test_optimizer_groups_reach_through_the_trainable_module():
    task = make()
    module = task.get_trainable_module()
    names = {id(p): n for n, p in module.named_parameters()}
    optimizer = create_optimizer_v2(module, 'adamw', lr=1., weight_decay=0.1)
    decayed = {names[id(p)] for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    assert 'student.blocks.0.attn.qkv.weight' in decayed and 'aligners.0.conv_pw.weight' in decayed
    assert not {n for n in decayed if 'rpe' in n or 'pos_embed' in n}
    groups = param_groups_layer_decay(module, layer_decay=0.5)
    scales = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    assert scales['student.head.weight'] == scales['head_dist.weight'] == scales['aligners.0.conv_dw.weight'] == 1
    assert scales['student.blocks.0.attn.rpe.alpha'] == 0.5 ** 6


def test_clip_parameters():
    task = make()
    names = {id(p): n for n, p in task.trainable_module.named_parameters()}
    distilled = make('deit_tiny_distilled_patch16_224', student_kwargs=dict(depth=4, embed_dim=24, patch_size=16))
    assert len(distilled.get_clip_parameters(exclude_head=True)) == len(distilled.get_clip_parameters()) - 6
    every, without = ({names[id(p)] for p in task.get_clip_parameters(exclude_head=e)} for e in (False, True))
    assert every == set(names.values())
    assert every - without == {'student.head.weight', 'student.head.bias', 'head_dist.weight', 'head_dist.bias'}


@pytest.mark.parametrize('kwargs', [
    {}, dict(hooks=['7']), dict(student='test_vit', student_kwargs=dict(patch_drop_rate=0.5))])
def test_no_hidden_loss_takes_any_teacher_and_has_no_aligner(kwargs):
    """beta = 0 is hard-label distillation alone, and asks nothing of the layers, the teacher's or the student's."""
    teacher = timm.create_model('test_vit', num_classes=5, img_size=32)
    task = make(teacher=teacher, schedule=TwoStageSchedule(10, beta=0.), **kwargs)
    result = task(*batch())
    assert 'hidden_loss' not in result and not task.trainable_module.aligners
    assert task.log_names == ['loss', 'ce_loss', 'logit_loss', 'teacher_agreement']


@pytest.mark.slow
@pytest.mark.parametrize('stage2', ['anneal', 'ce'])
def test_compiled_steps_give_the_same_losses_and_gradients(stage2):
    """torch.compile with no graph break, over the change of stages."""
    task = make(schedule=TwoStageSchedule(10, 8, stage2))
    images, labels = batch()

    def step(epoch):
        task.zero_grad()
        task.set_epoch(epoch)
        result = task(images, labels)
        result['loss'].backward()
        gradients = {name: p.grad.clone() for name, p in task.trainable_module.named_parameters() if p.grad is not None}
        return {k: v.detach() for k, v in result.items()}, {
            name.removeprefix('_orig_mod.'): grad for name, grad in gradients.items()}

    expected = {epoch: step(epoch) for epoch in (0, 8, 9)}
    task.compile(backend='aot_eager', fullgraph=True)
    for epoch in (0, 8, 9):
        for values, others in zip(step(epoch), expected[epoch]):
            assert values.keys() == others.keys()
            for name, value in values.items():
                torch.testing.assert_close(value, others[name], atol=1e-5, rtol=1e-4, msg=f'{epoch} {name}')
    expected = {epoch: values for epoch, (values, _) in expected.items()}
    torch.testing.assert_close(task.get_eval_model()(images), expected[9]['output'], atol=1e-5, rtol=1e-4)
    assert set(task.get_checkpoint_state()['state_dict']) == set(task.trainable_module._orig_mod.student.state_dict())


def test_mixed_precision():
    task = make().eval()
    images, labels = batch()
    expected = task(images, labels)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(images, labels)
        teacher_logits, _ = task.teacher(images)
    for name in ('ce_loss', 'logit_loss', 'hidden_loss'):
        torch.testing.assert_close(result[name], expected[name], rtol=0.03, atol=0)
    assert teacher_logits.dtype == torch.bfloat16 and result['loss'].dtype == torch.float32
    result['loss'].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())


def test_soft_labels():
    task = make(criterion_kwargs=dict(soft_targets=True))
    images, labels = batch()
    soft = F.one_hot(labels, 5).float()
    hard = make().eval()
    torch.testing.assert_close(task.eval()(images, soft)['loss'], hard(images, labels)['loss'])


@pytest.mark.parametrize('epoch', EPOCHS.values())
@pytest.mark.parametrize('temperature', [None, 4.])
def test_labels_of_the_teacher(temperature, epoch):
    """Both heads learn the teacher's answer to the image that the student sees, in both stages."""
    task = make(labels='teacher', soft_temperature=temperature).eval()
    task.set_epoch(epoch)
    images, labels = batch()
    result = task(images, labels)
    answers = task.teacher.model(task.teacher.prepare_input(images))
    heads = task.trainable_module(images, [f.shape[-2:] for f in task.teacher(images)[1]])[:2]
    for name, logits in zip(('ce_loss', 'logit_loss'), heads):
        if logits is None:
            assert epoch == 9 and name not in result
        elif temperature is None:
            torch.testing.assert_close(result[name], F.cross_entropy(logits, answers.argmax(1)))
        else:
            p, q = (answers / 4.).softmax(1), (logits / 4.).softmax(1)
            torch.testing.assert_close(result[name], 16 * (p * (p / q).log()).sum(1).mean(), rtol=1e-3, atol=1e-4)
    assert set(result) - {'output'} <= set(task.log_names)


@pytest.mark.parametrize('temperature', [None, 4.])
@pytest.mark.parametrize('mixed', [False, True])
def test_labels_of_the_data_set_have_no_effect_beside_the_teachers(mixed, temperature):
    """A student learns the same weights from shuffled labels, also from those of Mixup."""
    states = []
    for shift in (0, 1):
        torch.manual_seed(1)
        images, labels = batch(8)
        assert shift == 0 or (labels != labels.roll(shift)).all()
        labels = labels.roll(shift)
        if mixed:
            images, labels = 0.7 * images + 0.3 * images.flip(0), 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(
                labels.flip(0), 5)
        task = make(schedule=TwoStageSchedule(3, 1), labels='teacher', soft_temperature=temperature,
                    criterion_kwargs=dict(soft_targets=mixed)).train()
        optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=1e-3)
        for epoch in range(3):
            task.set_epoch(epoch)
            optimizer.zero_grad()
            task(images, labels)['loss'].backward()
            optimizer.step()
        states.append(task.get_trainable_module().state_dict())
    assert all(value.equal(states[1][key]) for key, value in states[0].items())


def test_labels_of_the_teacher_without_its_features():
    """The teacher runs even where no other loss needs it."""
    task = make(schedule=TwoStageSchedule(2, 2, alpha=1., beta=0.), labels='teacher')
    result = task(*batch())
    assert set(result) == {'loss', 'output', 'ce_loss', 'teacher_agreement'}
    assert set(result) - {'output'} == set(task.log_names)


def test_grey_student_and_ready_teacher():
    cnn = timm.create_model('test_resnet', num_classes=5)
    task = make(teacher=cnn, student_kwargs=dict(in_chans=1))
    assert task(*batch(in_chans=1))['loss'].isfinite()
    task = make(teacher=Teacher(cnn, ['layer3']))
    assert task.trainable_module.aligners[0].conv_pw.out_features == 192


def test_a_teacher_for_the_student_is_the_one_that_the_task_would_create(tmp_path):
    """From a module, and from a name and a checkpoint. A checkpoint of one resumes the other."""
    cnn = timm.create_model('test_resnet', num_classes=5)
    torch.save(cnn.state_dict(), tmp_path / 'cnn.pth')
    expected = make(teacher=copy.deepcopy(cnn), hooks=['2:1', '4'])
    state = expected.get_task_state()
    student = make().trainable_module.student
    shared = Teacher.for_student(student, 'test_resnet', str(tmp_path / 'cnn.pth'))
    make(teacher=shared, hooks='4:3')  # a task does not leave its layers to the next one
    for teacher in (shared, Teacher.for_student(student, cnn)):
        task = make(teacher=teacher, hooks=['2:1', '4'])
        assert task.teacher.layers == expected.teacher.layers == ['layer1', 'layer2']
        task.load_task_state(state)
        task.trainable_module.load_state_dict(expected.trainable_module.state_dict())
        data = batch()
        torch.testing.assert_close(task.eval()(*data)['loss'], expected.eval()(*data)['loss'], atol=0, rtol=0)
    with pytest.raises(ValueError, match='given with a ResNet, expected a model name'):
        Teacher.for_student(student, cnn, checkpoint='cnn.pth')


def test_gradient_checkpointing_is_compatible():
    task = make().train()
    images, labels = batch()
    task(images, labels)['loss'].backward()
    expected = {n: p.grad.clone() for n, p in task.trainable_module.named_parameters()}
    task.zero_grad()
    task.trainable_module.student.set_grad_checkpointing()
    task(images, labels)['loss'].backward()
    for name, parameter in task.trainable_module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_half_precision_students_get_a_teacher_of_their_dtype():
    task = make(student_kwargs=dict(dtype=torch.bfloat16), dtype=torch.bfloat16)
    images, labels = batch()
    task(images.bfloat16(), labels)['loss'].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())


@pytest.mark.parametrize('patch_size, layer', [(4, 'layer2'), (16, 'layer2'), (32, 'layer3')])
def test_the_layer_that_teaches_by_default(patch_size, layer):
    """Of stride 8, or of half a patch where that is more."""
    student = timm.models.VisionTransformer(
        img_size=64, patch_size=patch_size, embed_dim=24, depth=4, num_heads=2, num_classes=5)
    teacher = timm.create_model('resnet18', num_classes=5, channels=(8, 8, 8, 8))
    teacher = Teacher.for_student(student, teacher, input_size=(3, 64, 64))
    task = DearKDTask(student, teacher, TwoStageSchedule(4))
    assert task.teacher.layers == [layer]


def test_a_vit_that_no_factory_made():
    student = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5)
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = DearKDTask(
        student, Teacher.for_student(student, teacher, input_size=(3, 32, 32)), TwoStageSchedule(4), hooks='2:layer1')
    assert task(*batch())['loss'].isfinite()


def test_distributed_over_the_stages(tmp_path):
    """DDP accepts every stage: what takes no gradient is frozen and the module wrapped again."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        task, plain = make(normalize_features=True), make(normalize_features=True)
        task.prepare_distributed()
        assert not task.trainable_module.will_sync_module_buffers()  # the grid's constants are each process's own
        for epoch in (0, 8, 9, 0):
            for t in (task, plain):
                t.set_epoch(epoch)
            for _ in range(2):  # DDP complains in the step after the one that left a parameter out
                data = batch()
                losses = [t(*data)['loss'] for t in (task, plain)]
                for loss in losses:
                    loss.backward()
                torch.testing.assert_close(*losses)
        assert set(task.get_checkpoint_state()['state_dict']) == set(plain.get_checkpoint_state()['state_dict'])
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_and_distributed_with_accumulation(tmp_path):
    """compile, then prepare_distributed, as timm does: after each change of stage the wrapped module is still the
    compiled one, and no_sync() gives the gradient of both batches. The teacher goes through a class map.
    """
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        task, plain = (
            make('test_vit', 7, class_map=[6, 0, 0, 3, 1], hooks='1', student_kwargs=dict(depth=1))
            for _ in range(2))
        task.compile(backend='eager')
        compiled = task.trainable_module
        task.prepare_distributed()
        batches = batch(), batch()
        for epoch in (0, 9, 0):
            for t in (task, plain):
                t.set_epoch(epoch)
                t.zero_grad()
                with t.no_sync():
                    assert t is plain or not t.trainable_module.require_backward_grad_sync
                    t(*batches[0])['loss'].backward()
                t(*batches[1])['loss'].backward()
            assert task.trainable_module.module is compiled
            for p, q in zip(task.trainable_module.parameters(), plain.trainable_module.parameters()):
                torch.testing.assert_close(p.grad, q.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_teacher_with_more_classes():
    """The hard label is the best one of the classes that the map names, whatever else the teacher knows."""
    class_map = [6, 0, 2, 3, 1]
    task = make(teacher=9, class_map=class_map).eval()
    images, labels = batch(16)
    cnn, x = task.teacher.model, task.teacher.prepare_input(images)
    cnn.fc.bias.data -= cnn(x).mean(0)  # an untrained one finds the same class everywhere
    logits = cnn(x).tolist()
    hard = [max(range(5), key=lambda i, row=row: row[class_map[i]]) for row in logits]
    assert len(set(hard)) > 1 and any(row.index(max(row)) not in class_map for row in logits)
    dist_logits = task.trainable_module(images, [(4, 4)])[1]
    result = task(images, labels)
    torch.testing.assert_close(result['logit_loss'], F.cross_entropy(dist_logits, torch.tensor(hard)))
    agreement = sum(a == b for a, b in zip(hard, labels.tolist())) / 16
    mixed = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels.flip(0), 5)
    assert result['teacher_agreement'].item() == pytest.approx(agreement)
    task.criterion = SoftTargetCrossEntropy()
    assert task(images, mixed)['teacher_agreement'].item() == pytest.approx(agreement)


def test_a_teacher_is_copied_whole():
    teacher = Teacher(timm.create_model('test_resnet'), ['layer1'])
    other = copy.deepcopy(teacher)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(x)[1][0], teacher(x)[1][0])
    assert other.capture is not teacher.capture


@pytest.mark.parametrize('spec,hook', [('4', (4, None)), ('4:2', (4, '2')), ('12:s2.b4', (12, 's2.b4'))])
def test_hooks_are_parsed(spec, hook):
    assert parse_hook(spec) == hook


@pytest.mark.parametrize('kwargs,message', [
    (dict(hooks=['0']), 'BLOCK:STAGE'),
    (dict(hooks='x:2'), "'x:2' is not BLOCK"),
    (dict(hooks=['4:']), 'BLOCK:STAGE'),
    (dict(hooks=['7']), 'Choose a block from 1 to 6'),
    (dict(hooks=['4:layer22']), 'layer2'),
    (dict(hooks=['4:fc']), 'not a 4-D feature map'),
    (dict(teacher=7), r'knows 7 classes, the student 5.*--kd-class-map'),
    (dict(teacher=7, class_map=[0, 1, 2]), 'has 3 entries, the student 5 classes.*--kd-class-map'),
    (dict(teacher=3, class_map=[0, 1, 2, 3, 0]), 'teacher class 3, but the teacher has classes 0 to 2'),
    (dict(teacher_model='test_resnt'), "Unknown model 'test_resnt'.*test_resnet"),
    (dict(student='test_vit', student_kwargs=dict(patch_drop_rate=0.5)), 'patch_drop_rate'),
    (dict(student='xcit_nano_12_p16_224'), 'does not report the grid of its tokens'),
    (dict(student='test_resnet', student_kwargs=dict(img_size=None)), '--kd-distill-type logit'),
    (dict(teacher=Teacher(timm.create_model('test_resnet', num_classes=5), ['layer1']), hooks=['2', '4']),
     r'has 1 layer\(s\) for 2 hook'),
])
def test_errors_name_the_remedy(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
