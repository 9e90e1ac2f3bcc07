"""Load trained models: by timm name, from a run folder, or from a checkpoint."""
import argparse
import difflib
import logging
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Set, Tuple

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

_logger = logging.getLogger(__name__)

# Tensor names of PyTorch's layers, the same in every model. Other tensors (layer scale) have any name
_TORCH_NAMES = {'weight', 'bias', 'running_mean', 'running_var'}
_COUNTER = 'num_batches_tracked'  # of BatchNorm; older files do not have it


def _few(names: Sequence[str], count: int = 3) -> str:
    """Join the first names for a message."""
    return ', '.join(names[:count]) + (', …' if len(names) > count else '')


def why_unreadable(checkpoint: str, error: Exception) -> str:
    """Return the message for a checkpoint file that timm could not read, with the remedy."""
    objects = re.search(r'Unsupported globals: (.+?)\.(\s|$)', str(error))
    if objects:
        found = sorted(objects[1].split(', '), key=lambda kind: (kind.startswith('torch.'), kind))
        return (
            f'Checkpoint {checkpoint!r} cannot be read safely: it holds Python objects besides its tensors'
            f' ({_few(found)}), and reading them can run any code. If you trust the file, write only'
            " its tensors: torch.save(torch.load(FILE, weights_only=False)['state_dict'], PATH), or for a"
            ' whole model torch.save(model.state_dict(), PATH).')
    if 'TorchScript' in str(error):
        return (
            f'Checkpoint {checkpoint!r} is a TorchScript archive. Write only its tensors:'
            ' torch.save(torch.jit.load(FILE).state_dict(), PATH).')
    kind = re.match(r"'(\w+)' object has no attribute 'items'", str(error))
    if kind:
        return (
            f'Checkpoint {checkpoint!r} holds an object of type {kind[1]}, expected a state dict. Write one:'
            ' torch.save(model.state_dict(), PATH).')
    reason = re.split(r'\.\s', str(error))[0].replace('\n', ' ')
    return (
        f'Checkpoint {checkpoint!r} cannot be read ({type(error).__name__}: {reason}). It may be'
        ' truncated. Copy or download it again.')


def _read_state_dict(checkpoint: str) -> Dict[str, torch.Tensor]:
    """Read the state dict of a checkpoint file, under any key.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or does not hold exactly one state dict.
    """
    if os.path.isdir(checkpoint):
        raise ValueError(
            f'Checkpoint {checkpoint!r} is a folder. Name a file in it, or the folder as the model if it'
            ' holds a config.json (--kd-model-name).')
    try:
        contents = load_state_dict(checkpoint)
    except FileNotFoundError:
        raise FileNotFoundError(f'Checkpoint {checkpoint!r} does not exist. Check the path.') from None
    except Exception as e:  # torch's unpickler raises many kinds of errors
        raise ValueError(why_unreadable(checkpoint, e)) from e
    if not any(isinstance(value, torch.Tensor) for value in contents.values()):
        inner = {
            key: dict(value) for key, value in contents.items()
            if isinstance(value, Mapping) and value and all(isinstance(v, torch.Tensor) for v in value.values())
        }
        if len(inner) != 1:
            raise ValueError(
                f'Checkpoint {checkpoint!r} holds {" and ".join(map(repr, inner)) or "no state dict"}, expected'
                ' one state dict. Write only that: torch.save(model.state_dict(), PATH).')
        contents = clean_state_dict(*inner.values())
    return {key: value for key, value in contents.items() if isinstance(value, torch.Tensor)}


def _checkpoint_shapes(name: str, state_dict: Dict[str, torch.Tensor]) -> Dict[str, int]:
    """Return the class and channel count of a checkpoint.

    They come from timm's classifier and first convolution, or else from the last weight and the first convolution of
    the file.
    """
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


def _count_by_prefix(state_dict: Dict[str, torch.Tensor], names: Collection[str]) -> Dict[str, int]:
    """Count the tensors of `names` under each prefix of a state dict, '' included."""
    counts: Counter[str] = Counter()
    for key in state_dict:
        parts = key.split('.')
        for i in range(len(parts)):
            if '.'.join(parts[i:]) in names:
                counts[''.join(f'{part}.' for part in parts[:i])] += 1
    return dict(counts)


def _find_prefix(state_dict: Dict[str, torch.Tensor], names: Collection[str], checkpoint: str) -> str:
    """Find the prefix under which a state dict has a model's tensors.

    Averaged weights (a part of the prefix starts with `ema`) count only if no other prefix is complete.

    Args:
        state_dict: Tensors of the file.
        names: Tensor names of the model, without BatchNorm's counters.
        checkpoint: Path of the file, for the message.

    Raises:
        ValueError: If several prefixes have all of the tensors.
    """
    counts = _count_by_prefix(state_dict, names)
    complete = [prefix for prefix, count in counts.items() if count == len(names)]
    if '' in complete:
        return ''
    plain = [prefix for prefix in complete if not re.search(r'(^|\.)ema', prefix)]
    complete = plain or complete
    if len(complete) > 1:
        raise ValueError(
            f'Checkpoint {checkpoint!r} holds the model {len(complete)} times, under {_few(complete)}. Write only'
            ' the tensors of one: torch.save(model.state_dict(), PATH).')
    if complete:
        return complete[0]
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default='')
    return best if counts.get(best, 0) > len(names) / 2 else ''


def _align(
        state_dict: Dict[str, torch.Tensor],
        name: str,
        args: Dict[str, Any],
        checkpoint: str,
        **kwargs: Any,
) -> Tuple[Dict[str, torch.Tensor], Dict[str, int]]:
    """Remove a prefix of the model's tensors, and find class and channel count.

    Lightning, and scripts that wrap the model, add such a prefix. Other tensors of the file keep their names.

    Args:
        state_dict: Tensors of the file.
        name: See `load_model`.
        args: Options that the model was created with.
        checkpoint: Path of the file, for messages.
        **kwargs: See `load_model`.
    """
    cfg = get_pretrained_cfg(name)
    if all(f'{getattr(cfg, field, None)}.weight' in state_dict for field in ('classifier', 'first_conv')):
        return state_dict, _checkpoint_shapes(name, state_dict)
    with torch.device('meta'):  # only the names are needed
        names = {key for key in _create_model(name, args, **kwargs).state_dict() if not key.endswith(_COUNTER)}
    state_dict = _rename_classifier(state_dict, name, names)
    prefix = _find_prefix(state_dict, names, checkpoint)
    if prefix:
        _logger.info(f'{checkpoint}: loads the tensors of {name} under the prefix {prefix!r}.')
        own = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
        others = {key: value for key, value in state_dict.items() if not key.startswith(prefix) and key not in own}
        state_dict = {**own, **others}
    known = {key: value for key, value in state_dict.items() if key in names}
    return state_dict, _checkpoint_shapes(name, known if len(known) > len(names) / 2 else state_dict)


def _rename_classifier(
        state_dict: Dict[str, torch.Tensor],
        name: str,
        names: Collection[str],
) -> Dict[str, torch.Tensor]:
    """Rename the only layer of a classifier, such as `fc.1.weight` behind a dropout, to timm's `fc.weight`.

    Args:
        state_dict: Tensors of the file, under any prefix.
        name: See `load_model`.
        names: Tensor names of the model.
    """
    classifier = getattr(get_pretrained_cfg(name), 'classifier', None)
    if not isinstance(classifier, str):
        return state_dict
    layers: Dict[str, Set[str]] = defaultdict(set)  # of each classifier in the file
    for key in state_dict:
        match = re.fullmatch(rf'((?:.+\.)?{re.escape(classifier)})\.(\d+)\.\w+', key)
        if match and not any(key.endswith(f'.{own}') for own in names):
            layers[match[1]].add(match[2])
    renamed = {}
    for place, numbers in layers.items():
        layer = f'{place}.{min(numbers)}'
        if len(numbers) == 1 and getattr(state_dict.get(f'{layer}.weight'), 'ndim', 0) == 2:
            _logger.info(f'The classifier {layer!r} of the checkpoint is loaded as {place!r}.')
            renamed.update({f'{layer}.{kind}': f'{place}.{kind}' for kind in ('weight', 'bias')})
    return {renamed.get(key, key): value for key, value in state_dict.items()}


def _match_by_order(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Match the tensors of a state dict with those of a model by order.

    Returns them under the model's names. Shapes have to agree up to dimensions of 1 (as torchvision's layer
    scales, (C, 1, 1)), and so do the names that PyTorch's layers give to tensors. BatchNorm's counters are ignored.

    Raises:
        ValueError: If they do not match. The message is part of a longer one.
    """
    own, given = (
        {key: value for key, value in tensors.items() if not key.endswith(_COUNTER)}
        for tensors in (model.state_dict(), state_dict))
    if len(own) != len(given):
        raise ValueError(f'it has {len(given)} tensors, the model {len(own)}')
    for (key, value), (other, tensor) in zip(own.items(), given.items()):
        kinds = {key.rpartition('.')[2], other.rpartition('.')[2]}
        sizes, other_sizes = ([size for size in t.shape if size > 1] for t in (value, tensor))
        if sizes != other_sizes or (len(kinds) > 1 and kinds & _TORCH_NAMES) or (other in own and other != key):
            raise ValueError(f'{other} {tuple(tensor.shape)} is in place of {key} {tuple(value.shape)}')
    return {key: tensor.reshape(value.shape) for (key, value), tensor in zip(own.items(), given.values())}


def _compare(own: Dict[str, torch.Tensor], given: Dict[str, torch.Tensor]) -> Tuple[str, List[str]]:
    """Compare a model's tensors with those of a file.

    Returns:
        The problems as text ('' if there are none), and the names that the model does not have. Such names are a
        problem only if they belong to a part of the model: `layer3.5.conv1` does, `loss.weight` does not.
    """
    own = {key: value for key, value in own.items() if not key.endswith(_COUNTER)}
    missing = [key for key in own if key not in given]
    left_over = [key for key in given if key not in own and not key.endswith(_COUNTER)]
    shapes = [
        f'{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}' for key, value in own.items()
        if key in given and given[key].shape != value.shape]
    parts = {key.split('.')[0] for key in own}
    problems = []
    if missing:
        problems.append(f'{len(missing)} of its {len(own)} tensors missing ({_few(missing)})')
    if left_over and (missing or any(key.split('.')[0] in parts for key in left_over)):
        problems.append(f'{len(left_over)} unknown ({_few(left_over)})')
    if shapes:
        problems.append(f'{len(shapes)} of another shape ({_few(shapes)})')
    return ', '.join(problems), left_over


def _load_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor], name: str, checkpoint: str) -> None:
    """Load weights by name, or by order if the names differ.

    Raises:
        ValueError: If the weights fit neither by name nor by order.
    """
    own = model.state_dict()
    problem, left_over = _compare(own, state_dict)
    if not problem:
        model.load_state_dict({key: value for key, value in state_dict.items() if key in own})
        if left_over:
            _logger.info(
                f'{checkpoint}: {len(left_over)} tensors that {name} does not have were skipped: {_few(left_over)}.')
        return
    by_order, reason = None, ''
    if os.path.splitext(checkpoint)[1] != '.safetensors':  # sorted by name: blocks.10 comes before blocks.2
        try:
            by_order = _match_by_order(model, state_dict)
        except ValueError as e:
            reason = f'; by order, {e}'
    if by_order is None:
        advice = 'Give the architecture that it was trained with.'
        if 'pos_embed' in problem:
            advice += ' If it was trained at another image size, give its run folder.'
        classifier = getattr(get_pretrained_cfg(name), 'classifier', None)
        others = {key: value for key, value in own.items() if not key.startswith(f'{classifier}.')}
        if isinstance(classifier, str) and not _compare(others, state_dict)[0]:
            advice = f'Only its classifier differs: {name} has one linear layer, {classifier!r}.'
        raise ValueError(
            f'Checkpoint {checkpoint!r} does not fit architecture {name!r}: {problem}{reason}. {advice}')
    model.load_state_dict(by_order)
    _logger.info(
        f'{checkpoint} has other tensor names than {name}. Its tensors were loaded by order, and all shapes agree.'
        ' Activations, padding and the eps of BatchNorm may differ: check the accuracy.')


def nearest_names(name: str) -> str:
    """Return up to four timm names similar to an unknown one."""
    names = list_models()
    beginnings = [known for known in names if known.startswith(name.lower().replace('-', '_'))]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    return ', '.join(list(dict.fromkeys(beginnings + near))[:4]) or 'none'


def resolve_model(name: str, checkpoint: Optional[str] = None, flag: str = '') -> Tuple[str, Optional[str]]:
    """Return the timm name of a model and the file of its weights.

    Args:
        name: A timm name, a run folder (which becomes `local-dir:`), or a checkpoint of a run.
        checkpoint: File of the weights.
        flag: The flag for such a file, for the error of a file that does not name its architecture.

    Raises:
        ValueError: If the name is unknown, the folder has no model but run folders, or the checkpoint does not name
            its architecture.
    """
    if os.path.isfile(name) and not checkpoint and name not in timm.list_models():  # is_model() takes 'resnet18.pth'
        name, checkpoint = _architecture_of(name, flag), name
    if os.path.isdir(name) and not is_model(name):
        name = f'local-dir:{name}'
    folder = name.removeprefix('local-dir:')
    if (folder != name or os.sep in folder) and ':' not in folder and not os.path.isdir(folder):
        raise ValueError(
            f'No folder {folder!r}. Give a run folder, the name of a timm model, or hf-hub:ORG/NAME.')
    if folder != name and not _has_model(folder):
        runs = sorted(str(path.parent) for path in Path(folder).glob('*/config.json'))
        if runs:
            raise ValueError(f'{folder!r} is not a run folder. Give one of the run folders in it: {_few(runs)}.')
    source, architecture = parse_model_name(name)
    if source is None and not is_model(architecture):
        raise ValueError(f'Unknown model {name!r}. The nearest timm names: {nearest_names(architecture)}.')
    return name, checkpoint


def _has_model(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, 'config.json'))


def _architecture_of(checkpoint: str, flag: str) -> str:
    """Return the architecture that a run's checkpoint names."""
    architecture = training_args(checkpoint).get('arch')
    if architecture is None:
        folder = os.path.dirname(checkpoint) or os.curdir
        remedy = f'Give its folder, {folder}.' if _has_model(folder) else (
            f'Give its timm name, such as resnet18, and the file: {flag} {checkpoint}.' if flag else
            'Give its timm name, such as resnet18, and the file with the flag of that model: --checkpoint,'
            ' --kd-teacher-checkpoint (teacher), or --student-checkpoint and --verifier-checkpoint (data-free).')
        raise ValueError(f'File {checkpoint!r} does not name its architecture. {remedy}')
    return architecture


def training_args(checkpoint: str) -> Dict[str, Any]:
    """Return the training options in a checkpoint of timm's or our script.

    {} for other files. `arch` is the model name. `label_names` has the class names if the checkpoint holds them.
    """
    try:
        contents = load_checkpoint_metadata(checkpoint)
    except Exception:  # not such a checkpoint
        return {}
    if not isinstance(contents, Mapping) or not isinstance(contents.get('arch'), str):
        return {}
    args = contents.get('args')
    is_timms = isinstance(args, argparse.Namespace) and getattr(args, 'model', None) == contents['arch']
    names = _label_names(contents.get('classes'))
    return {
        **(vars(args) if is_timms else {}), 'arch': contents['arch'], **({'label_names': names} if names else {})}


def _label_names(classes: Any) -> List[str]:
    """Return the class names in a checkpoint of our script, in the model's order.

    [] if there are none, or a class does not have exactly one name.
    """
    indices = classes.get('indices') if isinstance(classes, Mapping) else None
    if not isinstance(indices, Mapping) or sorted(indices.values()) != list(range(len(indices))):
        return []
    return [str(name) for name in sorted(indices, key=lambda name: indices[name])]


def _create_as_trained(name: str, args: Dict[str, Any], **kwargs: Any) -> nn.Module:
    """Create a model without weights, as a training script created it.

    Args:
        name: See `load_model`.
        args: Options of the script.
        **kwargs: Arguments of `timm.create_model`, which override the options.
    """
    kwargs = {'bn_eps': args.get('bn_eps'), 'global_pool': args.get('gp'), **(args.get('model_kwargs') or {}), **kwargs}
    # the channel count comes from the weights
    size = args['input_size'][1:] if args.get('input_size') else to_2tuple(args.get('img_size'))
    given = {**args, 'in_chans': None, 'img_size': None, 'input_size': None}
    if size[0]:
        given['input_size'] = (kwargs.get('in_chans', 3), *size)
    kwargs = resolve_model_input_args(name, {} if 'img_size' in kwargs else given, **kwargs)
    model: Any = timm.create_model(kwargs.pop('model_name'), **kwargs)
    config = {**model.pretrained_cfg, **(args.get('pretrained_cfg_overlay') or {})}
    model.pretrained_cfg = {**model.pretrained_cfg, **resolve_input_data_config(model, given, config)}
    names = args.get('label_names', ())
    if len(names) == model.num_classes:
        model.pretrained_cfg['label_names'] = names
    return model


def _create_model(name: str, args: Dict[str, Any], pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model, with the options of a training script if they are known.

    Raises:
        ValueError: If the model or its weights do not exist. The message names the remedy.
    """
    try:
        return _create_as_trained(name, args, **kwargs) if args else timm.create_model(name, pretrained, **kwargs)
    except Exception as e:  # the remedy is the same for every error of the download
        reason = first_line(e)
        remedy = 'Name a trained checkpoint of it.' if pretrained else 'Check the name.'
        raise ValueError(
            f'Could not create {name!r}{" with weights" if pretrained else ""} ({type(e).__name__}: {reason}).'
            f' {remedy}') from e


def load_model(
        name: str,
        checkpoint: Optional[str] = None,
        device: Optional[torch.device] = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a timm model with trained weights and their class count.

    Args:
        name: A timm name (with `hf-hub:` and `local-dir:`), a folder with a `config.json` such as a run folder, or a
            checkpoint of a run. Without a checkpoint, the pretrained weights load.
        checkpoint: Weights of that architecture: .safetensors, a state dict, or a training checkpoint that holds one.
            A prefix of all names (`model.` in Lightning's files) is removed, and other tensors are skipped. Tensors
            with other names than timm's load by order, if every shape agrees (our choice). A training checkpoint of
            timm also sets the model's arguments and its normalisation.
        device: Device of the model.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If the name is unknown, no weights are available, or the checkpoint does not fit.
    """
    name, checkpoint = resolve_model(name, checkpoint)
    state_dict = _read_state_dict(checkpoint) if checkpoint else {}
    args = training_args(checkpoint) if checkpoint else {}
    if checkpoint:
        state_dict, shapes = _align(state_dict, name, args, checkpoint, **kwargs)
        kwargs = {**shapes, **kwargs}
    model = _create_model(name, args, pretrained=not checkpoint, **kwargs)
    if checkpoint:
        _load_weights(model, state_dict, name, checkpoint)
    return model.to(device)
