"""The frozen CNN that teaches."""
import difflib
import logging
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    get_pretrained_cfg,
    is_model,
    list_models,
    load_checkpoint,
    load_state_dict,
    parse_model_name,
)

from .capture import FeatureCapture, find_module

__all__ = ['FeatureSpec', 'Teacher', 'create_teacher', 'resolve_layer']

_logger = logging.getLogger(__name__)

# Containers of stages. timm's feature_info may begin with a stem, of stride 2 at most, that is in none of them
_STAGES = re.compile(r'^(blocks|stages?|layers?[1-9]?|level[1-9]|s[1-9]|features\.(?!norm0|conv1))')


class FeatureSpec(NamedTuple):
    """What a teacher layer gives for one image size."""
    layer: str
    num_chs: int
    size: Tuple[int, int]
    non_negative: bool


def resolve_layer(model: nn.Module, layer: Optional[str] = None, max_stride: Optional[float] = None) -> str:
    """Module name of a teacher layer.

    Args:
        model: The teacher; stages come from timm's `feature_info`, the stem not counted.
        layer: A stage number, counted from 1, or a module name. None takes the stage with the largest stride that is
            not above `max_stride`, else the first one (our choice; the paper says "early intermediate").
        max_stride: See `layer`, in pixels.

    Raises:
        ValueError: No such stage or module.
    """
    if layer and not layer.isdigit():
        find_module(model, layer)
        return layer
    name = type(model).__name__
    modules = {name for name, _ in model.named_modules() if name}
    stages = [info for info in getattr(model, 'feature_info', None) or [] if info['module'] in modules]
    if stages and stages[0]['reduction'] <= 2 and not _STAGES.match(stages[0]['module']):
        stages = stages[1:]
    if not stages:
        children = ', '.join(child for child, _ in model.named_children())
        raise ValueError(
            f'Teacher {name} does not list its stages (timm feature_info). Name a module instead, as in'
            f' --dearkd-hooks 4:MODULE. Its children: {children}.')
    if layer is None:
        within = [stage for stage in stages if max_stride is None or stage['reduction'] <= max_stride]
        return max(within, key=lambda stage: stage['reduction'])['module'] if within else stages[0]['module']
    if not 1 <= int(layer) <= len(stages):
        listed = ', '.join(f'{i} ({stage["module"]})' for i, stage in enumerate(stages, 1))
        raise ValueError(f'Teacher {name} has no stage {layer}. Its stages: {listed}.')
    return stages[int(layer) - 1]['module']


def _checkpoint_shapes(name: str, state_dict: Dict[str, torch.Tensor]) -> Dict[str, int]:
    """Class and channel count of a checkpoint of a timm architecture, as far as its weights tell."""
    cfg = get_pretrained_cfg(name)
    shapes = {}
    for key, field, dim in (('num_classes', 'classifier', 0), ('in_chans', 'first_conv', 1)):
        module = getattr(cfg, field, None)
        weight = state_dict.get(f'{module}.weight') if isinstance(module, str) else None
        if weight is not None and weight.ndim > dim:
            shapes[key] = weight.shape[dim]
    return shapes


def create_teacher(
        name: str,
        checkpoint: Optional[str] = None,
        device: Optional[torch.device] = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a timm model with trained weights, with the class count that they have.

    Args:
        name: timm model name, `hf-hub:` and `local-dir:` included. Without a checkpoint, its pretrained weights load.
        checkpoint: Weights of that architecture, as .safetensors or a (training) checkpoint.
        device: Where to put it.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: An unknown name, no weights to be had, or a checkpoint that does not fit.
    """
    source, architecture = parse_model_name(name)
    if source is None and not is_model(architecture.split('.')[0]):
        near = ', '.join(difflib.get_close_matches(architecture, list_models(), n=4, cutoff=0.4)) or 'none'
        raise ValueError(f'Unknown teacher {name!r}. The nearest timm names: {near}.')
    if not checkpoint:
        try:
            model = timm.create_model(name, pretrained=True, **kwargs)
        except Exception as e:  # whatever the download raises, the remedy is the same
            reason = (str(e).splitlines() or [''])[0]
            raise ValueError(
                f'Could not get weights of teacher {name!r} ({type(e).__name__}: {reason}).'
                ' Pass a trained checkpoint with --kd-teacher-checkpoint.') from e
        return model.to(device)
    try:
        state_dict = load_state_dict(checkpoint)
    except FileNotFoundError:
        raise FileNotFoundError(f'No teacher checkpoint at {checkpoint!r}.') from None
    except Exception as e:
        raise ValueError(f'Teacher checkpoint {checkpoint!r} can not be read ({type(e).__name__}: {e}).') from e
    model = timm.create_model(name, **{**_checkpoint_shapes(name, state_dict), **kwargs})
    try:
        load_checkpoint(model, checkpoint)
    except (RuntimeError, KeyError) as e:
        lines = str(e).splitlines()
        reason = ' '.join(line.strip() for line in lines[1:2] or lines)[:200]
        raise ValueError(
            f'Teacher checkpoint {checkpoint!r} does not fit architecture {name!r}: {reason}'
            ' Name the architecture that it was trained with.') from e
    return model.to(device)


def _per_channel(values: Sequence[float], in_chans: int) -> torch.Tensor:
    """Normalisation values for `in_chans` channels; timm averages them where the counts differ."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor if len(tensor) == in_chans else tensor.mean().expand(in_chans)


class Teacher(nn.Module):
    """A frozen classifier that gives logits and feature maps in one forward without gradients.

    It takes the student's input, normalised for the student, and renormalises it with a scale and a shift that are
    worked out once (or not at all, where they would change nothing). Grey input is repeated for a teacher of three
    channels. It stays in eval mode whatever `train()` says.

    Args:
        model: The classifier, a timm model or any module that gives logits.
        layers: Module names whose outputs `forward` returns beside the logits.
        in_chans: Channels of the student's input.
        mean: The student's normalisation; None means the teacher's own.
        std: See `mean`.
        img_size: Side length to resize the input to, bilinearly; None leaves it at the student's size.

    Raises:
        ValueError: An unknown layer, or a colour student with a teacher of another channel count.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
            self,
            model: nn.Module,
            layers: Sequence[str] = (),
            in_chans: int = 3,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            img_size: Optional[int] = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.img_size = img_size
        self.num_classes: Optional[int] = getattr(model, 'num_classes', None)
        self.layers = list(layers)
        self._channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'

        cfg = getattr(model, 'pretrained_cfg', None) or {}
        own_chans = getattr(model, 'in_chans', in_chans)
        if in_chans != own_chans and in_chans != 1:
            raise ValueError(
                f'The teacher takes {own_chans} channel(s), the student {in_chans}.'
                f' Set --in-chans {own_chans}, or choose a teacher trained on {in_chans} channels.')
        own_mean = _per_channel(cfg.get('mean') or IMAGENET_DEFAULT_MEAN, own_chans)
        own_std = _per_channel(cfg.get('std') or IMAGENET_DEFAULT_STD, own_chans)
        student_mean = own_mean if mean is None else _per_channel(mean, in_chans)
        student_std = own_std if std is None else _per_channel(std, in_chans)
        scale, shift = student_std / own_std, (student_mean - own_mean) / own_std
        self._in_chans = own_chans
        self._renormalise = not (torch.allclose(scale, torch.ones_like(scale)) and bool((shift.abs() < 1e-6).all()))
        self.register_buffer('scale', scale.float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer('shift', shift.float().view(1, -1, 1, 1), persistent=False)

        self.capture = FeatureCapture(model, self.layers)
        self._run = self._forward
        self.eval()

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode, so that no BatchNorm statistic moves."""
        return super().train(False)

    def compile(self, *args, **kwargs) -> None:
        """Compile the forward, hooks included. Takes the arguments of `torch.compile`."""
        self._run = torch.compile(self._forward, *args, **kwargs)

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        """Student input (B, C, H, W) as the teacher wants it: its channels, its normalisation, its size."""
        if self._renormalise:
            x = x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
        elif x.shape[1] != self._in_chans:
            x = x.expand(-1, self._in_chans, -1, -1)
        if self.img_size is not None and tuple(x.shape[-2:]) != (self.img_size, self.img_size):
            x = F.interpolate(x, size=(self.img_size, self.img_size), mode='bilinear', antialias=True)
        return x

    def _forward(self, x: torch.Tensor, with_features: bool) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        self.capture.enabled = with_features
        logits = self.model(self.prepare_input(x))
        features = self.capture.take() if with_features else []
        if self._channels_last:
            features = [f.permute(0, 3, 1, 2) if f.ndim == 4 else f for f in features]
        return logits, features

    @torch.no_grad()
    def forward(self, x: torch.Tensor, with_features: bool = True) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Logits (B, classes) and, if asked for, the maps (B, C, h, w) of `layers`, for the student's input."""
        return self._run(x, with_features)

    @torch.no_grad()
    def probe(self, input_size: Tuple[int, int, int]) -> List[FeatureSpec]:
        """Shape and sign of each layer's feature map, from one forward of noise.

        Args:
            input_size: The student's (C, H, W).

        Raises:
            ValueError: A layer whose output is not a 4-D map.
        """
        generator = torch.Generator().manual_seed(0)
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        noise = torch.randn(1, *input_size, generator=generator).to(self.scale.device, dtype)
        _, features = self._forward(noise, True)
        specs = []
        for layer, feature in zip(self.layers, features):
            if not isinstance(feature, torch.Tensor) or feature.ndim != 4:
                shape = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
                raise ValueError(
                    f'Teacher layer {layer!r} of {type(self.model).__name__} gives {shape}, not a 4-D feature map'
                    ' (B, C, H, W). Name a convolutional layer with --dearkd-hooks BLOCK:LAYER, take a CNN as the'
                    ' teacher, or train without the hidden loss (--dearkd-beta 0).')
            specs.append(FeatureSpec(
                layer, feature.shape[1], (feature.shape[2], feature.shape[3]), bool((feature >= 0).all())))
        return specs


TeacherLike = Union[str, nn.Module, Teacher]
