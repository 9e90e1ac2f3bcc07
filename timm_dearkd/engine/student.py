"""The student, and the model to evaluate, from the options."""
import contextlib
import logging
from typing import Any, Callable, Collection, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.model_config import resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import get_model_input_config, parse_model_name, resolve_model_input_args, safe_model_name

from distill_hooks.checkpoint import why_unreadable
from distill_hooks.errors import one_line

from ..rel_pos import AdaptiveRelPos
from .checkpoints import EXPORT_NAME, read_classes
from .data import (
    check_label_gaps,
    check_labels,
    class_indices,
    count_classes,
    dataset_kwargs,
    open_dataset,
    open_eval_dataset,
    open_validation_set,
)
from .image_folder import class_order, normal_name
from .process import model_dtype
from .run_folder import why_no_config

_logger = logging.getLogger(__name__)


def build_student(
        args,
        dataset,
        device: torch.device,
        create_model: Callable[..., Any],
        num_classes: Optional[int] = None,
) -> Tuple[Any, Dict[str, Any]]:
    """Build the model to train or to evaluate, and timm's data configuration for it.

    Args:
        args: The options.
        dataset: Gives the number of classes if nothing else does.
        device: Device of the model.
        create_model: timm's `create_model`, or the user's own.
        num_classes: Number of classes; None takes --num-classes.

    Raises:
        ValueError: If the options do not fit the model.
    """
    if num_classes is None:
        num_classes = args.num_classes
    if num_classes is None and not args.eval_only:
        check_label_gaps(dataset, args.class_map)
        num_classes = count_classes(dataset)
        if num_classes is not None:
            _logger.info(f'--num-classes not given: {num_classes}, as the data set has.')
    model = create_student(args, num_classes, create_model)
    _complete_attributes(model, num_classes)
    if not args.eval_only:  # evaluation matches the labels with the model's later
        if num_classes is None:
            _logger.warning(
                f'The data set does not tell its classes, so the model has {model.num_classes}. Set --num-classes.')
        check_labels(dataset, model.num_classes)
        reason = why_no_config(model)
        if reason:
            _logger.warning(
                f'timm cannot create this {type(model).__name__} by name: {reason}. So the run writes no config.json:'
                f' {EXPORT_NAME} has the weights alone.')
        if torch.finfo(model_dtype(args)).bits < 32 and any(isinstance(m, AdaptiveRelPos) for m in model.modules()):
            _logger.warning(
                f'--model-dtype {args.model_dtype} rounds the weights after every update. Alpha of MHCA starts at 1,'
                ' where small steps are lost, so it does not learn. Use --amp instead.')
    check_img_size(model, args.train_img_sizes or ())
    model.to(device=device, dtype=model_dtype(args))
    data_config = resolve_input_data_config(model, args=dict(vars(args)), verbose=True)
    num_params = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {safe_model_name(args.model)}: {num_params:,} parameters, {model.num_classes} classes')
    return model, data_config


def create_student(args, num_classes: Optional[int], create_model: Callable[..., Any]) -> Any:
    """Create the model, with the arguments that the options give it.

    Raises:
        ValueError: If the options do not fit the model.
    """
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    overlay.update(args.pretrained_cfg_overlay)
    overrides = dict(
        num_classes=num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        rpe_drop_rate=args.dearkd_rpe_drop,
        rpe_drop_mode=args.dearkd_rpe_drop_mode,
        pretrained_cfg_overlay=overlay or None,
    )
    try:
        kwargs = resolve_model_input_args(args.model, dict(vars(args)), **{**overrides, **args.model_kwargs})
        for flag in ('rpe_drop', 'rpe_drop_mode'):
            if getattr(args, f'dearkd_{flag}') is not None and 'dearkd' not in kwargs['model_name']:
                raise ValueError(f'--dearkd-{flag.replace("_", "-")} needs MHCA blocks. Use a dearkd_* model.')
        model: Any = create_model(
            kwargs.pop('model_name'),
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            pretrained_cfg_overlay=overlay or None,  # again: `dearkd_from` merges it into the configuration of its base
            **kwargs,
        )
        if 0 in (getattr(getattr(model, 'patch_embed', None), 'grid_size', None) or ()):
            raise ValueError(f'the images are smaller than a patch, {model.patch_embed.patch_size}. Set --img-size.')
        _adapt_student(args, model)
    except (AssertionError, FileNotFoundError, KeyError, RuntimeError, TypeError, ValueError) as e:
        remedy, file = '', args.initial_checkpoint or args.pretrained_path
        if file and 'Unsupported globals: ' in str(e):
            raise ValueError(why_unreadable(file, e)) from e
        if args.initial_checkpoint and 'size mismatch' in str(e):
            remedy = (
                ' The file is of other classes than the images, or of another --img-size.' if args.eval_only else
                ' Weights of other classes or another image size go in by --pretrained-path, with a new head.')
        raise ValueError(f'Could not create --model {args.model}: {one_line(e)}{remedy}') from e
    if not ((_names_weights(args) and args.pretrained) or 'license' in overlay):
        # the licence of a registered architecture is for its code or its published weights, not for this run's
        model.pretrained_cfg = {**(getattr(model, 'pretrained_cfg', None) or {}), 'license': None}
    return model


def _names_weights(args) -> bool:
    """Return whether --model is a place of weights: local-dir:DIR or hf-hub:ORG/NAME."""
    return parse_model_name(args.model)[0] is not None


def warn_of_new_weights(args) -> None:
    """Warn if --model names weights, and a new run does not load any."""
    if _names_weights(args) and not (
            args.pretrained or args.pretrained_path or args.pretrained_cfg_overlay or args.initial_checkpoint):
        _logger.warning(
            f'{args.model} gives only the architecture. The weights are new. To load its weights, add --pretrained.')


def build_evaluation(args, device: torch.device, create_model: Callable[..., Any]):
    """Build a model to evaluate, its data configuration, and the validation set with the class indices of training."""
    eval_set = open_validation_set(args)
    trained = {} if args.class_map else read_classes(args.initial_checkpoint).indices
    num_classes = None
    if args.initial_checkpoint:
        if not trained:
            eval_set = _label_as_training(args, eval_set)
        num_classes = args.num_classes or (max(trained.values()) + 1 if trained else count_classes(eval_set))
    model, data_config = build_student(args, eval_set, device, create_model, num_classes)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    own = cfg.get('num_classes')
    if not args.initial_checkpoint and own is not None and args.num_classes not in (None, own):
        raise ValueError(f'--num-classes is {args.num_classes}, but {args.model} knows {own} classes. Remove the flag.')
    names = () if args.class_map else cfg.get('label_names') or ()
    found = {key: normal_name(str(key)) for key in class_indices(eval_set)}
    known = trained or {name: index for index, name in enumerate(names)}
    if not known and not args.class_map:
        known = imagenet_synsets(model, found.values())
    known = {normal_name(str(name)): index for name, index in known.items()}
    unknown = class_order(set(found.values()) - set(known))
    if known and found and not unknown:
        indices = {key: known[name] for key, name in found.items()}
        if indices != class_indices(eval_set):
            eval_set = open_validation_set(args, indices)
    elif trained and not found:  # shards, which know their classes by a class map alone
        _logger.info('The labels of the images are numbers. They are taken as class indices of the model.')
        eval_set = open_validation_set(args, trained)
    elif known and found and (trained or not args.initial_checkpoint):
        raise ValueError(
            f'Split {args.val_split!r} has classes that the model does not know: {", ".join(unknown[:5])}.'
            ' Move them away, or give --class-map.')
    elif not args.initial_checkpoint:
        with contextlib.suppress(ValueError):  # the weights may be of other images, with other classes
            eval_set = _label_as_training(args, eval_set)
    count = count_classes(eval_set)
    if found and not known and not args.class_map and count not in (None, model.num_classes):
        _logger.warning(
            f'The images have {count} classes, and {args.model} has {model.num_classes} without names. The images count'
            f' as its first {count} classes. If they are of others, give --class-map.')
    check_labels(eval_set, model.num_classes, 'Move away those that it does not know, or give --class-map.')
    return model, data_config, eval_set


def imagenet_synsets(model: nn.Module, folders: Collection[str]) -> Dict[str, int]:
    """Return the class index of each ImageNet synset that a model knows; {} if not all class folders are synsets."""
    subset = infer_imagenet_subset(model)
    synsets = ImageNetInfo(subset).label_names() if subset else []
    return {name: index for index, name in enumerate(synsets)} if set(folders) <= set(synsets) else {}


def _label_as_training(args, eval_set):
    """Return the validation set with the class indices of the training set, if that exists.

    A class without validation images would shift the indices of the others.

    Raises:
        ValueError: If a validation class is not a training class.
    """
    root, kwargs = args.data_dir or args.data, dict(dataset_kwargs(args), is_training=False)
    try:
        train_set = open_dataset(args.dataset, root, args.train_split, **kwargs)
    except (OSError, ValueError):
        return eval_set
    return open_eval_dataset(
        train_set, args.dataset, root, args.val_split, num_samples=args.val_num_samples, **kwargs)


def check_img_size(model: nn.Module, train_sizes: Sequence[int] = ()) -> None:
    """Refuse image sizes that a ViT does not take, and warn of pixels that it ignores.

    Args:
        model: The model.
        train_sizes: Further sizes that it is trained with.

    Raises:
        ValueError: If a size of a ViT with `dynamic_img_size` is not a multiple of the patch size, or another ViT is
            trained at several sizes.
    """
    patch_embed: Any = getattr(model, 'patch_embed', None)
    if not getattr(patch_embed, 'patch_size', None):
        return
    patch_size = to_2tuple(patch_embed.patch_size)
    proj = getattr(patch_embed, 'proj', None)
    # overlapping or padded patches (PVT v2, XCiT) reach every pixel and take any size
    is_plain = isinstance(proj, nn.Conv2d) and proj.stride == proj.kernel_size and proj.padding in ((0, 0), 'valid')
    dynamic = getattr(model, 'dynamic_img_size', False)
    if train_sizes and not dynamic and (is_plain or hasattr(model, 'dynamic_img_size')):
        raise ValueError(
            f'{type(model).__name__} takes images of one size. Add --model-kwargs dynamic_img_size=True for'
            ' --train-img-sizes.')
    if not is_plain:
        return
    padded = getattr(patch_embed, 'dynamic_img_pad', False)
    for height, width in (get_model_input_config(model)['input_size'][1:], *((size, size) for size in train_sizes)):
        rest = height % patch_size[0], width % patch_size[1]
        if padded or not any(rest):
            continue
        flag = '--train-img-sizes' if height in train_sizes else '--img-size'
        message = f'The image size {height}x{width} is no multiple of the patch size {patch_size[0]}x{patch_size[1]}.'
        smaller = height // patch_size[0] * patch_size[0]
        sizes = f'{smaller} or {smaller + patch_size[0]}' if smaller else f'{patch_size[0]}'
        if dynamic:
            raise ValueError(f'{message} Set {flag} {sizes}.')
        _logger.warning(
            f'{message} The model ignores the last {rest[0]} rows and {rest[1]} columns. To use them, set {flag}'
            f' {sizes}.')


def _complete_attributes(model: Any, num_classes: Optional[int]) -> None:
    """Add the attributes that timm's functions expect to a model that is not from timm."""
    if not hasattr(model, 'num_classes'):
        if num_classes is None:
            raise ValueError(f'{type(model).__name__} has no num_classes. Set --num-classes.')
        model.num_classes = num_classes
    if not hasattr(model, 'pretrained_cfg'):
        model.pretrained_cfg = {}


def _adapt_student(args, model: Any) -> None:
    given = args.head_init_scale is not None or args.head_init_bias is not None
    heads = model.get_classifier() if given and not args.eval_only else ()
    for head in heads if isinstance(heads, tuple) else (heads,):  # one, or two of a distilled ViT
        if not all(isinstance(getattr(head, key, None), torch.Tensor) for key in ('weight', 'bias')):
            raise ValueError('--head-init-scale and --head-init-bias need a head with a weight and a bias.')
        with torch.no_grad():
            if args.head_init_scale is not None:
                head.weight.mul_(args.head_init_scale)
                head.bias.mul_(args.head_init_scale)
            if args.head_init_bias is not None:
                nn.init.constant_(head.bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
