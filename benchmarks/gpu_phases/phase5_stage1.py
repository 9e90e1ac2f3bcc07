"""Phase 5: a step of stage I against its parts, known labels, layouts, the teacher with BatchNorm folded, memory."""
from typing import Any, Callable, Dict

import timm
import torch
import torch.nn as nn
from timing import medians
from train_step import KnownLabels, make_trainer

from distill_hooks import Teacher

from .check import Check, at_least, at_most, milliseconds, relative_error
from .tasks import make_batches, make_dearkd, make_student_task


def sizes(check: Check) -> Dict[str, Any]:
    if check.toy:
        return dict(student='test_dearkd', teacher='regnety_002', size=32, hook='2')
    return dict(student='dearkd_tiny_patch16_224', teacher='regnety_160', size=224, hook='4')


def batch_size(check: Check) -> int:
    return 2 if check.toy else 256


def num_steps(check: Check) -> int:
    """Steps of an epoch, of which the last one waits for a log line."""
    return 1 if check.toy else 4


def run(check: Check) -> None:
    with check.part('peak memory'):
        peak_memory(check)
    with check.part('stage I'):
        stage_1(check)
    if check.has_time('step of stage I, labels cached', 0 if check.toy else 15):
        with check.part('labels cached'):
            cached_labels(check)
    if check.has_time('teacher', 0 if check.toy else 8):
        with check.part('teacher'):
            teacher_forms(check)


def peak_memory(check: Check) -> None:
    """Peak memory of a step that measures the features' deviation, as the first one does, and of the next."""
    models = sizes(check)
    task = make_dearkd(check, **models)
    trainer = make_trainer(
        task, make_batches(check, 1, batch_size(check), models['size']), check.precision(torch.bfloat16),
        channels_last=True)
    trainer.train_epoch(0)  # cuDNN tries its kernels, which takes memory
    task.feature_std = None
    first, second = (check.peak_memory(lambda: trainer.train_epoch(0)) for _ in range(2))
    if first is None or second is None:
        check.skip('peak memory of the first step', 'a CPU does not tell')
        return
    check.row(
        'peak memory of the first step', first / second, 'x the second step', at_most(1.1), first_gib=first,
        second_gib=second)


def epoch(check: Check, task: Any, channels_last: bool) -> Callable[[], Any]:
    """An epoch of a few steps, as train.py takes them."""
    batches = make_batches(check, num_steps(check), batch_size(check), sizes(check)['size'])
    trainer = make_trainer(task, batches, check.precision(torch.bfloat16), channels_last=channels_last)
    return lambda: trainer.train_epoch(0)


def make_forward(check: Check, model: nn.Module, channels_last: bool, **kwargs: Any) -> Callable[[], Any]:
    """The teacher's forward under autocast, with further arguments."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = make_batches(check, 1, batch_size(check), sizes(check)['size'])[0][0].contiguous(
        memory_format=memory_format)
    model = model.to(memory_format=memory_format)

    def forward() -> torch.Tensor:
        with torch.no_grad(), check.precision(torch.bfloat16).autocast():
            return model(images, **kwargs)
    return forward


def make_teacher(check: Check) -> Any:
    """The teacher's model with random weights and statistics, as the task stores it."""
    torch.manual_seed(0)
    model: Any = timm.create_model(sizes(check)['teacher'], num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(check.device).eval().requires_grad_(False)


def store(model: nn.Module) -> nn.Module:
    """Return the model with the weights that the task stores in bfloat16."""
    teacher = Teacher(model)
    teacher.store_weights(torch.bfloat16)
    return teacher.model


def stage_1(check: Check) -> None:
    """The whole step against the student's step on labels and the teacher's forward, in both layouts."""
    models = sizes(check)
    student = {key: value for key, value in models.items() if key in ('student', 'size')}
    for channels_last in (True, False):
        layout = 'channels-last' if channels_last else 'contiguous'
        if not check.has_time(f'step of stage I, {layout}', 0 if check.toy else 15):
            continue
        functions = dict(
            whole=epoch(check, make_dearkd(check, **models), channels_last),
            student=epoch(check, make_student_task(check, **student), channels_last),
            teacher=make_forward(check, make_dearkd(check, **models).teacher, channels_last),
        )
        seconds = medians(functions, 1 if check.toy else 5, check.device, warmup=1 if check.toy else 2)
        whole, alone = (seconds[name] / num_steps(check) for name in ('whole', 'student'))
        check.row(
            f'step of stage I, {layout}', whole / (alone + seconds['teacher']), 'x student + teacher', at_most(1.05),
            is_speed=True, ms=milliseconds(dict(whole=whole, student=alone, teacher=seconds['teacher'])))
        check.free()


def cached_labels(check: Check) -> None:
    """The step with known labels, and with alpha = 1, against the student's step and the teacher up to its map."""
    models = sizes(check)
    student = {key: value for key, value in models.items() if key in ('student', 'size')}
    cached = make_dearkd(check, **models)
    cached.label_store = KnownLabels(make_batches(check, 1, batch_size(check), models['size'])[0][1])
    functions = dict(
        whole=epoch(check, make_dearkd(check, **models), True),
        cached=epoch(check, cached, True),
        alpha_1=epoch(check, make_dearkd(check, alpha=1., **models), True),
        student=epoch(check, make_student_task(check, **student), True),
        stopped=make_forward(check, cached.teacher, True, with_logits=False),
    )
    seconds = medians(functions, 1 if check.toy else 5, check.device, warmup=1 if check.toy else 2)
    seconds = {name: time if name == 'stopped' else time / num_steps(check) for name, time in seconds.items()}
    parts, details = seconds['student'] + seconds['stopped'], milliseconds(seconds)
    for name, key in (('labels cached', 'cached'), ('alpha = 1', 'alpha_1')):
        check.row(
            f'step of stage I, {name}', seconds[key] / parts, 'x student + teacher up to the map', at_most(1.03),
            is_speed=True, ms=details)
        check.row(f'speed with {name}', seconds['whole'] / seconds[key], 'x the step of stage I', ms=details)


def teacher_forms(check: Check) -> None:
    """The teacher's forward by layout, with BatchNorm and with it folded into the convolutions."""
    functions, folded = {}, 0
    for name, channels_last in (('contiguous', False), ('channels-last', True)):
        functions[name] = make_forward(check, store(make_teacher(check)), channels_last)
        teacher = Teacher(make_teacher(check))
        folded = teacher.fold_batchnorm((3, sizes(check)['size'], sizes(check)['size']))
        functions[f'{name}, folded'] = make_forward(check, store(teacher.model), channels_last)
    exact = functions['channels-last']().float()
    error = relative_error(functions['channels-last, folded']().float(), exact)
    seconds = medians(functions, 1 if check.toy else 7, check.device, warmup=1 if check.toy else 2)
    details = dict(ms=milliseconds(seconds), batchnorms=folded, relative_error=error)
    check.row(
        'teacher, channels-last', seconds['contiguous'] / seconds['channels-last'], 'x contiguous', **details)
    fastest = min(seconds['contiguous'], seconds['channels-last'])
    fastest_folded = min(seconds['contiguous, folded'], seconds['channels-last, folded'])
    check.row('BatchNorm layers folded', folded, mark=at_least(1))
    check.row('teacher, BatchNorm folded', fastest / fastest_folded, 'x not folded', **details)
    check.row('error of the folded teacher', error, 'relative, bfloat16', at_most(5e-2))
