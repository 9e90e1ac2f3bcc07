"""The check of the teacher: its accuracy and the order of its classes, before training and after the first epoch."""
import logging
import os
import shlex
from functools import partial
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.distributed as dist

from distill_hooks import Teacher, TimmTeacher
from distill_hooks.answers import MAX_CLASSES, ClassOrder, count_answers, find_order

from ..files import write_text
from .checkpoints import Position
from .distillation import count_outputs, saved_names
from .loop import Validator
from .process import SINGLE, Interrupted, Ranks, StopRequest, on_primary
from .run_folder import read_run_info, record_results

_logger = logging.getLogger(__name__)

MIN_TEACHER = 1.2  # of the accuracy of guessing; our choice


class TeacherResult(NamedTuple):
    """Result of `evaluate_teacher`.

    Args:
        top1: Top-1 in percent; None if the teacher's classes are not the student's, as features allow.
        has_other_order: Whether the teacher's classes seem to be in another order.
    """
    top1: Optional[float]
    has_other_order: bool = False


class TeacherCheck:
    """Evaluates the teacher before the first epoch, and warns of a teacher that hardly knows the images.

    All processes call it, the primary one writes. It does nothing for a task without a teacher.

    Args:
        task: Task of the run.
        folder: Output folder of the run.
        validator: Evaluates the teacher; None if there are no images.
        is_validation: Whether the validator has validation images, so that the student's accuracy can be compared with
            the teacher's. Otherwise, it has images of the training set.
        names: Names of the student's classes; () if they are unknown.
        img_size: --kd-teacher-img-size.
        ranks: Processes of the run.
    """

    def __init__(
            self,
            task: Any,
            folder: str,
            validator: Optional[Validator] = None,
            is_validation: bool = False,
            names: Sequence[str] = (),
            img_size: Optional[int] = None,
            ranks: Ranks = SINGLE,
    ) -> None:
        self.task = task
        self.folder = folder
        self.validator = validator
        self.is_validation = is_validation
        self.names = names
        self.img_size = img_size
        self.ranks = ranks
        results = read_run_info(folder).get('results', {})
        self.top1: Optional[float] = results.get('teacher_top1')  # on validation images, in percent
        self._is_known = 'teacher_top1' in results
        self._was_reported = False

    def evaluate(self, start: Position, stop: StopRequest) -> None:
        """Evaluate the teacher of a new run, or of one that is resumed with another image size, and set `top1`.

        Args:
            start: Where the run starts.
            stop: Signals.

        Raises:
            Interrupted: If a signal has come.
        """
        if getattr(self.task, 'teacher', None) is None:
            return
        if self.validator is None:
            _logger.info("The order of the teacher's classes is not checked: that needs validation images.")
            return
        is_resumed = bool(start.epoch or start.update)
        has_same_size = (start.options or {}).get('kd_teacher_img_size') == self.img_size
        is_known = on_primary(self.ranks, lambda: self._is_known)
        if is_resumed and has_same_size and (is_known or not self.is_validation):
            return

        def end_if_asked() -> None:
            if stop:
                raise Interrupted(stop.signum)

        self.validator.on_batch = end_if_asked if self.validator.in_step else None
        self.record(evaluate_teacher(self.task, self.validator, self.folder, self.names))

    def record(self, result: TeacherResult) -> None:
        """Record the accuracy of the teacher. Warn of a teacher that guesses, if the student learns from it alone."""
        self._was_reported = result.has_other_order
        if getattr(self.task, 'labels', '') == 'teacher':
            self._warn_of_guessing(
                result.top1, 'validation' if self.is_validation else 'training',
                'The student learns nothing but these answers. Choose another teacher, --kd-class-map,'
                ' --kd-teacher-img-size, or --kd-teacher-mean and --kd-teacher-std. Or set --dearkd-labels dataset,'
                ' which also teaches the classes of the images.')
        if self.is_validation:
            self.top1 = None if result.top1 is None else round(result.top1, 3)
            if self.ranks.is_primary:
                record_results(self.folder, teacher_top1=self.top1)

    def after_epoch(self, epoch: int, losses: Mapping[str, float]) -> None:
        """Warn after the first epoch of a teacher that guesses the labels of the training images.

        Args:
            epoch: The epoch, counted from 0.
            losses: Mean training losses.
        """
        agreement = losses.get('teacher_agreement')
        if epoch or agreement is None:
            return
        knows_names = bool(self.names) and set(self.names) <= set(saved_names(self.task.teacher.model))
        cause = (
            'it has hardly learned (train it for more epochs)' if knows_names else
            'its classes are others or in another order (--kd-class-map FILE)')
        self._warn_of_guessing(
            100 * agreement, 'training',
            f'Possible causes: {cause}, or it was trained with another normalisation (--kd-teacher-mean,'
            ' --kd-teacher-std) or image size (--kd-teacher-img-size).')

    def _warn_of_guessing(self, correct: Optional[float], images: str, remedy: str) -> None:
        """Warn of a teacher that knows the images hardly better than by guessing, unless a warning came before.

        Args:
            correct: Right answers of the teacher in percent; None if they are unknown.
            images: Kind of the images.
            remedy: What to do, in sentences.
        """
        if correct is None or self._was_reported or not self.ranks.is_primary:
            return
        guessing = 100 / count_outputs(self.task)
        if correct < MIN_TEACHER * guessing:
            self._was_reported = True
            _logger.warning(
                f'The teacher predicts the label of {correct:.1f} % of the {images} images. Guessing gives'
                f' {guessing:.1f} %. {remedy}')


def evaluate_teacher(
        task: Any,
        validator: Validator,
        folder: str,
        names: Sequence[str] = (),
) -> TeacherResult:
    """Evaluate the teacher on images as the student's task feeds it. All processes must call this together.

    Warns if the teacher's classes seem to be in another order, and writes that order to `kd_class_map.txt`.

    Args:
        task: A task with a teacher.
        validator: Evaluates the teacher.
        folder: Output folder of the run.
        names: Names of the student's classes, if they are known.
    """
    model = task.teacher if isinstance(task.teacher, TimmTeacher) else TimmTeacher(task.teacher).eval()
    teacher = model.teacher
    num_classes = count_outputs(task)
    uses_classes = getattr(task, 'uses_classes', True)
    known = saved_names(teacher.model)
    has_other_names = bool(known and names) and known != list(names)
    if teacher.num_classes not in (None, num_classes) or (has_other_names and not uses_classes):
        return TeacherResult(None)
    counts = None
    if 2 <= num_classes <= MAX_CLASSES:
        shape = 2, num_classes, num_classes
        counts = torch.zeros(shape, dtype=torch.long, device=validator.precision.device)
    top1 = validator(model, 'Teacher', None if counts is None else partial(count_answers, counts))['top1']
    if counts is None:
        if num_classes > MAX_CLASSES:
            _logger.info(f"The order of the teacher's classes is not checked: there are over {MAX_CLASSES}.")
        return TeacherResult(top1)
    if validator.ranks.distributed:
        dist.all_reduce(counts)
    order = find_order(counts.cpu().numpy())
    if order is not None and uses_classes and validator.ranks.is_primary:
        _warn_of_order(teacher, order, folder, names)
    return TeacherResult(top1 if order is None or uses_classes else None, order is not None)


def _warn_of_order(teacher: Teacher, order: ClassOrder, folder: str, names: Sequence[str]) -> None:
    """Write the probable order into a class map, and name some of its classes."""
    classes = order.answers if teacher.class_map is None else teacher.class_map[order.answers].tolist()
    names = list(names) or [''] * len(classes)
    path = os.path.join(folder, 'kd_class_map.txt')
    lines = [f'{index} {name}'.rstrip() for index, name in zip(classes, names)]
    write_text(Path(path), '\n'.join(lines) + '\n')
    examples = ', '.join(
        f'class {names[label] or label!r} looks like its class {classes[label]}' for label in order.moved[:3])
    _logger.warning(
        f"The teacher's classes seem to be in another order: {examples}{', …' if len(order.moved) > 3 else ''}."
        f' In that order it finds the label of {100 * order.agreement:.1f} % of the images, now of'
        f' {100 * order.agreement_now:.1f} %. Check {path}, which has the order that fits best, and train again with'
        f' --kd-class-map {shlex.quote(path)}.')
