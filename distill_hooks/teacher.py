"""The frozen CNN that teaches."""
import hashlib
import os
import re
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import get_model_input_config

from .capture import FeatureCapture, find_module
from .checkpoint import load_model, resolve_teacher, training_args
from .errors import first_line

__all__ = [
    'FeatureSpec', 'StudentInput', 'Teacher', 'build_teacher', 'create_teacher', 'load_class_map', 'resolve_layer',
    'resolve_teacher', 'training_args',
]

# Containers of stages. timm's feature_info may begin with a stem, of stride 2 at most, that is in none of them
_STAGES = re.compile(r'^(blocks|stages?|layers?[1-9]?|level[1-9]|s[1-9]|features\.(?!norm0|conv1))')


class FeatureSpec(NamedTuple):
    """What a teacher layer gives for one image size."""
    layer: str
    num_chs: int
    size: Tuple[int, int]
    non_negative: bool


class StudentInput(NamedTuple):
    """Images that a student gets: their (C, H, W) and the normalisation per channel."""
    size: Tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(
            cls,
            student: nn.Module,
            size: Optional[Tuple[int, int, int]] = None,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
    ) -> 'StudentInput':
        """Take what is not given from the student's `pretrained_cfg`."""
        cfg: Any = getattr(student, 'pretrained_cfg', None) or {}
        channels, height, width = size or get_model_input_config(student)['input_size']
        return cls(
            (channels, height, width),
            mean if mean is not None else cfg.get('mean', IMAGENET_DEFAULT_MEAN),
            std if std is not None else cfg.get('std', IMAGENET_DEFAULT_STD))


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


def load_class_map(path: str) -> List[int]:
    """Read a class map: one teacher class index per line, in the order of the student's classes.

    What follows the index on its line is taken for a class name and ignored, as are empty lines and lines that start
    with #.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line without an index, or none at all.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'No class map at {path!r}.')
    class_map = []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or words[0].startswith('#'):
                continue
            if not words[0].isdecimal():
                raise ValueError(
                    f'Line {number} of class map {path!r} begins with {words[0][:40]!r}, not with a teacher class.'
                    " Write one index, counted from 0, per line, in the order of the student's classes.")
            class_map.append(int(words[0]))
    if not class_map:
        raise ValueError(f'Class map {path!r} is empty. Write one teacher class index per line.')
    return class_map


def create_teacher(
        name: str,
        checkpoint: Optional[str] = None,
        device: Optional[torch.device] = None,
        **kwargs: Any,
) -> nn.Module:
    """Load a timm model that can teach. See `load_model`, which this is another name for."""
    return load_model(name, checkpoint, device, **kwargs)


def _per_channel(values: Sequence[float], in_chans: int) -> torch.Tensor:
    """Normalisation values for `in_chans` channels; timm averages them where the counts differ."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor if len(tensor) == in_chans else tensor.mean().expand(in_chans)


def input_normalisation(model: nn.Module, in_chans: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation per channel (in_chans,) that a model wants its input normalised with."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    mean, std = cfg.get('mean') or IMAGENET_DEFAULT_MEAN, cfg.get('std') or IMAGENET_DEFAULT_STD
    return _per_channel(mean, in_chans), _per_channel(std, in_chans)


@torch.no_grad()
def weights_fingerprint(model: nn.Module, more: str = '') -> str:
    """A hash of some values of every tensor of a model, and of what more is to be told apart."""
    tensors = [t.flatten()[:16].double() for t in model.state_dict().values()]
    values = torch.cat(tensors).cpu().numpy().tobytes()
    return hashlib.sha256(values + more.encode()).hexdigest()[:16]


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
        img_size: Side length, or (H, W), to resize the input to, bilinearly; None leaves it at the student's size.
        class_map: Teacher class per student class, where the teacher knows more classes; see `load_class_map`. Of
            student classes that share one, the first is the hard label.

    Raises:
        ValueError: An unknown layer, a colour student with a teacher of another channel count, or a class map beyond
            the model's `num_classes` (if it has that attribute).
    """

    scale: torch.Tensor
    shift: torch.Tensor
    class_map: Optional[torch.Tensor]

    def __init__(
            self,
            model: nn.Module,
            layers: Sequence[str] = (),
            in_chans: int = 3,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            class_map: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.img_size = None if img_size is None else to_2tuple(img_size)
        self.num_classes: Optional[int] = getattr(model, 'num_classes', None)
        self.register_buffer('class_map', None, persistent=False)
        if class_map is not None:
            self._set_class_map(class_map)
        self.layers = list(layers)
        self._channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'

        own_chans = getattr(model, 'in_chans', in_chans)
        if in_chans != own_chans and in_chans != 1:
            raise ValueError(
                f'The teacher takes {own_chans} channel(s), the student {in_chans}.'
                f' Set --in-chans {own_chans}, or choose a teacher trained on {in_chans} channels.')
        own_mean, own_std = input_normalisation(model, own_chans)
        student_mean = own_mean if mean is None else _per_channel(mean, in_chans)
        student_std = own_std if std is None else _per_channel(std, in_chans)
        scale, shift = student_std / own_std, (student_mean - own_mean) / own_std
        self._in_chans = own_chans
        self._renormalise = not (torch.allclose(scale, torch.ones_like(scale)) and bool((shift.abs() < 1e-6).all()))
        self.register_buffer('scale', scale.float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer('shift', shift.float().view(1, -1, 1, 1), persistent=False)

        self.capture = FeatureCapture(model, self.layers)
        self._run = self._forward
        self._run_pooled = self._pooled
        self.eval()

    def _set_class_map(self, class_map: Sequence[int]) -> None:
        count = self.num_classes
        outside = [index for index in class_map if index < 0 or (count is not None and index >= count)]
        if outside:
            raise ValueError(
                f'The class map names teacher class {outside[0]}, but the teacher has'
                f' {"no negative ones" if count is None else f"classes 0 to {count - 1}"}.'
                ' Count its classes from 0 in --kd-class-map.')
        self.class_map = torch.tensor(class_map, dtype=torch.long)
        self.num_classes = len(class_map)

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode, so that no BatchNorm statistic moves."""
        return super().train(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward, hooks included. Takes the arguments of `torch.compile`."""
        self._run = torch.compile(self._forward, *args, **kwargs)
        self._run_pooled = torch.compile(self._pooled, *args, **kwargs)

    def store_weights(self, dtype: torch.dtype) -> None:
        """Keep the weights of convolutions and linear layers in `dtype`, for calls under autocast of that type.

        Autocast casts the weights of a frozen model anew in every forward. The results are the same.
        """
        for module in self.model.modules():
            if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward):
                module.to(dtype)

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Tells teachers apart: a hash of some values of every tensor, the layers and the class map."""
        class_map = None if self.class_map is None else self.class_map.tolist()
        return weights_fingerprint(self.model, repr((self.layers, class_map)))

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        """Student input (B, C, H, W) as the teacher wants it: its channels, its normalisation, its size."""
        if self._renormalise:
            x = x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
        elif x.shape[1] != self._in_chans:
            x = x.expand(-1, self._in_chans, -1, -1)
        if self.img_size is not None and tuple(x.shape[-2:]) != self.img_size:
            # in float32, for CPUs can't do it in half precision
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = F.interpolate(wide, size=self.img_size, mode='bilinear', antialias=True).to(x.dtype)
        return x

    def _forward(self, x: torch.Tensor, with_features: bool) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        self.capture.enabled = with_features
        logits = self.model(self.prepare_input(x))
        if self.class_map is not None:
            logits = logits.index_select(1, self.class_map)
        features = self.capture.take() if with_features else []
        if self._channels_last:
            features = [f.permute(0, 3, 1, 2) if f.ndim == 4 else f for f in features]
        return logits, features

    @torch.no_grad()
    def forward(self, x: torch.Tensor, with_features: bool = True) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Logits (B, classes) and, if asked for, the maps (B, C, h, w) of `layers`, for the student's input."""
        return self._run(x, with_features)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        self.capture.enabled = False
        return model.forward_head(model.forward_features(self.prepare_input(x)), pre_logits=True)

    @torch.no_grad()
    def pooled_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D) that the model's classifier takes, for the student's input."""
        return self._run_pooled(x)

    def _noise(self, input_size: Tuple[int, int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        return torch.randn(1, *input_size, generator=generator).to(self.scale.device, dtype)

    @torch.no_grad()
    def check_input(self, input_size: Tuple[int, int, int], pooled: bool = False) -> None:
        """Run the model once on noise, so that an image size that it does not take is found before training.

        Args:
            input_size: The student's (C, H, W).
            pooled: Look at `pooled_features`, too.

        Raises:
            ValueError: If the model does not take the size, or has no pooled features. The message names the remedy.
        """
        name = type(self.model).__name__
        noise = self._noise(input_size)
        self.capture.enabled = False
        try:
            self.model(self.prepare_input(noise))
        except Exception as e:  # models raise what they like, assertions too
            height, width = self.img_size or input_size[1:]
            is_timms = hasattr(self.model, 'pretrained_cfg')
            own = get_model_input_config(self.model)['input_size'][1:] if is_timms else (height, width)
            remedy = (
                f'--kd-teacher-img-size {own[-1]} resizes them to the size that it was made for.'
                if tuple(own) != (height, width) else
                'Choose another teacher, or a size that it takes (--kd-teacher-img-size).')
            raise ValueError(
                f'Teacher {name} does not take images of {height}x{width} pixels'
                f' ({first_line(e)[:200].rstrip(".")}). {remedy}') from e
        if pooled:
            try:
                self._pooled(noise)
            except Exception as e:
                raise ValueError(
                    f'Teacher {name} gives no pooled features ({first_line(e)[:200].rstrip(".")}). Choose another'
                    ' teacher, or --kd-distill-type logit.') from e

    @torch.no_grad()
    def probe(self, input_size: Tuple[int, int, int]) -> List[FeatureSpec]:
        """Shape and sign of each layer's feature map, from one forward of noise.

        Args:
            input_size: The student's (C, H, W).

        Raises:
            ValueError: A layer whose output is not a 4-D map, or has its channels last where none would expect it.
        """
        _, features = self._forward(self._noise(input_size), True)
        specs = []
        for layer, feature in zip(self.layers, features):
            if not isinstance(feature, torch.Tensor) or feature.ndim != 4:
                shape = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
                raise ValueError(
                    f'Teacher layer {layer!r} of {type(self.model).__name__} gives {shape}, not a 4-D feature map'
                    ' (B, C, H, W). Name a convolutional layer with --dearkd-hooks BLOCK:LAYER, take a CNN as the'
                    ' teacher, or train without the hidden loss (--dearkd-beta 0).')
            infos = getattr(self.model, 'feature_info', None) or ()
            num_chs = next((info['num_chs'] for info in infos if info['module'] == layer), None)
            if num_chs == feature.shape[3] and num_chs != feature.shape[1]:
                raise ValueError(
                    f'Teacher layer {layer!r} of {type(self.model).__name__} has its channels last, without saying so'
                    ' (output_fmt). Take another CNN as the teacher, or train without the hidden loss (--dearkd-beta'
                    ' 0).')
            specs.append(FeatureSpec(
                layer, feature.shape[1], (feature.shape[2], feature.shape[3]), bool((feature >= 0).all())))
        return specs


TeacherLike = Union[str, nn.Module, Teacher]


def _check_classes(teacher: Teacher, num_classes: int, class_map: Optional[Sequence[int]]) -> None:
    if class_map is not None and len(class_map) != num_classes:
        raise ValueError(
            f'The class map has {len(class_map)} entries, the student {num_classes} classes.'
            ' Give one teacher class per student class in --kd-class-map.')
    if teacher.num_classes is not None and teacher.num_classes != num_classes:
        raise ValueError(
            f'The teacher knows {teacher.num_classes} classes, the student {num_classes}.'
            " Say which of the teacher's classes are the student's (--kd-class-map), take a teacher trained on the"
            f' same ones (--kd-teacher-checkpoint), or set --num-classes {teacher.num_classes}.')


def build_teacher(
        teacher: nn.Module,
        images: StudentInput,
        num_classes: Optional[int],
        layers: Sequence[Optional[str]] = (),
        img_size: Optional[int] = None,
        class_map: Optional[Sequence[int]] = None,
        pooled: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> Tuple[Teacher, str]:
    """Make a model the `Teacher` of a student, and check that it can teach it.

    Args:
        teacher: The model, which is frozen, moved and converted in place, or a ready `Teacher`.
        images: What the student gets.
        num_classes: The student's; None if the teacher's classes do not matter.
        layers: Module names, see `Teacher`. Of a ready one, only their number counts.
        img_size: See `Teacher`.
        class_map: See `Teacher`.
        pooled: Whether its pooled features will be asked for.
        device: Where to put it.
        dtype: What to convert its weights to.

    Returns:
        The teacher, and its fingerprint, which does not depend on `dtype`.

    Raises:
        ValueError: If channels, classes, layers or image size do not fit. The message names the remedy.
    """
    if not isinstance(teacher, Teacher):
        names = [layer for layer in layers if layer is not None]
        teacher = Teacher(teacher, names, images.size[0], images.mean, images.std, img_size, class_map)
    elif class_map is not None:
        raise ValueError('A ready Teacher has its own classes. Give the map to it instead: Teacher(class_map=...).')
    elif layers and len(teacher.layers) != len(layers):
        raise ValueError(
            f'The Teacher gives {len(teacher.layers)} layer(s) for {len(layers)} hook(s). Pass as many of each.')
    if num_classes is not None:
        _check_classes(teacher, num_classes, class_map)
    fingerprint = teacher.fingerprint()
    teacher.model.to(dtype)
    teacher.to(device)
    teacher.check_input(images.size, pooled)
    return teacher, fingerprint
