"""Tasks and batches for the phases that train."""
from typing import Any, List, Tuple

import timm
import torch
from timm.task import ClassificationTask

import timm_dearkd  # noqa: F401  registers the architectures
from distill_hooks import DearKDTask, TwoStageSchedule

from .check import Check

CLASSES = 10
STAGE_1, STAGE_2 = 0, 3  # an epoch of each


def create(name: str, check: Check, **kwargs: Any) -> Any:
    """A model with random weights on the device."""
    return timm.create_model(name, num_classes=CLASSES, **kwargs).to(check.device)


def make_dearkd(
        check: Check,
        student: str,
        teacher: str,
        size: int,
        amp: bool = True,
        epoch: int = STAGE_1,
        hook: str = '2',
        alpha: float = 0.5,
        **student_kwargs: Any,
) -> DearKDTask:
    """DearKD's task, with the teacher's weights as train.py stores them.

    Args:
        check: The phase.
        student: timm's name.
        teacher: timm's name.
        size: Side length of the images.
        amp: The task runs under bfloat16.
        epoch: One of stage I or of stage II.
        hook: Student block that learns from the teacher's features.
        alpha: Weight of the label loss in stage I.
        **student_kwargs: Arguments of the student.
    """
    torch.manual_seed(0)
    cnn = create(teacher, check).eval().requires_grad_(False)
    model = create(student, check, img_size=size, **student_kwargs)
    task = DearKDTask(
        model, cnn, TwoStageSchedule(epochs=6, stage1_epochs=3, alpha=alpha), hooks=[hook], device=check.device,
        verbose=False)
    task.teacher.fold_batchnorm((3, size, size))
    if amp:
        task.teacher.store_weights(torch.bfloat16)
    task.set_epoch(epoch)
    return task


def make_student_task(check: Check, student: str, size: int, **student_kwargs: Any) -> ClassificationTask:
    """The student alone, on labels."""
    torch.manual_seed(0)
    return ClassificationTask(
        create(student, check, img_size=size, **student_kwargs), device=check.device, verbose=False)


def make_batches(check: Check, count: int, batch_size: int, size: int) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Random images and labels on the device; all batches are the same one, which costs little memory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(check.device)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(check.device)
    return [(images, labels)] * count
