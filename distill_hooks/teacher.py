"""The frozen CNN that teaches."""
import argparse
import difflib
import hashlib
import logging
import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.model_config import resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import (
    clean_state_dict,
    get_pretrained_cfg,
    is_model,
    list_models,
    load_state_dict,
    parse_model_name,
    resolve_model_input_args,
)
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from .capture import FeatureCapture, find_module
from .errors import first_line

__all__ = [
    'FeatureSpec', 'Teacher', 'create_teacher', 'load_class_map', 'resolve_layer', 'resolve_teacher', 'training_args']

_logger = logging.getLogger(__name__)

# Containers of stages. timm's feature_info may begin with a stem, of stride 2 at most, that is in none of them
_STAGES = re.compile(r'^(blocks|stages?|layers?[1-9]?|level[1-9]|s[1-9]|features\.(?!norm0|conv1))')
# What PyTorch's layers call their tensors, whoever wrote the model; a layer scale has any name
_TORCH_NAMES = {'weight', 'bias', 'running_mean', 'running_var'}


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


def _read_state_dict(checkpoint: str) -> Dict[str, torch.Tensor]:
    """State dict in a checkpoint file, whatever mapping it lies in."""
    if os.path.isdir(checkpoint):
        raise ValueError(
            f'Checkpoint {checkpoint!r} is a folder. Name a file in it, or the folder as the model if it'
            ' holds a config.json (--kd-model-name).')
    try:
        contents = load_state_dict(checkpoint)
    except FileNotFoundError:
        raise FileNotFoundError(f'No checkpoint at {checkpoint!r}.') from None
    except Exception as e:  # torch's unpickler alone raises half a dozen kinds
        reason = re.split(r'\.\s', str(e))[0].replace('\n', ' ')
        raise ValueError(
            f'Checkpoint {checkpoint!r} can not be read ({type(e).__name__}: {reason}). It may be cut'
            ' short, or hold a whole model: write its tensors with torch.save(model.state_dict(), PATH).') from e
    if not any(isinstance(value, torch.Tensor) for value in contents.values()):
        inner = {
            key: dict(value) for key, value in contents.items()
            if isinstance(value, Mapping) and value and all(isinstance(v, torch.Tensor) for v in value.values())
        }
        if len(inner) != 1:
            raise ValueError(
                f'Checkpoint {checkpoint!r} holds {" and ".join(map(repr, inner)) or "no state dict"}, expected'
                ' one state dict. Write it alone, with torch.save(model.state_dict(), PATH).')
        contents = clean_state_dict(*inner.values())
    return {key: value for key, value in contents.items() if isinstance(value, torch.Tensor)}


def _checkpoint_shapes(name: str, state_dict: Dict[str, torch.Tensor]) -> Dict[str, int]:
    """Class and channel count of a checkpoint, from the layers that timm names, else the last and the first one."""
    cfg = get_pretrained_cfg(name)
    classifier, first_conv = (f'{getattr(cfg, field, None)}.weight' for field in ('classifier', 'first_conv'))
    weights = {key: value for key, value in state_dict.items() if key.endswith('weight') and value.ndim > 1}
    convs = {key: value for key, value in weights.items() if value.ndim == 4}
    shapes = {}
    if weights:
        shapes['num_classes'] = weights.get(classifier, list(weights.values())[-1]).shape[0]
    if convs:
        shapes['in_chans'] = convs.get(first_conv, list(convs.values())[0]).shape[1]
    return shapes


def _match_by_order(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict under the model's names, matched by order.

    The shapes have to agree, ones aside (torchvision's layer scales are (C, 1, 1)), and so does what PyTorch's layers
    call their tensors. BatchNorm's counters do not matter.

    Raises:
        ValueError: What does not agree.
    """
    own, given = (
        {key: value for key, value in tensors.items() if not key.endswith('num_batches_tracked')}
        for tensors in (model.state_dict(), state_dict))
    if len(own) != len(given):
        raise ValueError(f'it holds {len(given)} tensors, the model {len(own)}')
    for (key, value), (other, tensor) in zip(own.items(), given.items()):
        kinds = {key.rpartition('.')[2], other.rpartition('.')[2]}
        sizes, other_sizes = ([size for size in t.shape if size > 1] for t in (value, tensor))
        if sizes != other_sizes or (len(kinds) > 1 and kinds & _TORCH_NAMES) or (other in own and other != key):
            raise ValueError(f'{other} {tuple(tensor.shape)} is where {key} {tuple(value.shape)} belongs')
    return {key: tensor.reshape(value.shape) for (key, value), tensor in zip(own.items(), given.values())}


def _load_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor], name: str, checkpoint: str) -> None:
    """Load weights by name, or else by order."""
    try:
        model.load_state_dict(state_dict)
        return
    except RuntimeError as e:
        lines = str(e).splitlines()
        reason = ' '.join(line.strip() for line in lines[1:2] or lines)[:200]
    try:
        if os.path.splitext(checkpoint)[1] == '.safetensors':  # sorted by name: blocks.10 comes before blocks.2
            raise ValueError(reason)
        model.load_state_dict(_match_by_order(model, state_dict))
    except ValueError as e:
        size = ' If it was trained at another image size, name the folder of its run.' if 'pos_embed' in str(e) else ''
        raise ValueError(
            f'Checkpoint {checkpoint!r} does not fit architecture {name!r}: {e}.'
            f' Name the architecture that it was trained with.{size}') from e
    _logger.info(
        f'{checkpoint} names its tensors otherwise than {name} does, so they were loaded by order, in which'
        ' all shapes agree. That says nothing of activations, padding or the eps of BatchNorm: check the accuracy.')


def resolve_teacher(name: str, checkpoint: Optional[str] = None) -> Tuple[str, Optional[str]]:
    """The name by which timm knows a teacher, and the file of its weights.

    Args:
        name: A timm name, the folder of a run, which becomes a `local-dir:`, or a checkpoint of a run.
        checkpoint: The file, if the name is none.

    Raises:
        ValueError: An unknown name, or a file that does not say of which architecture it is.
    """
    if os.path.isfile(name) and not checkpoint:
        name, checkpoint = _architecture_of(name), name
    if os.path.isdir(name) and not is_model(name.split('.')[0]):
        name = f'local-dir:{name}'
    folder = name.removeprefix('local-dir:')
    if (folder != name or os.sep in folder) and ':' not in folder and not os.path.isdir(folder):
        raise ValueError(
            f'No folder {folder!r}. Give the output folder of a run, the name of a timm model, or hf-hub:ORG/NAME.')
    source, architecture = parse_model_name(name)
    if source is None and not is_model(architecture.split('.')[0]):
        near = ', '.join(difflib.get_close_matches(architecture, list_models(), n=4, cutoff=0.4)) or 'none'
        raise ValueError(f'Unknown model {name!r}. The nearest timm names: {near}.')
    return name, checkpoint


def _architecture_of(checkpoint: str) -> str:
    """The model that a run's checkpoint says it is of."""
    architecture = training_args(checkpoint).get('arch')
    if architecture is None:
        raise ValueError(
            f'{checkpoint!r} is a file that does not say of which architecture. Name that as the model, and the file as'
            ' its checkpoint.')
    return architecture


def training_args(checkpoint: str) -> Dict[str, Any]:
    """The options that a checkpoint of timm's training script, or of ours, was trained with, and its model as `arch`.

    Files of others have none.
    """
    try:
        contents = load_checkpoint_metadata(checkpoint)
    except Exception:  # no checkpoint of that kind
        return {}
    if not isinstance(contents, Mapping) or not isinstance(contents.get('arch'), str):
        return {}
    args = contents.get('args')
    is_timms = isinstance(args, argparse.Namespace) and getattr(args, 'model', None) == contents['arch']
    return {**(vars(args) if is_timms else {}), 'arch': contents['arch']}


def _create_as_trained(name: str, args: Dict[str, Any], **kwargs: Any) -> nn.Module:
    """A model without weights, of the arguments and for the input that a training script made it with.

    Args:
        name: See `create_teacher`.
        args: Options of the script.
        **kwargs: Arguments of `timm.create_model` that win over those.
    """
    kwargs = {'bn_eps': args.get('bn_eps'), 'global_pool': args.get('gp'), **(args.get('model_kwargs') or {}), **kwargs}
    # the channels are told by the weights
    size = args['input_size'][1:] if args.get('input_size') else to_2tuple(args.get('img_size'))
    given = {**args, 'in_chans': None, 'img_size': None, 'input_size': None}
    if size[0]:
        given['input_size'] = (kwargs.get('in_chans', 3), *size)
    kwargs = resolve_model_input_args(name, {} if 'img_size' in kwargs else given, **kwargs)
    model: Any = timm.create_model(kwargs.pop('model_name'), **kwargs)
    config = {**model.pretrained_cfg, **(args.get('pretrained_cfg_overlay') or {})}
    model.pretrained_cfg = {**model.pretrained_cfg, **resolve_input_data_config(model, given, config)}
    return model


def create_teacher(
        name: str,
        checkpoint: Optional[str] = None,
        device: Optional[torch.device] = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a timm model with trained weights, with the class count that they have.

    Args:
        name: timm model name, `hf-hub:` and `local-dir:` included, or a folder with a `config.json`, such as that of
            an earlier run, or its checkpoint. Without a checkpoint, its pretrained weights load.
        checkpoint: Weights of that architecture: .safetensors, a state dict, or a (training) checkpoint that holds
            one. Under other names than timm's they are loaded by order, if every shape agrees (our choice). Of a
            training checkpoint of timm's, the model's arguments and its normalisation are taken, too.
        device: Where to put it.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: An unknown name, no weights to be had, or a checkpoint that does not fit.
    """
    name, checkpoint = resolve_teacher(name, checkpoint)
    state_dict = _read_state_dict(checkpoint) if checkpoint else {}
    args = training_args(checkpoint) if checkpoint else {}
    try:
        kwargs = {**_checkpoint_shapes(name, state_dict), **kwargs}
        if args:
            model = _create_as_trained(name, args, **kwargs)
        else:
            model = timm.create_model(name, pretrained=not checkpoint, **kwargs)
    except Exception as e:  # whatever the download raises, the remedy is the same
        reason = first_line(e)
        remedy = 'Check its name.' if checkpoint else 'Name a trained checkpoint of it.'
        raise ValueError(
            f'Could not get {"" if checkpoint else "weights of "}{name!r} ({type(e).__name__}: {reason}).'
            f' {remedy}') from e
    if checkpoint:
        _load_weights(model, state_dict, name, checkpoint)
    return model.to(device)


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

    def compile(self, *args, **kwargs) -> None:
        """Compile the forward, hooks included. Takes the arguments of `torch.compile`."""
        self._run = torch.compile(self._forward, *args, **kwargs)

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

    @torch.no_grad()
    def probe(self, input_size: Tuple[int, int, int]) -> List[FeatureSpec]:
        """Shape and sign of each layer's feature map, from one forward of noise.

        Args:
            input_size: The student's (C, H, W).

        Raises:
            ValueError: A layer whose output is not a 4-D map, or has its channels last where none would expect it.
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
