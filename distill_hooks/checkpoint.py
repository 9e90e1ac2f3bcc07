"""Models with trained weights: by timm's name, from the folder of a run, or from a checkpoint."""
import argparse
import difflib
import logging
import os
import re
from typing import Any, Dict, Mapping, Optional, Tuple

import timm
import torch
import torch.nn as nn
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

from .errors import first_line

__all__ = ['load_model', 'resolve_teacher', 'training_args']

_logger = logging.getLogger(__name__)

# What PyTorch's layers call their tensors, whoever wrote the model; a layer scale has any name
_TORCH_NAMES = {'weight', 'bias', 'running_mean', 'running_var'}


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
        name: See `load_model`.
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


def load_model(
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
