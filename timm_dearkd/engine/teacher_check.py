"""Evaluation of the teacher before training: its accuracy, and whether its classes are in the student's order."""
import logging
import os
import shlex
from functools import partial
from typing import Any, List, Optional, Sequence

import torch
import torch.distributed as dist

from distill_hooks import Teacher, TimmTeacher
from distill_hooks.answers import MAX_CLASSES, ClassOrder, count_answers, find_order

from ..files import write_text
from .image_folder import normal_name
from .loop import Validator

__all__ = ['check_teacher', 'label_names']

_logger = logging.getLogger(__name__)


def label_names(model: Any) -> List[str]:
    """Return the class names of a model in the order of its classifier, see `normal_name`; [] if it has none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return [normal_name(str(name)) for name in names] if isinstance(names, (list, tuple)) else []


def check_teacher(
        task: Any,
        validator: Validator,
        folder: str,
        names: Sequence[str] = (),
) -> Optional[float]:
    """Evaluate the teacher on the validation images, as the student's task feeds it. All processes call this together.

    Warns if the teacher's classes seem to be in another order, and writes that order to `kd_class_map.txt`.

    Args:
        task: A task with a teacher.
        validator: Evaluates it.
        folder: Output folder of the run.
        names: Names of the student's classes, if they are known.

    Returns:
        Top-1 in percent, or None if the teacher's classes are not the student's, as they need not be for features.
    """
    model = task.teacher if isinstance(task.teacher, TimmTeacher) else TimmTeacher(task.teacher)
    teacher = model.teacher
    num_classes = task.get_eval_model().num_classes
    uses_classes = getattr(task, 'uses_classes', True)
    known = label_names(teacher.model)
    if teacher.num_classes not in (None, num_classes) or not (uses_classes or known in ([], list(names)) or not names):
        return None
    counts = None
    if 2 <= num_classes <= MAX_CLASSES:
        shape = 2, num_classes, num_classes
        counts = torch.zeros(shape, dtype=torch.long, device=validator.precision.device)
    top1 = validator(model, 'Teacher', None if counts is None else partial(count_answers, counts))['top1']
    if counts is None:
        return top1
    if validator.ranks.distributed:
        dist.all_reduce(counts)
    order = find_order(counts.cpu().numpy())
    if order is not None and uses_classes and validator.ranks.is_primary:
        _warn_of_order(teacher, order, folder, names)
    return top1 if order is None or uses_classes else None


def _warn_of_order(teacher: Teacher, order: ClassOrder, folder: str, names: Sequence[str]) -> None:
    """Write the probable order into a class map, and name some of its classes."""
    classes = order.answers if teacher.class_map is None else teacher.class_map[order.answers].tolist()
    names = list(names) or [''] * len(classes)
    path = os.path.join(folder, 'kd_class_map.txt')
    lines = [f'{index} {name}'.rstrip() for index, name in zip(classes, names)]
    write_text(folder, os.path.basename(path), '\n'.join(lines) + '\n')
    examples = ', '.join(
        f'class {names[label] or label!r} looks like its class {classes[label]}' for label in order.moved[:3])
    _logger.warning(
        f"The teacher's classes seem to be in another order: {examples}{', …' if len(order.moved) > 3 else ''}."
        f' In that order it finds the label of {100 * order.agreement:.1f} % of the validation images, now of'
        f' {100 * order.agreement_now:.1f} %. Check {path}, which has the order that fits best, and train again with'
        f' --kd-class-map {shlex.quote(path)}.')
