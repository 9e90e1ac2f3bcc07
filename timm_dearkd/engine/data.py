"""Data sets of train.py, made of timm's."""
import logging
import os
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch.nn as nn
from timm.data import ImageDataset, create_dataset
from timm.models import get_model_input_config
from torch.utils.data import Dataset

__all__ = [
    'ClassFraction', 'SkipUnreadable', 'check_img_size', 'check_labels', 'class_names', 'open_dataset',
    'open_eval_dataset', 'set_image_mode',
]

_logger = logging.getLogger(__name__)


def open_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open a split of a data set by timm's `create_dataset`.

    Raises:
        FileNotFoundError: No such folder, or no such split in it.
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
            raise FileNotFoundError(f'No split {split!r} in image folder {root!r}. There are: {", ".join(splits)}.')
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


def check_labels(dataset, num_classes: int, remedy: str = '') -> None:
    """Refuse a folder with more classes than the model has.

    Args:
        dataset: Whose labels.
        num_classes: Of the model.
        remedy: What to do; by default, to make the model with as many.

    Raises:
        ValueError: More classes than `num_classes`.
    """
    class_to_idx = _class_to_idx(dataset)
    count = max(class_to_idx.values(), default=-1) + 1
    if count > num_classes:
        remedy = remedy or f'Set --num-classes {count}.'
        raise ValueError(f'The data set has {count} classes, the model {num_classes}. {remedy}')


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
