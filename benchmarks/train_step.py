"""Time a DearKD training step and its parts, and a step of timm's token distillation.

The variants take turns in one process (A B C A B C ...). The figures are medians. The steps are those of train.py's
loop: losses, their means, the check for finite ones, backward, clipping, AdamW. Two rows run the teacher only up to its
feature map: with known labels (--kd-label-cache), and with alpha = 1, which uses no labels of the teacher. "Student" is
the student's step on labels alone. "Teacher" is the teacher's forward. "Speed" is relative to the first row. One thread
by default, so that the figures are those of a core. Weights are random.

    python benchmarks/train_step.py                       # some minutes on a slow core
    python benchmarks/train_step.py --teacher regnety_160 --batch-size 4
    python benchmarks/train_step.py --device cuda --amp-dtype bfloat16 --channels-last --batch-size 256 --compile
"""
import argparse
import logging
from functools import partial
from typing import Any, Callable, Dict, Iterable, Optional, cast

import timm
import torch
import torch.nn as nn
from timing import medians
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TokenDistillationTask, TrainingTask

import timm_dearkd  # noqa: F401
from distill_hooks import DearKDTask, Teacher, TwoStageSchedule
from timm_dearkd.engine.loop import Stepper, Trainer
from timm_dearkd.engine.process import Precision, select_device


def make_trainer(
        task: TrainingTask,
        batches: Iterable,
        precision: Precision,
        opt: str = 'adamw',
        channels_last: bool = False,
        compile: Optional[str] = None,
        **kwargs: Any,
) -> Trainer:
    """Build train.py's loop over batches on the device, with clipping and the optimizer that train.py would choose.

    Args:
        task: The task to train. `prepare_distributed` comes after this.
        batches: Batches with a length.
        precision: See `Precision`.
        opt: timm's name of the optimizer.
        channels_last: Memory format of the weights and images.
        compile: Backend of `torch.compile`; None runs eagerly.
        **kwargs: Further arguments of `Trainer`.
    """
    if channels_last:
        task.to(memory_format=torch.channels_last)
    fused = dict(fused=True) if opt == 'adamw' and precision.device.type == 'cuda' else {}
    optimizer = create_optimizer_v2(cast(nn.Module, task.get_trainable_module()), opt, lr=1e-6, **fused)
    if compile:
        task.compile(backend=compile)
    stepper = Stepper(task, optimizer, precision.scaler, clip_grad=1.)
    return Trainer(task, batches, stepper, precision, channels_last=channels_last, **kwargs)


def make_step(task: TrainingTask, batch, args, precision: Precision) -> Callable[[], object]:
    """Return a function that trains for an epoch of one step."""
    compile = 'inductor' if args.compile else None
    trainer = make_trainer(task, [batch], precision, channels_last=args.channels_last, compile=compile)
    return lambda: trainer.train_epoch(0)


def make_forward(function: Callable[..., object], images: torch.Tensor, precision: Precision) -> Callable[[], None]:
    """Return a function that runs the teacher."""
    def run() -> None:
        with torch.no_grad(), precision.autocast():
            function(images)
    return run


class KnownLabels:
    """A `LabelStore` with the same labels for every batch, which stay on the device."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def take(self, batch_size: int) -> torch.Tensor:
        return self.labels

    def put(self, logits: torch.Tensor) -> None:
        pass


def make_steps(batch, args, precision: Precision) -> Dict[str, Callable[[], object]]:
    """Return the steps and their parts by name."""
    device = precision.device

    def student(name: str) -> torch.nn.Module:
        return timm.create_model(name).to(device)

    def teacher() -> torch.nn.Module:
        return timm.create_model(args.teacher).to(device).eval().requires_grad_(False)

    def dearkd(shared: Teacher, alpha: float = 0.5) -> DearKDTask:
        return DearKDTask(student(args.student), shared, TwoStageSchedule(epochs=1, alpha=alpha), device=device)

    whole_model: nn.Module = Teacher(teacher()).model
    images = batch[0]
    if args.channels_last:
        whole_model, images = (x.to(memory_format=torch.channels_last) for x in (whole_model, images))
    folded = Teacher.for_student(student(args.student), teacher())
    tasks: Dict[str, TrainingTask] = {'dearkd': dearkd(folded)}
    folded.fold_batchnorm((3, 224, 224))  # as train.py does
    if device.type == 'cpu':
        folded.model.to(memory_format=torch.channels_last)
    if args.amp_dtype:
        folded.store_weights(getattr(torch, args.amp_dtype))
    tasks['cached'] = cached = dearkd(folded)
    cached.label_store = KnownLabels(batch[1])
    tasks.update(
        alpha_1=dearkd(folded, alpha=1.),
        student=ClassificationTask(student(args.student), device=device),
        token=TokenDistillationTask(
            student(args.beside), teacher_model=teacher(), distill_type='hard', device=device),
        beside=ClassificationTask(student(args.beside), device=device),
    )
    steps = {name: make_step(task, batch, args, precision) for name, task in tasks.items()}
    steps['teacher'] = make_forward(folded, images, precision)
    steps['timm_teacher'] = make_forward(torch.compile(whole_model) if args.compile else whole_model, images, precision)
    steps['stopped'] = make_forward(partial(folded, with_logits=False), images, precision)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--student', default='dearkd_tiny_patch16_224')
    parser.add_argument('--beside', default='deit_tiny_distilled_patch16_224', help="timm's student")
    parser.add_argument('--teacher', default='regnety_032')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16'))
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    device, _ = select_device(args.device)
    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp_dtype else None)
    batch = (
        torch.randn(args.batch_size, 3, 224, 224, device=device),
        torch.randint(1000, (args.batch_size,), device=device))

    seconds = medians(make_steps(batch, args, precision), args.rounds, device)
    print(f'{args.teacher} teaches; {device}, batch {args.batch_size}, {args.amp_dtype or "float32"}; milliseconds')
    print('| step | whole | student | teacher | whole / (student + teacher) | speed |')
    print('| --- | --- | --- | --- | --- | --- |')
    for name, whole, student, teacher in (
            (f'DearKD, {args.student}', 'dearkd', 'student', 'teacher'),
            ('DearKD, labels cached', 'cached', 'student', 'stopped'),
            ('DearKD, alpha = 1', 'alpha_1', 'student', 'stopped'),
            (f"timm's token distillation, {args.beside}", 'token', 'beside', 'timm_teacher')):
        parts = seconds[student] + seconds[teacher]
        print(f'| {name} | {1e3 * seconds[whole]:.0f} | {1e3 * seconds[student]:.0f} | {1e3 * seconds[teacher]:.0f}'
              f' | {seconds[whole] / parts:.3f} | {seconds["dearkd"] / seconds[whole]:.2f} |')


if __name__ == '__main__':
    main()
