"""Training and evaluation loaders on top of timm's, with random numbers by (seed, epoch, place in the epoch)."""
import logging
from functools import partial
from itertools import islice
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from timm.data.scheduled_sampler import ScheduledBatchSampler
from timm.layers import to_2tuple
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, default_collate
from torchvision.transforms import Compose

from ..distances import attention_layers
from .augmentation import AffineJitter
from .data import evenly_spaced, image_mode, open_validation_set
from .process import SINGLE, Ranks, init_worker, model_dtype
from .seeding import EpochBatchSampler, SeededCollate, SeededDataset, SeededErasing
from .wrappers import Sample, listed_labels, set_image_mode

_logger = logging.getLogger(__name__)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image.convert(mode)


def _convert_images(dataset, in_chans: int) -> None:
    """Convert the images of a torchvision data set, which have the mode of their files; timm's convert their own."""
    if not hasattr(dataset, 'reader') and hasattr(dataset, 'transform'):
        mode = getattr(dataset, 'input_img_mode', None) or image_mode(None, in_chans)
        _apply_first(partial(_convert, mode=mode), dataset)


def _apply_first(function: Optional[Callable], dataset) -> None:
    """Apply a function to the images of a data set, before its transform."""
    if function is not None:
        transform = dataset.transform
        dataset.transform = Compose([function, transform]) if transform is not None else function


def _create_loader(
        dataset,
        data_config: Dict[str, Any],
        device: torch.device,
        use_prefetcher: bool = True,
        img_dtype: torch.dtype = torch.float32,
        affine: Optional[AffineJitter] = None,
        num_aug_splits: int = 0,
        **kwargs: Any,
):
    """Create timm's loader of batches on the device.

    Args:
        dataset: A data set of `open_dataset`.
        data_config: timm's, for size and normalisation.
        device: Device of the batches.
        use_prefetcher: Let timm's prefetcher normalise the images on the device.
        img_dtype: Dtype of the images.
        affine: Applied to each image before timm's augmentation.
        num_aug_splits: Augmented copies of each image; 0 for one.
        **kwargs: Further arguments of timm's `create_loader`.

    Raises:
        ValueError: If timm does not take the options.
    """
    source: Any = AugMixDataset(dataset, num_splits=num_aug_splits) if num_aug_splits > 1 else dataset
    try:
        loader = create_loader(
            source, data_config['input_size'], mean=data_config['mean'], std=data_config['std'], device=device,
            use_prefetcher=use_prefetcher, img_dtype=img_dtype, num_aug_splits=num_aug_splits, **kwargs)
    except (AssertionError, KeyError, RuntimeError, TypeError) as e:
        raise ValueError(
            f'timm does not take these augmentation or loader options ({type(e).__name__}: {e}).'
            ' Check --aa, --remode, --interpolation, --train-interpolation, --train-crop-mode, --scale and --ratio.'
        ) from e
    _apply_first(affine, dataset)
    _convert_images(dataset, data_config['input_size'][0])
    plain = loader.loader if use_prefetcher else loader
    plain.worker_init_fn = partial(init_worker, plain.worker_init_fn)
    plain.generator = torch.Generator().manual_seed(0)  # of the workers' seeds; must not draw from the global one
    return loader if use_prefetcher else DeviceLoader(loader, device, img_dtype)


def _check_length(dataset, batch_size: int, world_size: int) -> None:
    if hasattr(dataset, '__len__') and len(dataset) < batch_size * world_size:
        raise ValueError(
            f'The training set has {len(dataset)} images, less than one batch of {batch_size * world_size}.'
            f' Set --batch-size to {max(1, len(dataset) // world_size)} or less.')


def _collate_and_mix(mixup: Mixup, samples: List[Any]):
    return mixup(*default_collate(samples))


def create_train_loader(
        dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        ranks: Ranks = SINGLE,
        mixup: Optional[Mixup] = None,
        mixup_off_epoch: int = 0,
        num_aug_repeats: float = 0,
        image_sizes: Sequence[Any] = (),
        schedule: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> 'TrainLoader':
    """Create the training loader of batches on the device.

    Args:
        dataset: A data set of `open_dataset`.
        data_config: timm's, for size and normalisation.
        batch_size: Images per batch and process. A smaller last batch is dropped.
        device: Device of the batches.
        seed: Seed of the order, the transforms and the mixes.
        ranks: The processes that share the data.
        mixup: timm's `FastCollateMixup` for the prefetcher, its `Mixup` for a plain loader.
        mixup_off_epoch: Epoch from which on there is no mix; 0 is never.
        num_aug_repeats: Times that each image chosen for an epoch comes in it; 0 for every image once.
        image_sizes: Sizes (pixels, or height and width) to choose from for each batch; empty takes that of the model.
        schedule: Arguments of timm's `ScheduledBatchSampler`, which chooses.
        **kwargs: Arguments of `_create_loader`, and augmentation and worker arguments of timm's `create_loader`.

    Raises:
        ValueError: If there is less than one batch of images, or timm refuses the options.
    """
    schedule = {'batch_sizes': [batch_size] * len(image_sizes), **(schedule or {})}
    _check_length(dataset, min(schedule['batch_sizes'], default=batch_size), ranks.world_size)
    if kwargs.setdefault('use_prefetcher', True):
        collate_fn: Callable = mixup or fast_collate
    else:
        collate_fn = partial(_collate_and_mix, mixup) if mixup is not None else default_collate
    if isinstance(dataset, IterableDataset):
        if image_sizes or kwargs.get('num_aug_splits'):
            flag = '--train-img-sizes' if image_sizes else '--aug-splits'
            raise ValueError(f'{flag} cannot be used with a streamed data set. Remove the flag.')
        loader = _create_loader(
            dataset, data_config, device, batch_size=batch_size, is_training=True, collate_fn=collate_fn,
            persistent_workers=not mixup_off_epoch,  # a worker keeps the Mixup that it started with
            **kwargs)
        return TrainLoader(loader, mixup=mixup, mixup_off_epoch=mixup_off_epoch, seed=(seed, ranks.rank))
    batches = _build_batches(dataset, batch_size, seed, ranks, num_aug_repeats, schedule)
    if not image_sizes:  # --train-batches-per-epoch sets image_sizes, too
        _log_unused_images(len(batches.sampler), batch_size, ranks.world_size, even=mixup is not None)
    loader = _create_loader(
        dataset, data_config, device, batch_size=len(dataset),  # its batches are not used
        is_training=True, input_size_choices=image_sizes or None, **kwargs)
    return _seed_loader(loader, batches, SeededCollate(collate_fn, seed, mixup, mixup_off_epoch), seed, ranks)


def _build_batches(
        dataset,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        num_aug_repeats: float,
        schedule: Dict[str, Any],
) -> Any:
    """Build the sampler of whole batches of this process, for images of one size or by a schedule of sizes."""
    sampler: Any = DistributedSampler(dataset, ranks.world_size, ranks.rank, seed=seed)
    if num_aug_repeats:
        sampler = _SeededRepeats(dataset, ranks.world_size, ranks.rank, num_repeats=num_aug_repeats)
        sampler.seed = seed
    batches: Any = BatchSampler(sampler, batch_size, drop_last=True)
    if schedule['batch_sizes']:
        batches = ScheduledBatchSampler(sampler, seed=seed, **schedule)
    if not len(batches):
        raise ValueError(
            f'An epoch of {len(sampler)} images has no whole batch. Set --batch-size or --aug-repeats lower.')
    return batches


def _seed_loader(loader, batches, collate_fn: SeededCollate, seed: int, ranks: Ranks) -> 'TrainLoader':
    """Give timm's loader other batches, and random numbers as in `seeding`."""
    plain, sampler = loader.loader, EpochBatchSampler(batches, ranks.rank, ranks.world_size)
    loader.loader = DataLoader(
        SeededDataset(plain.dataset, seed),
        batch_sampler=sampler,
        num_workers=plain.num_workers,
        collate_fn=collate_fn,
        pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn,
        persistent_workers=plain.persistent_workers,
        generator=plain.generator,
    )
    if getattr(loader, 'random_erasing', None) is None:
        return TrainLoader(loader, [sampler])
    loader.random_erasing = SeededErasing(loader.random_erasing, seed, loader.device, ranks.rank, ranks.world_size)
    return TrainLoader(loader, [sampler, loader.random_erasing])


def _log_unused_images(num_images: int, batch_size: int, world_size: int, even: bool) -> None:
    """Log how many images an epoch skips because its last batch is not full, and the batch size that skips fewest.

    Args:
        num_images: Images of an epoch, per process.
        batch_size: Per process.
        world_size: Number of processes.
        even: Whether batches have to be even, as Mixup needs them.
    """
    unused = num_images % batch_size
    if not unused or batch_size > num_images:
        return
    sizes = range(batch_size, 0, -1 - even)
    better = min(sizes[:len(sizes) // 2 + 1], key=lambda size: num_images % size)  # the largest of the best
    share = unused / num_images
    remedy = f' --batch-size {better} skips {num_images % better * world_size}.' if better != batch_size else ''
    _logger.log(
        logging.WARNING if share > 0.1 else logging.INFO,
        f'Each epoch skips {unused * world_size} of {num_images * world_size} images ({100 * share:.0f} %, chosen at'
        f' random), because its last batch is not full.{remedy}')


class _SeededRepeats(RepeatAugSampler):
    """timm's repeated augmentation, in an order that depends on the seed as well as on the epoch."""
    seed = 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed * 1_000_003 + epoch)


class TrainLoader:
    """Training batches on the device, from any batch of an epoch on.

    Args:
        loader: Batches on the device.
        parts: Its parts with a `set_epoch`. Without them, as for streamed data sets, an epoch that is continued reads
            the batches that were there before, and drops them.
        mixup: Mixup of a stream, which has no parts.
        mixup_off_epoch: First epoch without mixing; 0 mixes in all epochs.
        seed: Seed and rank of a stream, which seed its workers together with the epoch. Persistent workers keep the
            seed of the epoch in which they started.
    """

    def __init__(
            self,
            loader,
            parts: Sequence[Any] = (),
            mixup: Optional[Mixup] = None,
            mixup_off_epoch: int = 0,
            seed: Sequence[int] = (0, 0),
    ) -> None:
        self.loader = loader
        self.parts = parts
        self.mixup = mixup
        self.mixup_off_epoch = mixup_off_epoch
        self.seed = seed
        self.skip = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch, counted from 0, and the number of batches to skip at its start."""
        for part in self.parts:
            part.set_epoch(epoch, first_batch)
        if not self.parts:
            self.skip = first_batch
            seeds = np.random.SeedSequence((*self.seed, epoch)).generate_state(1)
            self.loader.loader.generator.manual_seed(int(seeds[0]))
            if self.mixup is not None:
                self.mixup.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
            if hasattr(self.loader.dataset, 'set_epoch'):
                self.loader.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return islice(iter(self.loader), self.skip, len(self.loader) or None)


def create_eval_loader(
        dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        ranks: Ranks = SINGLE,
        **kwargs: Any,
):
    """Evaluation loader of batches on the device: every image once, in order, with the crop of `data_config`.

    Several processes take turns. The first images come again at the end, so that all have as many.
    """
    return _create_loader(
        dataset,
        data_config,
        device=device,
        batch_size=batch_size,
        distributed=ranks.distributed,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **kwargs,
    )


class DeviceLoader:
    """A plain loader that moves its batches to the device, as timm's prefetcher does by itself."""

    def __init__(self, loader, device: torch.device, img_dtype: torch.dtype = torch.float32) -> None:
        self.loader = loader
        self.device = device
        self.img_dtype = img_dtype

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self):
        return self.loader.dataset

    @property
    def sampler(self):
        return self.loader.sampler

    def __iter__(self):
        for images, target in self.loader:
            yield (
                images.to(self.device, self.img_dtype, non_blocking=True),
                target.to(self.device, non_blocking=True),
            )


NUM_DISTANCE_IMAGES = 32
NUM_TEACHER_IMAGES = 2000
MIN_CLASS_IMAGES = 15  # per class, with which `find_order` finds two swapped classes


def build_mixup(args, num_classes: int) -> Optional[Mixup]:
    """Build timm's Mixup and CutMix, for the prefetcher's collate function or for whole batches; None if off."""
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


def _check_cutmix(minmax: Optional[Sequence[float]], size: Sequence[int]) -> None:
    """Check --cutmix-minmax for images of (H, W) pixels.

    Raises:
        ValueError: If the least and the greatest side are the same number of pixels, from which timm cannot draw.
    """
    for side in size if minmax else ():
        least, greatest = (int(side * share) for share in minmax or ())
        if least == greatest:
            raise ValueError(
                f'--cutmix-minmax: the least and the greatest side are both {least} of {side} pixels. Set shares that'
                ' are further apart.')


def train_interpolation(args, data_config: Dict[str, Any]) -> str:
    """Return the interpolation of the training images."""
    return (not args.no_aug and args.train_interpolation) or data_config['interpolation']


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
    """Build the training loader, with --train-img-sizes and --train-batch-sizes."""
    set_image_mode(dataset, image_mode(args.input_img_mode, data_config['input_size'][0]))
    for size in args.train_img_sizes or [data_config['input_size'][1:]]:
        _check_cutmix(args.cutmix_minmax, to_2tuple(size))
    num_batches = args.train_batches_per_epoch
    if num_batches and isinstance(dataset, IterableDataset):
        _logger.warning(
            '--train-batches-per-epoch has no effect on a streamed data set. An epoch reads all of its images.')
        num_batches = None
    sizes = args.train_img_sizes or (num_batches and [data_config['input_size'][-2:]]) or ()
    schedule = dict(
        batch_sizes=args.train_batch_sizes or [args.batch_size] * len(sizes),
        choice_weights=args.train_size_probs,
        choice_schedule=args.train_size_schedule,
        schedule_epochs=args.epochs,
        schedule_spread=args.train_size_schedule_spread,
        schedule_random_mix=args.train_size_random_mix,
        num_batches=num_batches,
    )
    return create_train_loader(
        dataset,
        data_config,
        args.batch_size,
        seed=args.seed,
        mixup=mixup,
        mixup_off_epoch=args.mixup_off_epoch,
        num_aug_repeats=args.aug_repeats,
        image_sizes=sizes,
        schedule=schedule,
        worker_seeding=args.worker_seeding,
        affine=AffineJitter(args.affine_aug, data_config['mean']) if args.affine_aug else None,
        num_aug_splits=args.aug_splits,
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
        interpolation=train_interpolation(args, data_config),
        **_loader_kwargs(args, device, ranks),
    )


def build_eval_loader(args, dataset, data_config: Dict[str, Any], device: torch.device, ranks: Ranks):
    """Build the validation loader; None without a validation set."""
    if dataset is None:
        return None
    set_image_mode(dataset, image_mode(args.input_img_mode, data_config['input_size'][0]))
    return create_eval_loader(
        dataset, data_config, args.validation_batch_size or args.batch_size, **_loader_kwargs(args, device, ranks))


def build_teacher_loader(
        args,
        train_set,
        eval_set,
        num_classes: int,
        data_config: Dict[str, Any],
        device: torch.device,
        ranks: Ranks,
):
    """Build a loader of training images without augmentation, to check the teacher.

    Returns:
        The loader; None without a teacher, for a stream, or if there are enough validation images of every class.
    """
    if not args.kd_model_name or isinstance(train_set, IterableDataset) or isinstance(eval_set, IterableDataset):
        return None
    if eval_set is not None:
        labels = listed_labels(eval_set)
        counts = [len(eval_set) / num_classes] if labels is None else np.bincount(labels, minlength=num_classes)
        if min(counts) >= MIN_CLASS_IMAGES:
            return None
    images = Sample(train_set, evenly_spaced(len(train_set), NUM_TEACHER_IMAGES))
    return build_eval_loader(args, images, data_config, device, ranks)


def build_distance_images(args, eval_set, data_config: Dict[str, Any], model: nn.Module, device: torch.device):
    """Return the validation images (B, C, H, W) of --track-attention-distance; None without it.

    They are spread over the validation set. A stream gives its first ones.

    Raises:
        ValueError: If there are no validation images, or the model's attention cannot be computed.
    """
    if not args.track_attention_distance:
        return None
    if eval_set is None:
        raise ValueError('--track-attention-distance looks at validation images. Set --val-split.')
    attention_layers(model)
    if isinstance(eval_set, IterableDataset):
        eval_set = open_validation_set(args)  # the other's reader would remember that it has begun, in its workers too
        set_image_mode(eval_set, image_mode(args.input_img_mode, data_config['input_size'][0]))
    else:
        eval_set = Sample(eval_set, evenly_spaced(len(eval_set), NUM_DISTANCE_IMAGES))
    kwargs = dict(_loader_kwargs(args, device, SINGLE), num_workers=0)
    return next(iter(create_eval_loader(eval_set, data_config, NUM_DISTANCE_IMAGES, **kwargs)))[0]
