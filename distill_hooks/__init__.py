"""Distillation of CNNs into vision transformers, as timm training tasks."""
from .aligner import Aligner
from .capture import FeatureCapture, find_module
from .checkpoint import load_model, resolve_model
from .losses import dearkd_loss, hard_label_loss, hidden_loss, soft_label_loss
from .schedule import StageWeights, TwoStageSchedule
from .task import DearKDTask, LabelStore, has_content_tokens
from .teacher import Teacher, load_class_map, resolve_layer
from .timm_tasks import FeatureTask, LogitTask, TimmTeacher, TokenTask

__all__ = [
    'Aligner',
    'DearKDTask',
    'FeatureCapture',
    'FeatureTask',
    'LabelStore',
    'LogitTask',
    'StageWeights',
    'Teacher',
    'TimmTeacher',
    'TokenTask',
    'TwoStageSchedule',
    'dearkd_loss',
    'find_module',
    'hard_label_loss',
    'has_content_tokens',
    'hidden_loss',
    'load_class_map',
    'load_model',
    'resolve_layer',
    'resolve_model',
    'soft_label_loss',
]
