"""A whole training step of DearKD beside what it is made of, and timm's token distillation beside the same.

What is compared takes turns in one process (A B C A B C ...), and the figures are medians. The steps are those of
train.py's loop: losses, their means, the check for finite ones, backward, clipping, AdamW. "Parts" are the student's
step on labels alone and the teacher's forward, measured apart; the last column is the whole step over their sum.
One thread by default, so that the figures are those of a core. Weights are random.

    python benchmarks/train_step.py                       # some minutes on a slow core
    python benchmarks/train_step.py --teacher regnety_160 --batch-size 4
    python benchmarks/train_step.py --device cuda --amp-dtype bfloat16 --channels-last --batch-size 256 --compile
"""
import argparse
import logging
from typing import Any, Callable, Iterable, Optional, cast

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


def make_forward(model, images: torch.Tensor, args, precision: Precision) -> Callable[[], None]:
    """A forward of the teacher."""
    model = model.to(precision.device).eval()
    if args.channels_last:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    if args.compile:
        model = torch.compile(model)

    def run() -> None:
        with torch.no_grad(), precision.autocast():
            model(images)
    return run


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

    def student(name: str) -> torch.nn.Module:
        return timm.create_model(name).to(device)

    def teacher() -> torch.nn.Module:
        return timm.create_model(args.teacher).to(device).eval().requires_grad_(False)

    dearkd = DearKDTask(student(args.student), teacher(), TwoStageSchedule(epochs=1), device=device)
    dearkd.teacher.fold_batchnorm((3, 224, 224))  # as train.py does
    if args.amp_dtype:
        dearkd.teacher.store_weights(precision.amp_dtype)
    token = TokenDistillationTask(
        student(args.beside), teacher_model=teacher(), distill_type='hard', device=device)
    steps = {
        'dearkd': make_step(dearkd, batch, args, precision),
        'student': make_step(ClassificationTask(student(args.student), device=device), batch, args, precision),
        'token': make_step(token, batch, args, precision),
        'beside': make_step(ClassificationTask(student(args.beside), device=device), batch, args, precision),
        'teacher': make_forward(Teacher(teacher()).model, batch[0], args, precision),
    }
    seconds = medians(steps, args.rounds, device)

    print(f'{args.teacher} teaches; {device}, batch {args.batch_size}, {args.amp_dtype or "float32"}; milliseconds')
    print('| step | whole | student | teacher | whole / (student + teacher) |\n| --- | --- | --- | --- | --- |')
    for name, whole, part in (
            (f'DearKD, {args.student}', 'dearkd', 'student'),
            (f"timm's token distillation, {args.beside}", 'token', 'beside')):
        parts = seconds[part] + seconds['teacher']
        print(f'| {name} | {1e3 * seconds[whole]:.0f} | {1e3 * seconds[part]:.0f} | {1e3 * seconds["teacher"]:.0f}'
              f' | {seconds[whole] / parts:.3f} |')


if __name__ == '__main__':
    main()
