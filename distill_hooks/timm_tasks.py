"""timm's own distillation tasks with a `Teacher`."""
from typing import Any, Dict, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm.task import (
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import unwrap_model

from .answers import agreement
from .teacher import StudentInput, Teacher, TeacherLike, build_teacher, create_teacher

__all__ = ['FeatureTask', 'LogitTask', 'TimmTeacher', 'TokenTask']


class TimmTeacher(DistillationTeacher):
    """A `Teacher` with the interface of timm's `DistillationTeacher`.

    timm's tasks take it as it is, and leave normalisation, channels, image size and classes to the `Teacher`. The
    latest `logits` are kept.

    Args:
        teacher: The teacher.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.model)
        self.teacher = teacher
        self.logits: Optional[torch.Tensor] = None

    def compile(
            self, *args: Any, compile_model: bool = True, compile_features: bool = False, **kwargs: Any,
    ) -> 'TimmTeacher':
        """Compile the teacher. What is not called is not compiled, so timm's two switches change nothing."""
        self.teacher.compile(*args, **kwargs)
        return self

    def normalize_input(self, input: torch.Tensor, student_mean: Any = None, student_std: Any = None) -> torch.Tensor:
        """Return the student's input as it is."""
        return input

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Logits (B, classes) or pooled features (B, D) for the student's input."""
        if return_features:
            return self.teacher.pooled_features(input)
        self.logits, _ = self.teacher(input, with_features=False)
        return self.logits


class TaughtTask(TrainingTask):
    """What timm's distillation tasks have in common here: the `Teacher`, and its fingerprint in the checkpoint.

    Args:
        student_model: The model to train.
        teacher_model: A timm model name, a module (it is frozen and brought to `device` and `dtype` in place), or a
            `Teacher`, which keeps its own normalisation, size and classes.
        teacher_checkpoint: Weights for a teacher given by name.
        teacher_img_size: Side length at which the teacher sees the images; None is the student's.
        teacher_class_map: Teacher class per student class; see `load_class_map`.
        mean: Normalisation of the input; None is the student's `pretrained_cfg`.
        std: See `mean`.
        input_size: The student's (C, H, W); None is what the model says.
        device: Device of the task.
        dtype: Dtype of the teacher and of the task's own layers.
        **kwargs: Arguments of timm's task.

    Raises:
        ValueError: If channels, class counts or image size do not fit. The message names the remedy.
    """

    uses_classes = True
    uses_pooled = False

    def __init__(
            self,
            student_model: nn.Module,
            teacher_model: TeacherLike,
            teacher_checkpoint: Optional[str] = None,
            teacher_img_size: Optional[int] = None,
            teacher_class_map: Optional[Sequence[int]] = None,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            input_size: Optional[Tuple[int, int, int]] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            **kwargs: Any,
    ) -> None:
        student: Any = unwrap_model(student_model)
        if isinstance(teacher_model, str):
            teacher_model = create_teacher(teacher_model, teacher_checkpoint)
        teacher, fingerprint = build_teacher(
            teacher_model,
            StudentInput.of(student, input_size, mean, std),
            student.num_classes if self.uses_classes else None,
            img_size=teacher_img_size,
            class_map=teacher_class_map,
            pooled=self.uses_pooled,
            device=device,
            dtype=dtype,
        )
        init: Any = super().__init__  # of timm's task, not of TrainingTask
        init(student_model, TimmTeacher(teacher), device=device, dtype=dtype, **kwargs)
        self._fingerprint = fingerprint

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return what timm's task does and, where the teacher's classes matter, 'teacher_agreement'.

        That is the share of the images whose label (the larger one, after Mixup) is the teacher's answer.
        """
        result = super().forward(input, target)
        if self.uses_classes:
            result['teacher_agreement'] = agreement(cast(Any, self.teacher).logits, target)
        return result

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """State of timm's task, and the teacher's fingerprint."""
        return {**super().get_task_state(module, ema), 'teacher': self._fingerprint}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Restore `get_task_state`.

        Raises:
            ValueError: If the state is of another teacher, class map or kind of distillation.
        """
        if (state or {}).get('teacher', self._fingerprint) != self._fingerprint:
            raise ValueError(
                'The checkpoint was trained with another teacher, class map or kind of distillation. Resume with the'
                ' same --kd-model-name, --kd-teacher-checkpoint, --kd-class-map and --kd-distill-type, or start from'
                ' its weights with --initial-checkpoint.')
        super().load_task_state(state, strict, module, ema)


class LogitTask(TaughtTask, LogitDistillationTask):
    """timm's `LogitDistillationTask` with a `Teacher`. See `TaughtTask`."""


class FeatureTask(TaughtTask, FeatureDistillationTask):
    """timm's `FeatureDistillationTask` with a `Teacher`, whose classes do not matter. See `TaughtTask`."""

    uses_classes = False
    uses_pooled = True


class TokenTask(TaughtTask, TokenDistillationTask):
    """timm's `TokenDistillationTask` with a `Teacher`. See `TaughtTask`."""
