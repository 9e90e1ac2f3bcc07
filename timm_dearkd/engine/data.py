"""Data sets and loaders of train.py, made of timm's."""
import logging
import os
from functools import partial
from itertools import islice
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import AugMixDataset, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from timm.models import get_model_input_config
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate
from torchvision.transforms import Compose

from .device import SINGLE, Ranks
from .interrupt import init_worker
from .seeding import EpochBatchSampler, SeededCollate, SeededDataset, SeededErasing

__all__ = [
    'ClassFraction', 'DeviceLoader', 'SkipUnreadable', 'TrainLoader', 'check_img_size', 'check_labels', 'class_names',
    'create_eval_loader', 'create_train_loader', 'open_dataset', 'open_eval_dataset', 'set_image_mode',
]

_logger = logging.getLogger(__name__)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image.convert(mode)


def open_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open a split of a data set by timm's `create_dataset`.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: timm can't open it, or it is empty.
    """
    if not name and not root:
        raise ValueError('No data set given. Name an image folder (train.py DIR) or a --dataset.')
    if not name and root and not os.path.exists(root):
        raise FileNotFoundError(f'No data set at {root!r}. Expected an image folder {root}/{split}/CLASS/IMAGE.')
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as e:
        what = f'data set {name!r} in {root!r}' if name else f'image folder {root!r}'
        raise ValueError(
            f'Could not open split {split!r} of {what}: {" ".join(str(e).split()).rstrip(".")}.'
            + ('' if name else ' Image folders look like DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE.')) from e
    found = getattr(getattr(dataset, 'reader', None), 'root', None)
    if not name and root and split and found is not None and os.path.abspath(found) == os.path.abspath(root):
        splits = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
        if {'train', 'val', 'validation'} & set(splits):  # timm would take the splits for classes
            raise ValueError(f'No split {split!r} in image folder {root!r}. There are: {", ".join(splits)}.')
    if kwargs.get('is_training') and isinstance(found, str) and os.path.isdir(found) and not kwargs.get('class_map'):
        _check_class_folders(found, _class_to_idx(dataset))
    return SkipUnreadable(dataset) if isinstance(dataset, ImageDataset) else dataset


def _check_class_folders(root: str, class_to_idx: Dict[str, int]) -> None:
    """timm numbers the folders that have images, so an empty one would shift the classes behind it unseen."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name) if class_to_idx else ():
        if not entry.is_dir() or entry.name in class_to_idx or entry.name.startswith('.'):
            continue
        if not any(folder in class_to_idx for _, folders, _ in os.walk(entry.path) for folder in folders):
            raise ValueError(f'Class folder {entry.path!r} has no images. Add some, or remove the folder.')


def _class_to_idx(dataset) -> Dict[str, int]:
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}


def open_eval_dataset(train_set, name: str, root: Optional[str], split: str, class_map: str = '', **kwargs: Any):
    """Open the validation split with the labels of the training set.

    A class without validation images must not shift the labels of the others, so the classes of a training folder
    serve as the class map.

    Raises:
        ValueError: A validation folder with a class that training does not know.
    """
    dataset = open_dataset(name, root, split, class_map=class_map, **kwargs)
    known, found = _class_to_idx(train_set), _class_to_idx(dataset)
    if not class_map and known and found and known != found:
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise ValueError(
                f'Split {split!r} has classes that the training set has not: {", ".join(unknown[:5])}.'
                ' Rename or remove their folders, or name the labels with --class-map.')
        dataset = open_dataset(name, root, split, class_map=known, **kwargs)
    return dataset


class _Wrapper(Dataset):
    """Another data set around one, whose transform and attributes it has."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform) -> None:
        self.dataset.transform = transform

    def __getattr__(self, name: str):
        if name.startswith('__') or name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SkipUnreadable(_Wrapper):
    """A timm data set that names the files it can not read, once each, and takes the next image instead.

    Args:
        dataset: timm's `ImageDataset`, which takes the next image too, but tells its number only; or a fraction of one.
        max_skips: How many images in a row may be unreadable.

    Raises:
        OSError: More than that are.
    """

    def __init__(self, dataset, max_skips: int = 10) -> None:
        super().__init__(dataset)
        source: Any = dataset
        while isinstance(source, _Wrapper):
            source = source.dataset
        source._max_retries = 1
        self.max_skips = max_skips
        self.unreadable: set = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        for _ in range(self.max_skips):
            try:
                return self.dataset[index]
            except RuntimeError as e:
                if not str(e).startswith('Failed to load'):
                    raise
            name = self.dataset.filename(index, absolute=True)
            if name not in self.unreadable:
                self.unreadable.add(name)
                _logger.warning(f'Unreadable image {name!r}: the next one takes its place. Repair or remove it.')
            index = (index + 1) % len(self.dataset)
        raise OSError(f'{self.max_skips} images in a row can not be read, the last one is {name!r}.')


class ClassFraction(_Wrapper):
    """The same share of every class of a data set, for training on little data.

    The images are the first ones of a permutation per class, so that a smaller share is part of a larger one.

    Args:
        dataset: A map-style data set that knows its labels without opening the images.
        fraction: Share of each class, rounded, at least one image.
        seed: Seed of the permutations.
        keep_length: Repeat the images until there are as many as before, so that an epoch has as many steps.

    Raises:
        ValueError: A data set that does not list its labels.
    """

    def __init__(self, dataset, fraction: float, seed: int = 0, keep_length: bool = False) -> None:
        super().__init__(dataset)
        reader: Any = getattr(dataset, 'reader', None)
        labels = getattr(reader, 'targets', None) or getattr(dataset, 'targets', None)
        if labels is None and hasattr(reader, 'samples'):
            labels = [sample[1] for sample in reader.samples]
        if labels is None:
            raise ValueError(
                '--train-fraction needs a data set that lists its labels: an image folder, or one of torchvision.')
        labels = np.asarray(labels)
        kept = []
        for label in np.unique(labels):
            members = np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
            kept.append(members[:max(1, round(fraction * len(members)))])
        self.indices = np.sort(np.concatenate(kept))
        self.length = len(labels) if keep_length else len(self.indices)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        if not 0 <= index < self.length:
            raise IndexError(index)  # what ends an iteration
        return self.dataset[int(self.indices[index % len(self.indices)])]

    def filename(self, index: int, **kwargs: Any) -> str:
        return self.dataset.filename(int(self.indices[index % len(self.indices)]), **kwargs)


def set_image_mode(dataset, mode: str) -> None:
    """Let a timm data set hand out images in this PIL mode."""
    while isinstance(dataset, _Wrapper):
        dataset = dataset.dataset
    for source in (dataset, getattr(dataset, 'reader', dataset)):
        if hasattr(source, 'input_img_mode'):
            source.input_img_mode = mode


def class_names(dataset) -> Optional[List[str]]:
    """Class names in the order of their indices, where the data set knows them."""
    class_to_idx = _class_to_idx(dataset)
    if not class_to_idx or sorted(class_to_idx.values()) != list(range(len(class_to_idx))):
        return None  # unknown, or a class map with gaps or with several names for a class
    return [str(name) for name in sorted(class_to_idx, key=lambda name: class_to_idx[name])]


def _create_loader(dataset, data_config: Dict[str, Any], **kwargs: Any):
    try:
        loader = create_loader(
            dataset,
            input_size=data_config['input_size'],
            mean=data_config['mean'],
            std=data_config['std'],
            **kwargs,
        )
    except (AssertionError, KeyError, RuntimeError, TypeError) as e:
        raise ValueError(
            f'timm does not take these augmentation or loader options ({type(e).__name__}: {e}).'
            ' Check --aa, --remode, --train-interpolation, --train-crop-mode, --scale and --ratio.') from e
    source = dataset.dataset if isinstance(dataset, AugMixDataset) else dataset
    if not hasattr(source, 'reader') and hasattr(source, 'transform'):
        # torchvision's data sets hand out images in the mode they have; timm's own convert them
        convert = partial(_convert, mode='RGB' if data_config['input_size'][0] == 3 else 'L')
        source.transform = Compose([convert, source.transform]) if source.transform is not None else convert
    plain = getattr(loader, 'loader', loader)
    plain.worker_init_fn = partial(init_worker, plain.worker_init_fn)
    plain.generator = torch.Generator().manual_seed(0)  # the workers' seed must not be drawn from the training's
    return loader


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
        seed: int = 0,
        ranks: Ranks = SINGLE,
        use_prefetcher: bool = True,
        img_dtype: torch.dtype = torch.float32,
        mixup: Optional[Mixup] = None,
        mixup_off_epoch: int = 0,
        num_aug_splits: int = 0,
        num_aug_repeats: float = 0,
        **kwargs: Any,
) -> 'TrainLoader':
    """Training loader of batches on the device.

    Args:
        dataset: What `open_dataset` gives.
        data_config: timm's, for size and normalisation.
        batch_size: Images per batch and process; a smaller last batch is dropped.
        device: Where the batches go.
        seed: What the order, the transforms and the mixes depend on.
        ranks: The processes that share the data.
        use_prefetcher: timm's prefetcher, which normalises and erases on the device.
        img_dtype: Type of the images.
        mixup: timm's `FastCollateMixup` for the prefetcher, its `Mixup` for a plain loader.
        mixup_off_epoch: Epoch from which on there is no mix; 0 is never.
        num_aug_splits: Augmentations per image (AugMix), 0 or more than 1.
        num_aug_repeats: Times that each image chosen for an epoch comes in it; 0 for every image once.
        **kwargs: Augmentation, worker and size-schedule arguments of timm's `create_loader`.

    Raises:
        ValueError: Less than one batch of images, or options that timm refuses.
    """
    _check_length(dataset, min(kwargs.get('batch_size_choices') or [batch_size]), ranks.world_size)
    if num_aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=num_aug_splits)
    loader = _create_loader(
        dataset,
        data_config,
        device=device,
        use_prefetcher=use_prefetcher,
        img_dtype=img_dtype,
        batch_size=batch_size,
        is_training=True,
        num_aug_splits=num_aug_splits,
        persistent_workers=not mixup_off_epoch,  # a stream's collate function would not hear of it
        collate_fn=mixup if mixup is None or use_prefetcher else partial(_collate_and_mix, mixup),
        batch_choice_seed=seed,
        **kwargs,
    )
    if not use_prefetcher:
        loader = DeviceLoader(loader, device, img_dtype)
    if isinstance(dataset, IterableDataset):
        return TrainLoader(loader, mixup=mixup, mixup_off_epoch=mixup_off_epoch)
    sampler: Any = DistributedSampler(dataset, ranks.world_size, ranks.rank, seed=seed)
    if num_aug_repeats:
        sampler = _SeededRepeats(dataset, ranks.world_size, ranks.rank, num_repeats=num_aug_repeats)
        sampler.seed = seed
    return _seed_loader(loader, sampler, seed, ranks, mixup, mixup_off_epoch, kwargs.get('num_batches'))


class _SeededRepeats(RepeatAugSampler):
    """timm's repeated augmentation, in an order that depends on the seed as well as on the epoch."""
    seed = 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed * 1_000_003 + epoch)


def _seed_loader(
        loader,
        sampler,
        seed: int,
        ranks: Ranks,
        mixup: Optional[Mixup],
        mixup_off_epoch: int,
        num_batches: Optional[int],
):
    """The same loader, but in the order of `sampler` and with random numbers as in the module `seeding`."""
    plain = loader.loader
    batch_sampler = plain.batch_sampler
    if isinstance(batch_sampler, ScheduledBatchSampler):
        batch_sampler = ScheduledBatchSampler(  # anew, for it counts on the length of its sampler
            sampler,
            batch_sampler.batch_sizes,
            batch_sampler.choice_weights.tolist(),
            seed=batch_sampler.seed,
            num_batches=num_batches,
            choice_schedule=batch_sampler.choice_schedule,
            schedule_epochs=batch_sampler.schedule_epochs,
            schedule_spread=batch_sampler.schedule_spread,
            schedule_random_mix=batch_sampler.schedule_random_mix,
        )
    else:
        batch_sampler = BatchSampler(sampler, plain.batch_size, drop_last=True)
    if not len(batch_sampler):
        raise ValueError(
            f'An epoch of {len(sampler)} images has no whole batch. Set --batch-size or --aug-repeats lower.')
    batches = EpochBatchSampler(batch_sampler, ranks.rank, ranks.world_size)
    loader.loader = DataLoader(
        SeededDataset(plain.dataset, seed),
        batch_sampler=batches,
        num_workers=plain.num_workers,
        collate_fn=SeededCollate(plain.collate_fn, seed, mixup, mixup_off_epoch),
        pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn,
        persistent_workers=plain.num_workers > 0,
        generator=plain.generator,
    )
    erasing = None
    if isinstance(loader, PrefetchLoader) and loader.random_erasing is not None:
        erasing = SeededErasing(loader.random_erasing, seed, loader.device, ranks.rank, ranks.world_size)
        loader.random_erasing = erasing  # type: ignore[assignment]
    return TrainLoader(loader, [part for part in (batches, erasing) if part is not None])


class TrainLoader:
    """Training batches on the device, from any batch of an epoch on.

    Args:
        loader: Batches on the device.
        parts: Its parts with a `set_epoch`. Without them, as for streamed data sets, an epoch that is continued reads
            the batches that were there before, and drops them.
        mixup: What such a stream mixes with.
        mixup_off_epoch: Epoch from which on it does not.
    """

    def __init__(
            self,
            loader,
            parts: Sequence[Any] = (),
            mixup: Optional[Mixup] = None,
            mixup_off_epoch: int = 0,
    ) -> None:
        self.loader = loader
        self.parts = parts
        self.mixup = mixup
        self.mixup_off_epoch = mixup_off_epoch
        self.skip = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, counted from 0, and how many of its batches to leave out."""
        for part in self.parts:
            part.set_epoch(epoch, first_batch)
        if not self.parts:
            self.skip = first_batch
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
        use_prefetcher: bool = True,
        img_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
):
    """Evaluation loader of batches on the device: every image once, in order, with the crop of `data_config`.

    Several processes take turns; the last images of some come twice, so that all have as many.
    """
    loader = _create_loader(
        dataset,
        data_config,
        device=device,
        use_prefetcher=use_prefetcher,
        img_dtype=img_dtype,
        batch_size=batch_size,
        is_training=False,
        distributed=ranks.distributed,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **kwargs,
    )
    return loader if use_prefetcher else DeviceLoader(loader, device, img_dtype)


def check_labels(dataset, num_classes: int) -> None:
    """Refuse a folder with more classes than the model has.

    Raises:
        ValueError: More classes than `num_classes`.
    """
    class_to_idx = _class_to_idx(dataset)
    count = max(class_to_idx.values(), default=-1) + 1
    if count > num_classes:
        raise ValueError(f'The data set has {count} classes, the model {num_classes}. Set --num-classes {count}.')


def check_img_size(model: nn.Module, train_sizes: Sequence[int] = ()) -> None:
    """Refuse a size that a ViT can't take, where it would only find out when training.

    Args:
        model: The model.
        train_sizes: Further sizes that it is trained with.

    Raises:
        ValueError: A size that is no multiple of the patch size, or several for a model that has one.
    """
    patch_size = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    dynamic = getattr(model, 'dynamic_img_size', False)
    if not patch_size:
        return
    if train_sizes and not dynamic:
        raise ValueError(
            f'{type(model).__name__} takes images of one size. Add --model-kwargs dynamic_img_size=True for'
            ' --train-img-sizes.')
    for height, width in (get_model_input_config(model)['input_size'][1:], *((size, size) for size in train_sizes)):
        if dynamic and (height % patch_size[0] or width % patch_size[1]):
            flag = '--train-img-sizes' if height in train_sizes else '--img-size'
            raise ValueError(
                f'The image size {height}x{width} is no multiple of the patch size {patch_size[0]}x{patch_size[1]}.'
                f' Set {flag} {max(patch_size[0], height // patch_size[0] * patch_size[0])}, say.')


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
