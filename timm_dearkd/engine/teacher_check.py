"""The check of the teacher: its accuracy and the order of its classes, before training and after the first epoch."""
import logging
import os
import shlex
from dataclasses import dataclass
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
from .process import SINGLE, Interrupted, Ranks, StopRequest, TrainingError, on_primary
from .run_folder import read_run_info, record_results

_logger = logging.getLogger(__name__)

MIN_TEACHER = 1.2  # of the accuracy of guessing; our choice


class TeacherResult(NamedTuple):
    """Result of `evaluate_teacher`.

    Args:
        top1: Top-1 in percent; None if the teacher's classes are not the student's, as features allow.
        order: An order of classes that explains the teacher's answers much better; None if there is none.
    """
    top1: Optional[float]
    order: Optional[ClassOrder] = None


@dataclass
class TeacherCheck:
    """Evaluates the teacher before the first epoch, and warns of a teacher that hardly knows the images.

    All processes call it, the primary one writes. It does nothing for a task without a teacher.

    Args:
        task: Task of the run.
        folder: Output folder of the run.
        validator: Evaluates on the validation images; None if there are none.
        train_validator: Evaluates on training images, for the order of the classes; None if the validation images are
            enough.
        names: Names of the student's classes; () if they are unknown.
        img_size: --kd-teacher-img-size.
        class_map: --kd-class-map; '' for none.
        ranks: Processes of the run.
    """
    task: Any
    folder: str
    validator: Optional[Validator] = None
    train_validator: Optional[Validator] = None
    names: Sequence[str] = ()
    img_size: Optional[int] = None
    class_map: str = ''
    ranks: Ranks = SINGLE

    def __post_init__(self) -> None:
        results = read_run_info(self.folder).get('results', {})
        self.top1: Optional[float] = results.get('teacher_top1')  # on validation images, in percent
        self._is_known = 'teacher_top1' in results
        # the teacher knows the images, or a warning was given
        self._is_settled = self.top1 is not None and not self._is_guess(self.top1)

    def evaluate(self, start: Position, stop: StopRequest) -> None:
        """Evaluate the teacher of a new run, or of one that is resumed with another image size, and set `top1`.

        Args:
            start: Where the run starts.
            stop: Signals.

        Raises:
            Interrupted: If a signal has come.
            TrainingError: See `record`.
        """
        if getattr(self.task, 'teacher', None) is None:
            return
        validators = [validator for validator in (self.validator, self.train_validator) if validator is not None]
        if not validators:
            _logger.info("The order of the teacher's classes is not checked: that needs validation images.")
            return
        is_resumed = bool(start.epoch or start.update)
        has_same_size = (start.options or {}).get('kd_teacher_img_size') == self.img_size
        is_known = on_primary(self.ranks, lambda: self._is_known)
        if is_resumed and has_same_size and (is_known or self.validator is None):
            return

        def end_if_asked() -> None:
            if stop:
                raise Interrupted(stop.signum)

        for validator in validators:
            validator.on_batch = end_if_asked if validator.in_step else None
        result = evaluate_teacher(self.task, validators, self.names)
        self.train_validator = None  # the processes of its loader end
        self.record(result)

    def record(self, result: TeacherResult) -> None:
        """Record the accuracy of the teacher. Report another order of its classes, or a teacher that guesses.

        Raises:
            TrainingError: If the classes seem to be in another order, the student learns from the teacher alone, and
                neither a class map nor names tell the order.
        """
        if self.validator is not None:
            self.top1 = None if result.top1 is None else round(result.top1, 3)
            if self.ranks.is_primary:
                record_results(self.folder, teacher_top1=self.top1)
        if result.order is not None:
            self._report_order(result.order)
        elif result.top1 is not None and not self._is_guess(result.top1):
            self._is_settled = True
        elif result.top1 is not None and self._learns_from_it_alone:
            self._warn_of_guessing(
                result.top1, 'training' if self.validator is None else 'validation',
                'The student learns nothing but these answers. Choose another teacher, --kd-class-map,'
                ' --kd-teacher-img-size, or --kd-teacher-mean and --kd-teacher-std. Or set --dearkd-labels dataset,'
                ' which also teaches the classes of the images.')

    def after_epoch(self, epoch: int, losses: Mapping[str, float]) -> None:
        """Warn after the first epoch of a teacher that guesses the labels of the training images.

        Args:
            epoch: The epoch, counted from 0.
            losses: Mean training losses.
        """
        agreement = losses.get('teacher_agreement')
        if epoch or agreement is None or self._is_settled or not self._is_guess(100 * agreement):
            return
        cause = (
            'it has hardly learned (train it for more epochs)' if _has_names(self._teacher, self.names) else
            'its classes are others or in another order (--kd-class-map FILE)')
        self._warn_of_guessing(
            100 * agreement, 'training',
            f'Possible causes: {cause}, or it was trained with another normalisation (--kd-teacher-mean,'
            ' --kd-teacher-std) or image size (--kd-teacher-img-size).')

    @property
    def _teacher(self) -> Teacher:
        return _as_model(self.task).teacher

    @property
    def _learns_from_it_alone(self) -> bool:
        return getattr(self.task, 'labels', '') == 'teacher'

    def _is_guess(self, correct: float) -> bool:
        return correct < MIN_TEACHER * 100 / count_outputs(self.task)

    def _warn_of_guessing(self, correct: float, images: str, remedy: str) -> None:
        """Warn, once, of a teacher that knows the images hardly better than by guessing.

        Args:
            correct: Right answers of the teacher in percent.
            images: Kind of the images.
            remedy: What to do, in sentences.
        """
        self._is_settled = True
        if self.ranks.is_primary:
            _logger.warning(
                f'The teacher predicts the label of {correct:.1f} % of the {images} images. Guessing gives'
                f' {100 / count_outputs(self.task):.1f} %. {remedy}')

    def _report_order(self, order: ClassOrder) -> None:
        """Write the probable order into a class map. Name some of its classes in a warning or an error.

        Raises:
            TrainingError: See `record`.
        """
        self._is_settled = True
        teacher, path = self._teacher, os.path.join(self.folder, 'kd_class_map.txt')
        if self.class_map and os.path.realpath(self.class_map) == os.path.realpath(path):  # the user's by now
            path = os.path.join(self.folder, 'kd_class_map-2.txt')
        classes = order.answers if teacher.class_map is None else teacher.class_map[order.answers].tolist()
        names = list(self.names) or [''] * len(classes)
        if self.ranks.is_primary:
            lines = [f'{index} {name}'.rstrip() for index, name in zip(classes, names)]
            write_text(Path(path), '\n'.join(lines) + '\n')
        examples = ', '.join(
            f'class {names[label] or label!r} looks like its class {classes[label]}' for label in order.moved[:3])
        text = (
            f"The teacher's classes seem to be in another order: {examples}{', …' if len(order.moved) > 3 else ''}."
            f' In that order it finds the label of {100 * order.agreement:.1f} % of the images, now of'
            f' {100 * order.agreement_now:.1f} %. Check {path}, which has the order that fits best, and train again'
            f' with --kd-class-map {shlex.quote(path)}.')
        if self._learns_from_it_alone and teacher.class_map is None and not _has_names(teacher, self.names):
            raise TrainingError(
                f'{text} The student would learn nothing but these answers. If the present order is right, set a'
                f' --kd-class-map FILE with the lines 0 to {len(classes) - 1}.')
        if self.ranks.is_primary:
            _logger.warning(text)


def _as_model(task: Any) -> TimmTeacher:
    """Return the teacher of a task as a model of logits."""
    return task.teacher if isinstance(task.teacher, TimmTeacher) else TimmTeacher(task.teacher).eval()


def _has_names(teacher: Teacher, names: Sequence[str]) -> bool:
    """Return whether the teacher has the names of the student's classes, so that its classes are matched by them."""
    return bool(names) and set(names) <= set(saved_names(teacher.model))


def evaluate_teacher(task: Any, validators: Sequence[Validator], names: Sequence[str] = ()) -> TeacherResult:
    """Evaluate the teacher on images as the student's task feeds it. All processes must call this together.

    Args:
        task: A task with a teacher.
        validators: The first tells the accuracy. The others add answers, for the order of classes without names.
        names: Names of the student's classes, if they are known.
    """
    model = _as_model(task)
    teacher, first = model.teacher, validators[0]
    num_classes = count_outputs(task)
    uses_classes = getattr(task, 'uses_classes', True)
    known = saved_names(teacher.model)
    has_other_names = bool(known and names) and known != list(names)
    if teacher.num_classes not in (None, num_classes) or (has_other_names and not uses_classes):
        return TeacherResult(None)
    if not 2 <= num_classes <= MAX_CLASSES:
        if num_classes > MAX_CLASSES:
            _logger.info(f"The order of the teacher's classes is not checked: there are over {MAX_CLASSES}.")
        return TeacherResult(first(model, 'Teacher')['top1'])
    counts = torch.zeros((2, num_classes, num_classes), dtype=torch.long, device=first.precision.device)
    top1 = first(model, 'Teacher', partial(count_answers, counts))['top1']
    for validator in () if _has_names(teacher, names) else validators[1:]:
        validator(model, 'Teacher, training images', partial(count_answers, counts))
    if first.ranks.distributed:
        dist.all_reduce(counts)
    order = find_order(counts.cpu().numpy())
    return TeacherResult(top1, order) if uses_classes or order is None else TeacherResult(None)
