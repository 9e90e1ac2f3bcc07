"""Data sets and loaders of train.py, made of timm's."""
import logging
import os
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import AugMixDataset, create_dataset, create_loader
from timm.models import get_model_input_config
from torchvision.transforms import Compose

__all__ = [
    'ClassFraction', 'DeviceLoader', 'check_img_size', 'check_labels', 'class_names', 'create_eval_loader',
    'create_train_loader', 'open_dataset', 'open_eval_dataset', 'set_image_mode',
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
            f'Could not open split {split!r} of {what}: {" ".join(str(e).split())}'
            ' Image folders look like DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE.') from e
    found = getattr(getattr(dataset, 'reader', None), 'root', None)
    if not name and root and split and found is not None and os.path.abspath(found) == os.path.abspath(root):
        splits = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
        if {'train', 'val', 'validation'} & set(splits):  # timm would take the splits for classes
            raise ValueError(f'No split {split!r} in image folder {root!r}. There are: {", ".join(splits)}.')
    return dataset


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


class ClassFraction(torch.utils.data.Dataset):
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
        samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
        labels = [label for _, label in samples] if samples is not None else getattr(dataset, 'targets', None)
        if labels is None:
            raise ValueError(
                '--train-fraction needs a data set that lists its labels: an image folder, or one of torchvision.')
        labels = np.asarray(labels)
        kept = []
        for label in np.unique(labels):
            members = np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
            kept.append(members[:max(1, round(fraction * len(members)))])
        self.indices = np.sort(np.concatenate(kept))
        self.dataset = dataset
        self.length = len(labels) if keep_length else len(self.indices)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        if not 0 <= index < self.length:
            raise IndexError(index)  # what ends an iteration
        return self.dataset[int(self.indices[index % len(self.indices)])]

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


def set_image_mode(dataset, mode: str) -> None:
    """Let a timm data set hand out images in this PIL mode."""
    dataset = dataset.dataset if isinstance(dataset, ClassFraction) else dataset
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
        mode = 'RGB' if data_config['input_size'][0] == 3 else 'L'
        source.transform = Compose([partial(_convert, mode=mode), source.transform])
    return loader


def create_train_loader(
        dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        use_prefetcher: bool = True,
        img_dtype: torch.dtype = torch.float32,
        mixup: Optional[Callable] = None,
        num_aug_splits: int = 0,
        **kwargs: Any,
):
    """Training loader of batches on the device.

    Args:
        dataset: What `open_dataset` gives.
        data_config: timm's, for size and normalisation.
        batch_size: Images per batch; a smaller last one is dropped.
        device: Where the batches go.
        use_prefetcher: timm's prefetcher, which normalises and erases on the device.
        img_dtype: Type of the images.
        mixup: timm's `FastCollateMixup` for the prefetcher, its `Mixup` for a plain loader.
        num_aug_splits: Augmentations per image (AugMix), 0 or more than 1.
        **kwargs: Augmentation and worker arguments of timm's `create_loader`.

    Raises:
        ValueError: Less than one batch of images.
    """
    if num_aug_splits and mixup is not None:
        raise ValueError('--aug-splits does not go with --mixup or --cutmix. Leave one of them out.')
    if hasattr(dataset, '__len__') and len(dataset) < batch_size:
        raise ValueError(
            f'The training set has {len(dataset)} images, less than one batch of {batch_size}.'
            f' Set --batch-size to {len(dataset)} or less.')
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
        collate_fn=mixup if use_prefetcher else None,
        **kwargs,
    )
    return loader if use_prefetcher else DeviceLoader(loader, device, img_dtype, mixup)


def create_eval_loader(
        dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        use_prefetcher: bool = True,
        img_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
):
    """Evaluation loader of batches on the device: every image once, in order, with the crop of `data_config`."""
    loader = _create_loader(
        dataset,
        data_config,
        device=device,
        use_prefetcher=use_prefetcher,
        img_dtype=img_dtype,
        batch_size=batch_size,
        is_training=False,
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


def check_img_size(model: nn.Module) -> None:
    """Refuse a size that the patches of a ViT do not divide, where the model would only find out when training.

    Raises:
        ValueError: The size is no multiple of the patch size.
    """
    patch_size = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    size = get_model_input_config(model)['input_size'][1:]
    if patch_size and getattr(model, 'dynamic_img_size', False) and any(s % p for s, p in zip(size, patch_size)):
        raise ValueError(
            f'The image size {size[0]}x{size[1]} is no multiple of the patch size {patch_size[0]}x{patch_size[1]}.'
            f' Set --img-size {max(patch_size[0], size[0] // patch_size[0] * patch_size[0])}, say.')


class DeviceLoader:
    """A plain loader that moves its batches to the device and mixes them, as timm's prefetcher does by itself."""

    def __init__(
            self,
            loader,
            device: torch.device,
            img_dtype: torch.dtype = torch.float32,
            mixup_fn: Optional[Any] = None,
    ) -> None:
        self.loader = loader
        self.device = device
        self.img_dtype = img_dtype
        self.mixup_fn = mixup_fn

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self):
        return self.loader.dataset

    def __iter__(self):
        for images, target in self.loader:
            images = images.to(self.device, self.img_dtype, non_blocking=True)
            target = target.to(self.device, non_blocking=True)
            yield self.mixup_fn(images, target) if self.mixup_fn is not None else (images, target)

    @property
    def mixup_enabled(self) -> bool:
        return self.mixup_fn is not None and self.mixup_fn.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = enabled
