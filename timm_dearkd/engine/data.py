"""Data sets of train.py, opened by timm."""
import logging
import os
import struct
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, add_img_extensions, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch.utils.data import Dataset

from .hf_labels import hf_classes
from .image_folder import (
    check_depth,
    check_mode,
    class_digests,
    class_order,
    is_deep,
    is_image_file,
    open_folder,
    read_class_map,
    split_folder,
)

__all__ = [
    'UNKNOWN_CLASSES', 'ClassFraction', 'Classes', 'SkipUnreadable', 'check_img_size', 'check_labels', 'class_indices',
    'class_names', 'classes_of', 'folder_of', 'is_image_folder', 'open_dataset', 'open_eval_dataset',
    'open_with_classes', 'relabel', 'set_image_mode', 'spread',
]

_logger = logging.getLogger(__name__)

# timm's readers, of folders and of tar files, would skip these without a word
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff', '.gif'))

# What Pillow raises for files that are broken or are no images
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def open_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open a split of a data set by timm's `create_dataset`.

    Classes come in one order in every process, see `class_order`. Images that cannot be read are skipped.

    Args:
        name: Type and name of the data set, as `--dataset` takes them; '' is an image folder.
        root: Its folder.
        split: Name of the split; for an image folder also a path.
        **kwargs: Arguments of `create_dataset`. `class_map` is a path or the class index by name.

    Raises:
        FileNotFoundError: If there is no such folder, or no such split in it.
        ValueError: If timm cannot open it, it is empty, or its folders or labels are no classes.
    """
    is_folder = is_image_folder(name)
    if not root and (is_folder or name.lower().startswith('torch/')):
        raise ValueError(
            f'Data set {name!r} needs a folder: train.py DIR --dataset {name}. An image folder is train.py DIR alone.'
            if name else 'No data set given. Name an image folder (train.py DIR) or a --dataset.')
    if is_folder and root and not os.path.exists(root):
        raise FileNotFoundError(f'No data set at {root!r}. Expected an image folder {root}/{split}/CLASS/IMAGE.')
    if is_folder and root and os.path.isdir(root):
        if '/' not in name:
            keys = ('class_map', 'is_training', 'input_key', 'input_img_mode')
            reader = open_folder(root, split, **{key: kwargs[key] for key in keys if key in kwargs})
            mode = kwargs.get('input_img_mode', 'RGB')
            return SkipUnreadable(ImageDataset(reader.root, reader=reader, input_img_mode=mode))
        dataset = _create_dataset(name, split_folder(root, split), split, is_valid_file=is_image_file, **kwargs)
        check_depth(dataset.samples, kwargs.get('input_img_mode', 'RGB'))
        return dataset
    if isinstance(kwargs.get('class_map'), str) and kwargs['class_map']:
        kwargs['class_map'] = read_class_map(kwargs['class_map'], root or '')
    dataset = _create_dataset(name, root, split, **kwargs)
    ordered = _ordered_classes(dataset, name, split, kwargs.get('class_map'), kwargs.get('is_training', False))
    if ordered is not None:
        dataset = _create_dataset(name, root, split, **{**kwargs, 'class_map': ordered})
    if isinstance(getattr(dataset, 'reader', None), ReaderImageInTar):
        _drop_hidden(dataset.reader)
    if isinstance(dataset, ImageDataset):
        return SkipUnreadable(dataset)
    if isinstance(dataset, IterableImageDataset) and name.lower().startswith(('wds/', 'hfids/')):
        return SkipDeepStream(dataset)
    return dataset


def _create_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    try:
        return create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        reason = ' '.join(str(e).split()).rstrip('.').replace('download=True', '--dataset-download')
        raise ValueError(f'Could not open split {split!r} of data set {name!r} in {root!r}: {reason}.') from e


def _drop_hidden(reader: ReaderImageInTar) -> None:
    """Remove hidden files, such as macOS writes beside every file of a tar, from the samples."""
    kept = [not os.path.basename(sample[0].name).startswith('.') for sample in reader.samples]
    reader.samples, reader.targets = reader.samples[kept], reader.targets[kept]


def _ordered_classes(dataset, name: str, split: str, class_map: Any, is_training: bool) -> Optional[Dict[Any, int]]:
    """Return the class index by name that the data set must be opened with again; None if it is right as it is.

    Raises:
        ValueError: See `hf_classes`.
    """
    reader = getattr(dataset, 'reader', None)
    if name.lower().startswith('hfds/'):
        return hf_classes(reader, name, split, class_map, is_training)
    names = getattr(reader, 'class_name_to_idx', None)  # timm's reader of tar files
    if class_map or not names:
        return None
    ordered = class_order(names)
    return None if list(names) == ordered else {name: index for index, name in enumerate(ordered)}


def is_image_folder(name: str) -> bool:
    """Return whether timm takes this for a folder of images: any name without a prefix."""
    prefix, slash, rest = name.lower().partition('/')
    return not slash or (prefix == 'torch' and rest in ('folder', 'image_folder'))


def folder_of(dataset) -> Optional[str]:
    """Return the folder of a split, where the data set is one of files."""
    return getattr(getattr(dataset, 'reader', dataset), 'root', None)


def class_indices(dataset) -> Dict[Any, int]:
    """Return the class index by name; empty where the data set does not know its classes."""
    source = getattr(dataset, 'reader', dataset)
    return getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None) or {}


class Classes(NamedTuple):
    """Classes of a training set, as a checkpoint keeps them.

    Args:
        indices: Class index by name; empty where the data set does not know its classes.
        digests: See `class_digests`, by class index.
    """
    indices: Dict[Any, int] = {}
    digests: Dict[int, str] = {}


UNKNOWN_CLASSES = Classes()


def classes_of(dataset) -> Classes:
    """Return the classes of a training set."""
    return Classes(class_indices(dataset), class_digests(getattr(dataset, 'reader', None)))


def open_with_classes(trained: Classes, name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open the training split of a run that is resumed, with the class indices that the run began with.

    Args:
        trained: Of the checkpoint.
        name: See `open_dataset`.
        root: See `open_dataset`.
        split: See `open_dataset`.
        **kwargs: See `open_dataset`.

    Raises:
        ValueError: If the class names are others, or the images of a class are those that another one had.
    """
    dataset = open_dataset(name, root, split, **kwargs)
    found = class_indices(dataset)
    if not trained.indices or not found:
        return dataset
    remedy = ' Restore the names, or begin in another --experiment.'
    if set(found) != set(trained.indices):
        new = class_order(str(name) for name in set(found) - set(trained.indices))
        gone = class_order(str(name) for name in set(trained.indices) - set(found))
        raise ValueError(
            'The classes are not those that the run began with.'
            + (f' New: {", ".join(new[:10])}.' if new else '') + (f' Missing: {", ".join(gone[:10])}.' if gone else '')
            + remedy)
    if found != trained.indices:
        _logger.info('The classes come in another order than when the run began. Their labels are matched by name.')
        dataset = relabel(name, root, split, trained.indices, **kwargs)
    names = {index: name for name, index in trained.indices.items()}
    now, then = classes_of(dataset).digests, trained.digests
    for index, digest in now.items():
        former = next((other for other, before in then.items() if before == digest), index)
        if former != index and then.get(index) != digest:
            raise ValueError(
                f'Class {names[index]!r} has the images that class {names[former]!r} had when the run began.{remedy}')
    return dataset


def open_eval_dataset(train_set, name: str, root: Optional[str], split: str, class_map: str = '', **kwargs: Any):
    """Open the validation split with the labels of the training set.

    A class without validation images must not shift the labels of the others, so the classes of a training folder
    serve as the class map.

    Raises:
        ValueError: If validation has a class that training has not, or labels that cannot be mapped.
    """
    dataset = open_dataset(name, root, split, class_map=class_map, **kwargs)
    known, found = class_indices(train_set), class_indices(dataset)
    if known and found and known != found:
        unknown = class_order(map(str, set(found) - set(known)))
        if unknown:
            raise ValueError(
                f'Split {split!r} has classes that the training set has not: {", ".join(unknown[:5])}.'
                ' Rename or remove them, or name the labels with --class-map.')
        dataset = relabel(name, root, split, known, **kwargs)
    return dataset


def relabel(name: str, root: Optional[str], split: str, class_to_idx: Dict[Any, int], **kwargs: Any):
    """Open a split with given labels.

    Raises:
        ValueError: See `open_dataset`; or if the labels differ and the data set takes no others.
    """
    dataset = open_dataset(name, root, split, **{**kwargs, 'class_map': class_to_idx})
    if class_indices(dataset) != class_to_idx:  # torchvision's data sets take no class map
        raise ValueError(
            f'Split {split!r} of data set {name!r} has other classes, or another order, than training, and cannot be'
            ' relabelled. Leave out --dataset, so that timm reads the folder.')
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
    """A timm data set that skips the files it cannot read, names each once in all workers, and takes the next image.

    Images of 16 bits and more count as unreadable where 8 are asked for: Pillow would clip them, and only some types of
    files say how many of the bits are used.

    Args:
        dataset: timm's `ImageDataset`, or a fraction of one.
        input_img_mode: Pillow mode of the images; '' takes the data set's.
        max_skips: How many images in a row may be unreadable.

    Raises:
        OSError: If more than that are.
    """

    def __init__(self, dataset, input_img_mode: str = '', max_skips: int = 10) -> None:
        super().__init__(dataset)
        source: Any = dataset
        while isinstance(source, _Wrapper):
            source = source.dataset
        self._transform, source.transform = source.transform, None
        self.input_img_mode = input_img_mode or source.input_img_mode
        source.input_img_mode = ''  # so that images come unconverted
        source._max_retries = 1
        self.max_skips = max_skips
        # shared, because a loader may start new workers in each epoch; a fraction may have its files several times
        self.is_named = torch.zeros(len(getattr(dataset, 'indices', dataset)), dtype=torch.bool).share_memory_()

    @property
    def transform(self):
        return self._transform

    @transform.setter
    def transform(self, transform) -> None:
        self._transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        for _ in range(self.max_skips):
            try:
                image, *rest = self._read(index)
            except ValueError as e:
                reason = str(e)
            else:
                return (image if self.transform is None else self.transform(image), *rest)
            place = index % len(self.is_named)
            if not self.is_named[place]:
                self.is_named[place] = True
                _logger.warning(f'{reason} Skipped: the next image takes its place.')
            index = (index + 1) % len(self.dataset)
        raise OSError(f'{self.max_skips} images in a row cannot be read. The last one: {reason}')

    def _read(self, index: int):
        """Return the converted image, its label and what else the data set gives.

        Raises:
            ValueError: If the image cannot be read. The message names it.
        """
        try:
            image, *rest = self.dataset[index]
        except RuntimeError as e:
            if not str(e).startswith('Failed to load'):
                raise
            raise ValueError(f'{self._name(index)!r} cannot be read as an image.') from e
        except Image.DecompressionBombError as e:
            raise ValueError(f'{self._name(index)!r} cannot be read as an image ({e}).') from e
        if is_deep(image.mode, self.input_img_mode):
            check_mode(self._name(index), image.mode, self.input_img_mode)
        try:
            return image.convert(self.input_img_mode), *rest
        except _BROKEN as e:
            raise ValueError(f'{self._name(index)!r} cannot be read as an image ({" ".join(str(e).split())}).') from e

    def _name(self, index: int) -> str:
        return self.dataset.filename(index, absolute=True) or f'image {index}'


class SkipDeepStream(IterableImageDataset):
    """A stream of images that skips those of 16 bits and more, with one warning in each worker.

    Args:
        dataset: timm's, of WebDataset shards or streamed from Hugging Face.
    """

    def __init__(self, dataset: IterableImageDataset) -> None:
        super().__init__('', reader=dataset.reader, transform=dataset.transform)
        self.input_img_mode, self.reader.input_img_mode = self.reader.input_img_mode, ''

    def __iter__(self):
        is_named = False
        for image, target in self.reader:
            if is_deep(image.mode, self.input_img_mode):
                if not is_named:
                    _logger.warning(
                        f'Skips images of the stream with 16 bits per channel or more (mode {image.mode}), which Pillow'
                        ' clips to white. Convert them to 8 bits.')
                is_named = True
                continue
            image = image.convert(self.input_img_mode)
            yield image if self.transform is None else self.transform(image), target


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
        self.share = len(self.indices) / len(labels)
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
    """Have a timm data set give images in a Pillow mode."""
    while isinstance(dataset, _Wrapper) and not isinstance(dataset, SkipUnreadable):
        dataset = dataset.dataset
    if isinstance(dataset, (SkipUnreadable, SkipDeepStream)):
        dataset.input_img_mode = mode
        return
    for source in (dataset, getattr(dataset, 'reader', dataset)):
        if hasattr(source, 'input_img_mode'):
            source.input_img_mode = mode


def class_names(dataset) -> Optional[List[str]]:
    """Class names in the order of their indices, where the data set knows them."""
    class_to_idx = class_indices(dataset)
    if not class_to_idx or sorted(class_to_idx.values()) != list(range(len(class_to_idx))):
        return None  # unknown, or a class map with gaps or with several names for a class
    return [str(name) for name in sorted(class_to_idx, key=lambda name: class_to_idx[name])]


def spread(length: int, count: int) -> List[int]:
    """At most `count` places in a sequence, as far apart as can be."""
    return torch.linspace(0, length - 1, min(count, length)).long().tolist()


def check_labels(dataset, num_classes: int, remedy: str = '') -> None:
    """Refuse a folder with more classes than the model has.

    Args:
        dataset: Whose labels.
        num_classes: Of the model.
        remedy: What to do; by default, to make the model with as many.

    Raises:
        ValueError: More classes than `num_classes`.
    """
    class_to_idx = class_indices(dataset)
    count = max(class_to_idx.values(), default=-1) + 1
    if count > num_classes:
        remedy = remedy or f'Set --num-classes {count}.'
        raise ValueError(f'The data set has {count} classes, the model {num_classes}. {remedy}')


def check_img_size(model: nn.Module, train_sizes: Sequence[int] = ()) -> None:
    """Refuse an image size that a ViT does not take before it is trained, and warn where it ignores pixels.

    Args:
        model: The model.
        train_sizes: Further sizes that it is trained with.

    Raises:
        ValueError: If a size of a ViT of any size is no multiple of the patch size, or a ViT of one size gets several.
    """
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    dynamic = getattr(model, 'dynamic_img_size', False)
    if not patch:
        return
    patch_size = to_2tuple(patch)
    if train_sizes and not dynamic:
        raise ValueError(
            f'{type(model).__name__} takes images of one size. Add --model-kwargs dynamic_img_size=True for'
            ' --train-img-sizes.')
    padded = getattr(model.patch_embed, 'dynamic_img_pad', False)
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
