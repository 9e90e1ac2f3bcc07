"""From options to data sets and loaders."""
import logging
import os
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from PIL import ImageMode
from timm.data import FastCollateMixup, Mixup
from torch.utils.data import IterableDataset, Subset

from ..distances import attention_layers
from .data import (
    UNKNOWN_CLASSES,
    Classes,
    ClassFraction,
    SkipUnreadable,
    folder_of,
    is_image_folder,
    open_dataset,
    open_eval_dataset,
    open_with_classes,
    relabel,
    set_image_mode,
    spread,
)
from .device import SINGLE, Ranks
from .image_folder import find_splits
from .loader import TrainLoader, create_eval_loader, create_train_loader

__all__ = [
    'build_datasets', 'build_distance_images', 'build_eval_loader', 'build_mixup', 'build_train_loader',
    'dataset_kwargs', 'images_per_update', 'model_dtype', 'open_validation_set',
]

_logger = logging.getLogger(__name__)

NUM_DISTANCE_IMAGES = 32


def dataset_kwargs(args) -> Dict[str, Any]:
    """Options of both data sets."""
    return dict(
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or 'RGB',
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        class_map=args.class_map,
    )


def open_validation_set(args, class_to_idx: Optional[Dict[str, int]] = None):
    """The validation split, with its own labels or those that are given."""
    kwargs = dict(dataset_kwargs(args), is_training=False, num_samples=args.val_num_samples)
    place = args.dataset, args.data_dir or args.data, args.val_split
    if class_to_idx is None:
        return open_dataset(*place, **kwargs)
    del kwargs['class_map']
    return relabel(*place, class_to_idx, **kwargs)


def build_datasets(args, trained: Classes = UNKNOWN_CLASSES) -> Tuple[Any, Any]:
    """Open the training and the validation set; without a --val-split, there is no validation set.

    Args:
        args: The options.
        trained: Classes of the run that is resumed.
    """
    common, root = dataset_kwargs(args), args.data_dir or args.data
    train_set = open_with_classes(
        trained, args.dataset, root, args.train_split, is_training=True,
        repeats=args.epoch_repeats, num_samples=args.train_num_samples, **common)
    if not isinstance(train_set, IterableDataset):
        for name, instead in (
                ('train_num_samples', ' --train-fraction takes a share of the images.'), ('val_num_samples', ''),
                ('epoch_repeats', '')):
            if getattr(args, name):
                _logger.warning(
                    f'--{name.replace("_", "-")} is for streamed data sets, and does nothing here.{instead}')
    if args.train_fraction < 1.:
        whole = train_set
        train_set = ClassFraction(
            whole.dataset if isinstance(whole, SkipUnreadable) else whole, args.train_fraction, args.fraction_seed,
            keep_length=args.fraction_keep == 'steps')
        if isinstance(whole, SkipUnreadable):  # so that the next image is one of the fraction
            train_set = SkipUnreadable(train_set, whole.input_img_mode)
        _logger.info(f'Training on {len(train_set.indices)} images, {100 * train_set.share:.3g} % of all.')
    if not args.val_split:
        return train_set, None
    try:
        eval_set = open_eval_dataset(
            train_set, args.dataset, root, args.val_split, is_training=False,
            num_samples=args.val_num_samples, **common)
    except FileNotFoundError as e:
        raise FileNotFoundError(f'{e} --val-split "" trains without validation images.') from e
    folders = {os.path.realpath(str(folder_of(dataset))) for dataset in (train_set, eval_set)}
    if is_image_folder(args.dataset) and len(folders) == 1:
        _logger.warning(
            f'{root} has no splits, so the validation images are those of the training, and their accuracy says little.'
            f' {_advise_splits(root)}')
    return train_set, eval_set


def _advise_splits(root: str) -> str:
    parent = os.path.normpath(os.path.join(root, os.pardir))
    splits = find_splits(parent)
    if len(splits) > 1 and os.path.basename(os.path.abspath(root)) in splits:
        return f'Did you mean {parent}?'
    return f'Make {root}/train and {root}/validation.'


def build_mixup(args, num_classes: int) -> Optional[Mixup]:
    """timm's Mixup/CutMix, as the prefetcher's collate function or for whole batches; None when off."""
    if not (args.mixup > 0. or args.cutmix > 0. or args.cutmix_minmax):
        return None
    return (Mixup if args.no_prefetcher else FastCollateMixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def model_dtype(args) -> torch.dtype:
    return getattr(torch, args.model_dtype or 'float32')


def images_per_update(args, ranks: Ranks) -> int:
    """Images that all processes together take an optimizer step with."""
    return args.batch_size * args.grad_accum_steps * ranks.world_size


def _loader_kwargs(args, device: torch.device, ranks: Ranks) -> Dict[str, Any]:
    return dict(
        device=device,
        ranks=ranks,
        num_workers=args.workers,
        pin_memory=device.type == 'cuda' if args.pin_mem is None else args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=model_dtype(args),
    )


def build_train_loader(
        args,
        dataset,
        data_config: Dict[str, Any],
        mixup: Optional[Mixup],
        device: torch.device,
        ranks: Ranks,
) -> TrainLoader:
    """The training loader, with the input sizes and batch sizes that are asked for."""
    set_image_mode(dataset, _image_mode(args, data_config))
    sizes = args.train_img_sizes or (args.train_batches_per_epoch and [data_config['input_size'][-2:]]) or None
    return create_train_loader(
        dataset,
        data_config,
        args.batch_size,
        seed=args.seed,
        mixup=mixup,
        mixup_off_epoch=args.mixup_off_epoch,
        num_aug_splits=args.aug_splits,
        num_aug_repeats=args.aug_repeats,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
        use_multi_epochs_loader=args.use_multi_epochs_loader and not sizes,  # ours keeps its workers anyway
        worker_seeding=args.worker_seeding,
        input_size_choices=sizes,
        batch_size_choices=args.train_batch_sizes if sizes else None,
        batch_choice_weights=args.train_size_probs,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        **_loader_kwargs(args, device, ranks),
    )


def build_eval_loader(args, dataset, data_config: Dict[str, Any], device: torch.device, ranks: Ranks):
    """The validation loader; None without a validation set."""
    if dataset is None:
        return None
    set_image_mode(dataset, _image_mode(args, data_config))
    return create_eval_loader(
        dataset, data_config, args.validation_batch_size or args.batch_size, **_loader_kwargs(args, device, ranks))


def build_distance_images(args, eval_set, data_config: Dict[str, Any], model: nn.Module, device: torch.device):
    """The validation images (B, C, H, W) that --track-attention-distance looks at; None without it.

    They are spread over the validation set; of a stream they are the first.

    Raises:
        ValueError: There are none, or the model's attention can't be seen.
    """
    if not args.track_attention_distance:
        return None
    if eval_set is None:
        raise ValueError('--track-attention-distance looks at validation images. Set --val-split.')
    attention_layers(model)
    if isinstance(eval_set, IterableDataset):
        eval_set = open_validation_set(args)  # the other's reader would remember that it has begun, in its workers too
        set_image_mode(eval_set, _image_mode(args, data_config))
    else:
        eval_set = Subset(eval_set, spread(len(eval_set), NUM_DISTANCE_IMAGES))
    kwargs = dict(_loader_kwargs(args, device, SINGLE), num_workers=0)
    return next(iter(create_eval_loader(eval_set, data_config, NUM_DISTANCE_IMAGES, **kwargs)))[0]


def _image_mode(args, data_config: Dict[str, Any]) -> str:
    in_chans = data_config['input_size'][0]
    mode = args.input_img_mode or {1: 'L', 3: 'RGB'}.get(in_chans)
    if mode is None:  # CMYK and RGBA both have 4
        raise ValueError(
            f'The model takes {in_chans} channels. Say in which mode the images are read, CMYK or RGBA for 4 channels:'
            ' --input-img-mode.')
    try:
        bands = ImageMode.getmode(mode).bands
    except KeyError:
        raise ValueError(f'--input-img-mode {mode} is none of Pillow, expected RGB, L, CMYK, RGBA, ...') from None
    if len(bands) != in_chans:
        raise ValueError(f'--input-img-mode {mode} gives another number of channels than the model takes, {in_chans}.')
    return mode
