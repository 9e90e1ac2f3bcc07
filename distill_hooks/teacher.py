"""The frozen teacher: logits and feature maps for the student's input."""
import hashlib
import os
import re
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from timm.utils import unwrap_model

from .capture import FeatureCapture, find_module
from .checkpoint import load_model
from .errors import first_line
from .fold import fold_batchnorm

# Module names of stages. timm's feature_info may begin with a stem (stride at most 2), whose name does not match
_STAGES = re.compile(r'^(blocks|stages?|layers?[1-9]?|level[1-9]|s[1-9]|features\.(?!norm0|conv1))')

WHOLE = -1  # in place of a stage: the model runs to its end


class FeatureSpec(NamedTuple):
    """Shape and sign of a teacher layer's feature map, for one image size."""
    layer: str
    num_chs: int
    size: Tuple[int, int]
    non_negative: bool


def resolve_layer(model: nn.Module, layer: Optional[str] = None, max_stride: Optional[float] = None) -> str:
    """Return the module name of a teacher layer.

    Args:
        model: The teacher. Its stages come from timm's `feature_info`, without the stem.
        layer: A stage number, counted from 1, or a module name. None takes the stage with the largest stride up to
            `max_stride`, or the first stage if all strides are larger (our choice; the paper says "early
            intermediate").
        max_stride: Largest stride in pixels for `layer=None`. None sets no limit.

    Raises:
        ValueError: If the model has no such stage or module, or does not list its stages.
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
            f'Teacher {name} does not list its stages (timm feature_info). Name a module instead:'
            f' --dearkd-hooks BLOCK:MODULE. Its children: {children}.')
    if layer is None:
        within = [stage for stage in stages if max_stride is None or stage['reduction'] <= max_stride]
        return max(within, key=lambda stage: stage['reduction'])['module'] if within else stages[0]['module']
    if not 1 <= int(layer) <= len(stages):
        listed = ', '.join(f'{i} ({stage["module"]})' for i, stage in enumerate(stages, 1))
        raise ValueError(f'Teacher {name} has no stage {layer}. Its stages: {listed}.')
    return stages[int(layer) - 1]['module']


def load_class_map(path: str) -> List[int]:
    """Read a class map: one teacher class index per student class.

    One index per line, in the order of the student's classes. Text after the index (a class name), empty lines and
    lines that start with # are ignored.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line does not start with an index, or the file has no index.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'Class map {path!r} does not exist. Check the path.')
    class_map = []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or words[0].startswith('#'):
                continue
            if not words[0].isdecimal():
                raise ValueError(
                    f'Line {number} of class map {path!r} begins with {words[0][:40]!r}, not with a teacher class.'
                    " Write one index (from 0) per line, in the order of the student's classes.")
            class_map.append(int(words[0]))
    if not class_map:
        raise ValueError(f'Class map {path!r} is empty. Write one teacher class index per line.')
    return class_map


def _per_channel(values: Sequence[float], in_chans: int) -> torch.Tensor:
    """Return values for `in_chans` channels, averaged as in timm if counts differ."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor if len(tensor) == in_chans else tensor.mean().expand(in_chans)


def input_normalisation(model: nn.Module, in_chans: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation (in_chans,) of a model's input normalisation."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    mean, std = cfg.get('mean') or IMAGENET_DEFAULT_MEAN, cfg.get('std') or IMAGENET_DEFAULT_STD
    return _per_channel(mean, in_chans), _per_channel(std, in_chans)


def weights_fingerprint(model: nn.Module, more: str = '') -> str:
    """Hash some values of every tensor of a model, and the text `more`."""
    tensors = [t.flatten()[:16].float() for t in model.state_dict().values()]
    values = torch.cat(tensors).cpu().double().numpy().tobytes()  # MPS has no float64
    return hashlib.sha256(values + more.encode()).hexdigest()[:16]


class Teacher(nn.Module):
    """A frozen classifier that returns logits and feature maps in one forward.

    It takes the student's input and renormalises it with a precomputed scale and shift. Grey input is repeated for a
    teacher of three channels. The teacher always stays in eval mode.

    Args:
        model: The classifier: a timm model, or any module that returns logits. It is frozen in place.
        layers: Module names whose outputs `forward` returns with the logits. If empty, `DearKDTask` sets them from
            its hooks.
        in_chans: Channels of the student's input.
        mean: Mean per channel of the student's normalisation; None means the teacher's own.
        std: Standard deviation per channel of the student's normalisation; None means the teacher's own.
        img_size: Side length, or (H, W), to resize the input to, bilinearly; None keeps the student's size.
        class_map: Teacher class per student class, for a teacher that has other classes; see `load_class_map`. If
            student classes share a teacher class, the first of them is the hard label.

    Raises:
        ValueError: If a layer is unknown, the channel counts do not fit, or the class map names a class that the model
            does not have.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    class_map: Optional[torch.Tensor]
    input_size: Optional[Tuple[int, int, int]] = None  # the student's (C, H, W), if known
    weights_hash = ''  # of the weights as they were loaded, set by `prepare`

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
        self.has_own_layers = bool(layers)
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

        self.capture = FeatureCapture(model, layers)
        self._last_stage: Optional[int] = None  # found by the first call that needs maps alone
        self._run = self._forward
        self._run_features = self._features
        self._run_pooled = self._pooled
        self.eval()

    @classmethod
    def for_student(
            cls,
            student: nn.Module,
            model: Union[str, nn.Module],
            checkpoint: Optional[str] = None,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            class_map: Optional[Sequence[int]] = None,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            input_size: Optional[Tuple[int, int, int]] = None,
    ) -> 'Teacher':
        """Build the teacher of a student, for `DearKDTask` or one of the timm tasks.

        Args:
            student: The model to train.
            model: The teacher: a name for `load_model`, or a module.
            checkpoint: Weights for a teacher given by name.
            img_size: Size at which the teacher sees the images; None is the student's. See `Teacher`.
            class_map: Teacher class per student class. See `Teacher`.
            mean: Mean of the student's input; None is that of its `pretrained_cfg`.
            std: Standard deviation of the student's input; None is that of its `pretrained_cfg`.
            input_size: The student's (C, H, W); None is the model's own.

        Raises:
            ValueError: If the teacher does not load or does not fit the student, or a checkpoint is given for a module.

        Examples:

            ```python
            teacher = Teacher.for_student(student, 'resnet50', 'resnet50_cars.pth', img_size=224)
            task = DearKDTask(student, teacher, TwoStageSchedule(epochs=300), hooks='4:2')
            ```
        """
        if isinstance(model, str):
            model = load_model(model, checkpoint)
        elif checkpoint is not None:
            raise ValueError(
                f'Checkpoint {checkpoint!r} is given with a {type(model).__name__}, expected a model name.'
                ' Pass the timm name, or load the weights into the module yourself.')
        student = unwrap_model(student)
        channels, height, width = input_size or get_model_input_config(student)['input_size']
        own_mean, own_std = (values.tolist() for values in input_normalisation(student, channels))
        teacher = cls(
            model, in_chans=channels, mean=own_mean if mean is None else mean, std=own_std if std is None else std,
            img_size=img_size, class_map=class_map)
        teacher.input_size = (channels, height, width)
        return teacher

    @property
    def layers(self) -> List[str]:
        """Module names whose outputs `forward` returns."""
        return self.capture.names

    def set_layers(self, layers: Sequence[str]) -> None:
        """Choose the layers whose outputs `forward` returns.

        Raises:
            ValueError: If the model has no such layer.
        """
        capture = FeatureCapture(self.model, layers)
        self.capture.close()
        self.capture = capture
        self._last_stage = None

    def _set_class_map(self, class_map: Sequence[int]) -> None:
        count = self.num_classes
        outside = [index for index in class_map if index < 0 or (count is not None and index >= count)]
        if outside:
            raise ValueError(
                f'The class map names teacher class {outside[0]}, but the teacher has'
                f' {"no negative classes" if count is None else f"classes 0 to {count - 1}"}.'
                ' Count its classes from 0 in --kd-class-map.')
        self.class_map = torch.tensor(class_map, dtype=torch.long)
        self.num_classes = len(class_map)

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode, so that BatchNorm statistics do not change."""
        return super().train(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward with its hooks. Takes the arguments of `torch.compile`."""
        self._run = torch.compile(self._forward, *args, **kwargs)
        self._run_features = torch.compile(self._features, *args, **kwargs)
        self._run_pooled = torch.compile(self._pooled, *args, **kwargs)

    def store_weights(self, dtype: torch.dtype) -> None:
        """Store the weights of convolutions and linear layers in the `dtype` of autocast.

        Autocast casts the weights of a frozen model again in every forward. The results are the same.
        """
        for module in self.model.modules():
            if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward):
                module.to(dtype)

    def fold_batchnorm(self, input_size: Tuple[int, int, int]) -> int:
        """Fold the BatchNorm of the model into its convolutions, in place; see `fold.fold_batchnorm`.

        Args:
            input_size: The student's (C, H, W).

        Returns:
            The number of folded BatchNorm modules.
        """
        noise = self._noise(input_size)
        self._last_stage = None

        def run() -> List[torch.Tensor]:
            logits, features = self._forward(noise, with_features=True)
            return [logits, *features]

        return fold_batchnorm(self.model, run)

    def fingerprint(self) -> str:
        """Hash some values of every tensor, the layers and the class map."""
        class_map = None if self.class_map is None else self.class_map.tolist()
        return weights_fingerprint(self.model, repr((self.layers, class_map)))

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        """Convert student input (B, C, H, W) to the teacher's format."""
        if self._renormalise:
            x = x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
        elif x.shape[1] != self._in_chans:
            x = x.expand(-1, self._in_chans, -1, -1)
        if self.img_size is not None and tuple(x.shape[-2:]) != self.img_size:
            # in float32, because CPUs cannot resize in half precision
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = F.interpolate(wide, size=self.img_size, mode='bilinear', antialias=True).to(x.dtype)
        return x

    def _take_features(self) -> List[torch.Tensor]:
        features = self.capture.take()
        if self._channels_last:
            features = [f.permute(0, 3, 1, 2) if f.ndim == 4 else f for f in features]
        return features

    def _forward(self, x: torch.Tensor, with_features: bool) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        self.capture.enabled = with_features
        logits = self.model(self.prepare_input(x))
        if self.class_map is not None:
            logits = logits.index_select(1, self.class_map)
        return logits, self._take_features() if with_features else []

    def _features(self, x: torch.Tensor) -> List[torch.Tensor]:
        self.capture.enabled = True
        model: Any = self.model
        x = self.prepare_input(x)
        if self._last_stage == WHOLE:
            model(x)
        else:
            model.forward_intermediates(x, indices=[self._last_stage], stop_early=True, intermediates_only=True)
        return self._take_features()

    def _find_last_stage(self, input_size: Tuple[int, int, int]) -> None:
        """Find the first stage at which timm can stop the model, so that the maps are the same."""
        x = self._noise(input_size)
        expected = self._forward(x, with_features=True)[1]
        can_stop = hasattr(self.model, 'forward_intermediates')
        for stage in range(len(getattr(self.model, 'feature_info', ())) if can_stop else 0):
            self._last_stage = stage
            try:
                if all(map(torch.equal, self._features(x), expected)):  # a later module may change a map in place
                    return
            except Exception:  # the layers come later, or timm cannot stop this model: any kind of error
                continue
        self._last_stage = WHOLE

    @torch.no_grad()
    def forward(
            self,
            x: torch.Tensor,
            with_features: bool = True,
            with_logits: bool = True,
    ) -> Tuple[Optional[torch.Tensor], List[torch.Tensor]]:
        """Return logits (B, classes) and maps (B, C, h, w) for the student's input.

        Without logits, a timm model stops after the stage of its deepest layer in `layers`. The maps are the same, bit
        for bit.

        Args:
            x: The student's input (B, C, H, W).
            with_features: Return the maps of `layers`, else [].
            with_logits: Return the logits, else None.
        """
        if with_logits:
            return self._run(x, with_features)
        if not (with_features and self.layers):
            return None, []
        if self._last_stage is None:
            self._find_last_stage((x.shape[1], x.shape[2], x.shape[3]))
        return None, self._run_features(x)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        self.capture.enabled = False
        return model.forward_head(model.forward_features(self.prepare_input(x)), pre_logits=True)

    @torch.no_grad()
    def pooled_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input (B, D) of the model's classifier for the student's input."""
        return self._run_pooled(x)

    def _noise(self, input_size: Tuple[int, int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        return torch.randn(1, *input_size, generator=generator).to(self.scale.device, dtype)

    @torch.no_grad()
    def probe(
            self,
            input_size: Tuple[int, int, int],
            with_features: bool = True,
            pooled: bool = False,
    ) -> List[FeatureSpec]:
        """Check the image size by one forward of noise, and describe the feature maps.

        Args:
            input_size: The student's (C, H, W).
            with_features: Describe the feature maps of `layers`.
            pooled: Check `pooled_features` as well.

        Raises:
            ValueError: If the model does not take the size, has no pooled features, or a layer gives no feature map
                (B, C, H, W). The message names the remedy.
        """
        noise = self._noise(input_size)
        self.capture.enabled = with_features
        try:
            self.model(self.prepare_input(noise))
        except Exception as e:  # models raise any kind of error, assertions included
            height, width = self.img_size or input_size[1:]
            is_timm_model = hasattr(self.model, 'pretrained_cfg')
            own = get_model_input_config(self.model)['input_size'][1:] if is_timm_model else (height, width)
            remedy = (
                f'--kd-teacher-img-size {own[-1]} resizes them to the size of its architecture.'
                if tuple(own) != (height, width) else
                'Choose another teacher, or a size that it takes (--kd-teacher-img-size).')
            raise ValueError(
                f'Teacher {type(self.model).__name__} does not take images of {height}x{width} pixels'
                f' ({first_line(e)[:200].rstrip(".")}). {remedy}') from e
        specs = [self._describe(*pair) for pair in zip(self.layers, self._take_features())] if with_features else []
        if pooled:
            try:
                self._pooled(noise)
            except Exception as e:
                raise ValueError(
                    f'Teacher {type(self.model).__name__} gives no pooled features'
                    f' ({first_line(e)[:200].rstrip(".")}). Choose another teacher, or --kd-distill-type logit.') from e
        return specs

    def _describe(self, layer: str, feature: Any) -> FeatureSpec:
        """Describe the output of a layer.

        Raises:
            ValueError: If the output is not 4-D, or has its channels last although the model does not declare it.
        """
        name = type(self.model).__name__
        if not isinstance(feature, torch.Tensor) or feature.ndim != 4:
            shape = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
            raise ValueError(
                f'Teacher layer {layer!r} of {name} gives {shape}, not a 4-D feature map (B, C, H, W). Name a'
                ' convolutional layer with --dearkd-hooks BLOCK:LAYER, choose a CNN as the teacher, or train without'
                ' the hidden loss (--dearkd-beta 0).')
        infos = getattr(self.model, 'feature_info', None) or ()
        num_chs = next((info['num_chs'] for info in infos if info['module'] == layer), None)
        if num_chs == feature.shape[3] and num_chs != feature.shape[1]:
            raise ValueError(
                f'Teacher layer {layer!r} of {name} has its channels last, but the model does not declare it'
                ' (output_fmt). Choose another CNN as the teacher, or train without the hidden loss (--dearkd-beta 0).')
        return FeatureSpec(layer, feature.shape[1], (feature.shape[2], feature.shape[3]), bool((feature >= 0).all()))

    def prepare(
            self,
            student: nn.Module,
            uses_classes: bool = True,
            with_features: bool = False,
            pooled: bool = False,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> Tuple[str, List[FeatureSpec]]:
        """Move the teacher to the device of its task, and check that it fits the student.

        Args:
            student: The model to train.
            uses_classes: Check that both have the same number of classes.
            with_features: See `probe`.
            pooled: See `probe`.
            device: Device of the task.
            dtype: Dtype for the weights.

        Returns:
            The fingerprint (of the weights before the conversion to `dtype`), and the feature maps.

        Raises:
            ValueError: If classes, layers or image size do not fit. The message names the remedy.
        """
        if uses_classes:
            self._check_classes(cast(int, student.num_classes))
        fingerprint, self.weights_hash = self.fingerprint(), weights_fingerprint(self.model)
        self.model.to(dtype)
        self.to(device)
        input_size = self.input_size or get_model_input_config(student)['input_size']
        return fingerprint, self.probe(input_size, with_features, pooled)

    def _check_classes(self, num_classes: int) -> None:
        if self.class_map is not None and len(self.class_map) != num_classes:
            raise ValueError(
                f'The class map has {len(self.class_map)} entries, the student {num_classes} classes.'
                ' Give one teacher class per student class in --kd-class-map.')
        if self.num_classes == 1:
            raise ValueError(
                'The teacher has one output, expected one per class. Instead of one logit z, let its classifier return'
                ' the two logits 0 and z.')
        if self.num_classes is not None and self.num_classes != num_classes:
            raise ValueError(
                f'The teacher knows {self.num_classes} classes, the student {num_classes}.'
                " Map the student's classes to the teacher's (--kd-class-map), or choose a teacher trained on the same"
                ' classes.')


def require_same_teacher(saved: object, own: object, also: str, flag: str) -> None:
    """Compare what identifies the teacher in a checkpoint with the present one.

    Args:
        saved: Identification in the checkpoint.
        own: Identification of the present task.
        also: Another possible difference, for the message.
        flag: Flag that sets it.

    Raises:
        ValueError: If they differ.
    """
    if saved != own:
        raise ValueError(
            f'The checkpoint was trained with another teacher, class map or {also}. Resume with the same'
            f' --kd-model-name, --kd-teacher-checkpoint, --kd-class-map and {flag}, or start from its weights with'
            ' --initial-checkpoint.')
