"""timm's own distillation tasks with a `Teacher`."""
from typing import Any, Dict, Optional, Union

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
from .teacher import Teacher, require_same_teacher


class TimmTeacher(DistillationTeacher):
    """A `Teacher` with the interface of timm's `DistillationTeacher`.

    timm's tasks accept it unchanged. The `Teacher` converts normalisation, channels, image size and classes. The latest
    `logits` are kept.

    Args:
        teacher: The teacher to wrap.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.model)
        self.teacher = teacher
        self.logits: Optional[torch.Tensor] = None

    def compile(
            self, *args: Any, compile_model: bool = True, compile_features: bool = False, **kwargs: Any,
    ) -> 'TimmTeacher':
        """Compile the teacher. Both switches are ignored: only what is called compiles."""
        self.teacher.compile(*args, **kwargs)
        return self

    def normalize_input(self, input: torch.Tensor, student_mean: Any = None, student_std: Any = None) -> torch.Tensor:
        """Return the student's input unchanged, because the `Teacher` renormalises it."""
        return input

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Return logits (B, classes) or pooled features (B, D) for the student's input."""
        if return_features:
            return self.teacher.pooled_features(input)
        self.logits, _ = self.teacher(input, with_features=False)
        return self.logits


class TaughtTask(TrainingTask):
    """Base of timm's distillation tasks with a `Teacher`.

    Args:
        student_model: The model to train.
        teacher_model: A `Teacher` (see `Teacher.for_student`), or a name or module to create one from. The module is
            frozen, moved to `device` and converted to `dtype` in place.
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
            teacher_model: Union[str, nn.Module],
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            **kwargs: Any,
    ) -> None:
        student = unwrap_model(student_model)
        if not isinstance(teacher_model, Teacher):
            teacher_model = Teacher.for_student(student, teacher_model)
        fingerprint, _ = teacher_model.prepare(
            student, self.uses_classes, pooled=self.uses_pooled, device=device, dtype=dtype)
        init: Any = super().__init__  # of timm's task, not of TrainingTask
        init(student_model, TimmTeacher(teacher_model), device=device, dtype=dtype, **kwargs)
        self._fingerprint = fingerprint

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the output of timm's task, and 'teacher_agreement' if `uses_classes`.

        The agreement is the share of the images whose label (the larger one, after Mixup) is the teacher's answer.
        """
        result = super().forward(input, target)
        if self.uses_classes:
            teacher: Any = self.teacher  # timm declares the base class of TimmTeacher
            result['teacher_agreement'] = agreement(teacher.logits, target)
        return result

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return the state of timm's task and the teacher's fingerprint."""
        return {**super().get_task_state(module, ema), 'teacher': self._fingerprint}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Load the state from `get_task_state`.

        Raises:
            ValueError: If the state is of another teacher, class map or kind of distillation.
        """
        saved = (state or {}).get('teacher', self._fingerprint)
        require_same_teacher(saved, self._fingerprint, 'kind of distillation', '--kd-distill-type')
        super().load_task_state(state, strict, module, ema)


class LogitTask(TaughtTask, LogitDistillationTask):
    """timm's `LogitDistillationTask` with a `Teacher`. See `TaughtTask`."""


class FeatureTask(TaughtTask, FeatureDistillationTask):
    """timm's `FeatureDistillationTask` with a `Teacher`. See `TaughtTask`."""

    uses_classes = False
    uses_pooled = True


class TokenTask(TaughtTask, TokenDistillationTask):
    """timm's `TokenDistillationTask` with a `Teacher`. See `TaughtTask`."""
