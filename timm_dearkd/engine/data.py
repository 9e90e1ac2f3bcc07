"""Data sets for train.py. timm opens them."""
import logging
import os
import struct
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, add_img_extensions, create_dataset
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch.utils.data import Dataset

from .hf_labels import hf_classes
from .image_folder import (
    ImageFolderReader,
    bit_depth_message,
    check_bit_depth,
    class_order,
    exceeds_8_bits,
    index_by_name,
    is_image_file,
    normal_label,
    normal_names,
    open_folder,
    read_class_map,
    resolve_class_map,
    split_folder,
)

__all__ = [
    'UNKNOWN_CLASSES', 'ClassFraction', 'Classes', 'SkipHighBitDepth', 'SkipUnreadable', 'check_img_size',
    'check_label_gaps', 'check_labels', 'class_indices', 'class_names', 'classes_of', 'count_classes', 'folder_of',
    'is_image_folder', 'open_dataset', 'open_eval_dataset', 'open_with_classes', 'relabel', 'set_image_mode', 'spread',
]

_logger = logging.getLogger(__name__)

# timm's readers of folders and tar files skip these types silently by default
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff', '.gif'))

# Pillow's errors for broken files and for files that are not images
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def open_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open a split of a data set with timm's `create_dataset`.

    The class order is the same in every process, see `class_order`. Images that cannot be read are skipped.

    Args:
        name: Type and name of the data set, as in `--dataset`; '' is an image folder.
        root: Folder of the data set.
        split: Name of the split; for an image folder also a path.
        **kwargs: Arguments of `create_dataset`. `class_map` is a path or the class index by name.

    Raises:
        FileNotFoundError: If the folder or the split does not exist.
        ValueError: If timm cannot open the data set, it is empty, or its folders or labels are not classes.
    """
    is_folder = is_image_folder(name)
    if not root and (is_folder or name.lower().startswith('torch/')):
        raise ValueError(
            f'Data set {name!r} needs a folder: train.py DIR --dataset {name}. An image folder is train.py DIR alone.'
            if name else 'No data set given. Name an image folder (train.py DIR) or a --dataset.')
    if is_folder and root and not os.path.exists(root):
        raise FileNotFoundError(f'No data set at {root!r}. Expected an image folder {root}/{split}/CLASS/IMAGE.')
    if is_folder and root and os.path.isdir(root):
        mode = kwargs.get('input_img_mode', 'RGB')
        if '/' in name:
            reader = _read_torch_folder(name, root, split, **kwargs)
        else:
            keys = ('class_map', 'is_training', 'input_key', 'input_img_mode')
            reader = open_folder(root, split, **{key: kwargs[key] for key in keys if key in kwargs})
        return SkipUnreadable(ImageDataset(reader.root, reader=reader, input_img_mode=mode))
    if is_folder and '/' not in name and root:
        return SkipUnreadable(_open_tar(name, root, split, **kwargs))
    if isinstance(kwargs.get('class_map'), str) and kwargs['class_map']:
        kwargs['class_map'] = read_class_map(kwargs['class_map'], root or '')
    dataset = _create_dataset(name, root, split, **kwargs)
    if name.lower().startswith('hfds/'):
        classes = hf_classes(
            dataset.reader, name, split, kwargs.get('class_map'), kwargs.get('is_training', False))
        if classes is not None:
            dataset = _create_dataset(name, root, split, **{**kwargs, 'class_map': classes})
    if isinstance(dataset, ImageDataset):
        return SkipUnreadable(dataset)
    if isinstance(dataset, IterableImageDataset) and name.lower().startswith(('wds/', 'hfids/')):
        return SkipHighBitDepth(dataset)
    return dataset


def _create_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    try:
        return create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        reason = ' '.join(str(e).split()).rstrip('.').replace('download=True', '--dataset-download')
        raise ValueError(f'Could not open split {split!r} of data set {name!r} in {root!r}: {reason}.') from e


def _read_torch_folder(name: str, root: str, split: str, class_map: Any = '', **kwargs: Any) -> ImageFolderReader:
    """Return a reader of torchvision's `ImageFolder`: its images, and its classes in its order.

    With a timm reader, these images are converted and skipped like those of any other folder.

    Args:
        name: See `open_dataset`.
        root: See `open_dataset`.
        split: See `open_dataset`.
        class_map: See `open_dataset`; '' takes torchvision's class indices.
        **kwargs: See `open_dataset`.
    """
    folder = _create_dataset(name, split_folder(root, split), split, is_valid_file=is_image_file, **kwargs)
    normal = normal_names(folder.classes, folder.root)
    names = [normal[name] for name in folder.classes]
    class_to_idx = resolve_class_map(class_map, folder.root, names, kwargs.get('is_training', False))
    if class_to_idx is None:
        class_to_idx = {name: index for index, name in enumerate(names)}
    check_bit_depth(folder.samples, kwargs.get('input_img_mode', 'RGB'))
    return ImageFolderReader(folder.root, [(path, names[index]) for path, index in folder.samples], class_to_idx)


def _open_tar(name: str, root: str, split: str, class_map: Any = '', **kwargs: Any) -> ImageDataset:
    """Open a tar file of class folders, without hidden files and with class names in `normal_name`.

    Args:
        name: See `open_dataset`.
        root: The file.
        split: See `open_dataset`.
        class_map: See `open_dataset`; '' numbers the classes in `class_order`.
        **kwargs: See `open_dataset`.

    Raises:
        ValueError: If there are no images, or the class map has none of the classes.
    """
    dataset = _create_dataset(name, root, split, **kwargs)
    reader: Any = dataset.reader
    found = [
        (sample, reader.class_idx_to_name[index]) for sample, index in zip(reader.samples, reader.targets)
        if not os.path.basename(sample[0].name).startswith('.')]
    if not found:
        raise ValueError(f'No images in {root!r}, apart from hidden files. Expected CLASS/IMAGE in the tar file.')
    normal = normal_names((name for _, name in found), root)
    class_to_idx = resolve_class_map(class_map, root, normal.values(), kwargs.get('is_training', False))
    if class_to_idx is None:
        class_to_idx = index_by_name(normal.values())
    kept = [(sample, class_to_idx[normal[name]]) for sample, name in found if normal[name] in class_to_idx]
    reader.samples, reader.targets = [sample for sample, _ in kept], [index for _, index in kept]
    reader.class_name_to_idx = class_to_idx
    reader.class_idx_to_name = {index: name for name, index in class_to_idx.items()}
    return dataset


def is_image_folder(name: str) -> bool:
    """Return whether timm opens a data set of this name as an image folder or a tar file."""
    prefix, slash, rest = name.lower().partition('/')
    return not slash or (prefix == 'torch' and rest in ('folder', 'image_folder'))


def folder_of(dataset) -> Optional[str]:
    """Return the folder of a split; None if the data set is not made of files."""
    return getattr(getattr(dataset, 'reader', dataset), 'root', None)


def class_indices(dataset) -> Dict[Any, int]:
    """Return the class index by name, see `normal_name`; empty if the data set does not know its classes."""
    source = getattr(dataset, 'reader', dataset)
    indices = getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None) or {}
    return {normal_label(name): index for name, index in indices.items()}


class Classes(NamedTuple):
    """Classes of a training set, as checkpoints store them.

    Args:
        indices: Class index by name; empty if the data set does not know its classes.
        digests: Hash of some files of each class, by class index; see `ImageFolderReader.digests`.
    """
    indices: Dict[Any, int] = {}
    digests: Dict[int, str] = {}


UNKNOWN_CLASSES = Classes()


def classes_of(dataset) -> Classes:
    """Return the classes of a training set. The digests read the sizes of some files of each class."""
    return Classes(class_indices(dataset), getattr(getattr(dataset, 'reader', None), 'digests', {}))


def open_with_classes(trained: Classes, name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open the training split of a resumed run with the class indices of its checkpoint.

    Args:
        trained: Classes of the checkpoint.
        name: See `open_dataset`.
        root: See `open_dataset`.
        split: See `open_dataset`.
        **kwargs: See `open_dataset`.

    Raises:
        ValueError: If the class names have changed, or the images of a class are in the folder of another one.
    """
    dataset = open_dataset(name, root, split, **kwargs)
    found = class_indices(dataset)
    if not trained.indices or not found:
        return dataset
    remedy = ' Restore the names, or start another --experiment.'
    if set(found) != set(trained.indices):
        new = class_order(str(name) for name in set(found) - set(trained.indices))
        gone = class_order(str(name) for name in set(trained.indices) - set(found))
        raise ValueError(
            'The classes are not those of the checkpoint.'
            + (f' New: {", ".join(new[:10])}.' if new else '') + (f' Missing: {", ".join(gone[:10])}.' if gone else '')
            + remedy)
    if found != trained.indices:
        _logger.info('The class order differs from that of the checkpoint. Labels are matched by name.')
        dataset = relabel(name, root, split, trained.indices, **kwargs)
    for index, former in _moved_classes(trained.digests, dataset):
        names = {index: name for name, index in trained.indices.items()}
        raise ValueError(
            f'Class {names[index]!r} has the images that class {names[former]!r} had when the run started.{remedy}')
    return dataset


def _moved_classes(before: Dict[int, str], dataset) -> List[Tuple[int, int]]:
    """Return the index, now and before, of classes whose images are now in the folder of another class.

    A digest tells classes apart only if it is unique. Frames of videos, for example, may have equal names and sizes.
    """
    if not before:
        return []
    now = classes_of(dataset).digests
    unique_before, unique_now = _unique_digests(before), _unique_digests(now)
    return sorted(
        (index, unique_before[digest]) for digest, index in unique_now.items()
        if unique_before.get(digest, index) != index)


def _unique_digests(digests: Dict[int, str]) -> Dict[str, int]:
    """Return the class index by digest, without digests of several classes."""
    counts = Counter(digests.values())
    return {digest: index for index, digest in digests.items() if counts[digest] == 1}


def open_eval_dataset(train_set, name: str, root: Optional[str], split: str, class_map: str = '', **kwargs: Any):
    """Open the validation split with the labels of the training set.

    The training classes serve as the class map, so that a class without validation images does not shift the labels of
    the others.

    Raises:
        ValueError: If a validation class is not a training class, or the labels cannot be mapped.
    """
    dataset = open_dataset(name, root, split, class_map=class_map, **kwargs)
    known, found = class_indices(train_set), class_indices(dataset)
    if known and found and known != found:
        unknown = class_order(map(str, set(found) - set(known)))
        if unknown:
            raise ValueError(
                f'Split {split!r} has classes that the training set does not have: {", ".join(unknown[:5])}.'
                ' Rename or remove them, or name the labels with --class-map.')
        dataset = relabel(name, root, split, known, **kwargs)
    return dataset


def relabel(name: str, root: Optional[str], split: str, class_to_idx: Dict[Any, int], **kwargs: Any):
    """Open a split with given class indices.

    Raises:
        ValueError: See `open_dataset`; or if the data set has other indices and does not take a class map.
    """
    dataset = open_dataset(name, root, split, **{**kwargs, 'class_map': class_to_idx})
    if class_indices(dataset) != class_to_idx:  # most of torchvision's data sets ignore a class map
        raise ValueError(
            f'Split {split!r} of data set {name!r} has other classes, or another class order, than training. Its labels'
            ' cannot be changed. Use a data set with the same classes, or an image folder without --dataset.')
    return dataset


class _Wrapper(Dataset):
    """A data set that wraps another one and has its transform and attributes."""

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
    """A timm data set that replaces each image it cannot read by the next one.

    Each such file is reported once, also with several workers. Images of 16 bits and more count as unreadable if 8 bits
    are asked for. Pillow would clip them, and few file types tell how many of the bits are used.

    Args:
        dataset: timm's `ImageDataset`, or a fraction of one.
        input_img_mode: Pillow mode to convert the images to; '' takes the mode of the data set.
        max_skips: Number of unreadable images in a row that raises an error.

    Raises:
        OSError: If `max_skips` images in a row cannot be read.
    """

    def __init__(self, dataset, input_img_mode: str = '', max_skips: int = 10) -> None:
        super().__init__(dataset)
        source: Any = dataset
        while isinstance(source, _Wrapper):
            source = source.dataset
        self._transform, source.transform = source.transform, None
        self.input_img_mode = input_img_mode or source.input_img_mode
        source.input_img_mode = ''  # leaves the conversion to `_read`
        source._max_retries = 1
        self.max_skips = max_skips
        # shared, because a loader may start new workers in each epoch; a fraction may repeat its files
        self.was_reported = torch.zeros(len(getattr(dataset, 'indices', dataset)), dtype=torch.bool).share_memory_()

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
            place = index % len(self.was_reported)
            if not self.was_reported[place]:
                self.was_reported[place] = True
                _logger.warning(f'{reason} Skipped: the next image takes its place.')
            index = (index + 1) % len(self.dataset)
        raise OSError(f'{self.max_skips} images in a row cannot be read. The last one: {reason}')

    def _read(self, index: int):
        """Return the converted image, its label and further items of the data set.

        Raises:
            ValueError: If the image cannot be read. The message has its path.
        """
        try:
            image, *rest = self.dataset[index]
        except RuntimeError as e:
            if not str(e).startswith('Failed to load'):
                raise
            raise ValueError(f'{self._name(index)!r} cannot be read as an image.') from e
        except Image.DecompressionBombError as e:
            raise ValueError(f'{self._name(index)!r} cannot be read as an image ({e}).') from e
        if exceeds_8_bits(image.mode, self.input_img_mode):
            raise ValueError(bit_depth_message(self._name(index), image.mode))
        try:
            return image.convert(self.input_img_mode), *rest
        except _BROKEN as e:
            raise ValueError(f'{self._name(index)!r} cannot be read as an image ({" ".join(str(e).split())}).') from e

    def _name(self, index: int) -> str:
        return self.dataset.filename(index, absolute=True) or f'image {index}'


class SkipHighBitDepth(IterableImageDataset):
    """A stream that replaces each image of 16 bits and more by the last one of 8 bits, with one warning.

    The stream keeps its length. A shorter one would lose batches that the loader has announced, and the other
    processes of a distributed run would wait for them.

    Args:
        dataset: timm's data set of WebDataset shards, or streamed from Hugging Face.

    Raises:
        OSError: If the stream ends without an image of 8 bits.
    """

    def __init__(self, dataset: IterableImageDataset) -> None:
        super().__init__('', reader=dataset.reader, transform=dataset.transform)
        self.input_img_mode, self.reader.input_img_mode = self.reader.input_img_mode, ''
        self.was_reported = torch.zeros(1, dtype=torch.bool).share_memory_()  # by any worker

    def __iter__(self):
        last: Any = None
        num_missing = 0  # images that are yet to be yielded
        for image, target in self.reader:
            if not exceeds_8_bits(image.mode, self.input_img_mode):
                last = image.convert(self.input_img_mode), target
            else:
                self._report(image.mode)
            num_missing += 1
            for _ in range(num_missing if last is not None else 0):
                yield last[0] if self.transform is None else self.transform(last[0]), last[1]
                num_missing -= 1
        if num_missing:
            raise OSError(
                f'All {num_missing} images of a stream have 16 bits per channel or more. Convert them to 8 bits.')

    def _report(self, mode: str) -> None:
        if not self.was_reported[0]:
            self.was_reported[0] = True
            _logger.warning(
                f'The stream has images with 16 bits per channel or more (mode {mode}). Pillow clips such images to'
                ' white. Skipped: the last image of 8 bits takes their place. Convert them to 8 bits.')


class ClassFraction(_Wrapper):
    """An equal share of the images of every class, for training on little data.

    The images are the first ones of a permutation of each class. A smaller share is a subset of a larger one.

    Args:
        dataset: A map-style data set that lists its labels.
        fraction: Share of each class, rounded to whole images, at least one.
        seed: Seed of the permutations.
        keep_length: Repeat the images up to the length of `dataset`, so that an epoch has as many steps.

    Raises:
        ValueError: If the data set does not list its labels.
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
            raise IndexError(index)  # ends an iteration
        return self.dataset[int(self.indices[index % len(self.indices)])]

    def filename(self, index: int, **kwargs: Any) -> str:
        return self.dataset.filename(int(self.indices[index % len(self.indices)]), **kwargs)


def set_image_mode(dataset, mode: str) -> None:
    """Set the Pillow mode that a timm data set converts its images to."""
    while isinstance(dataset, _Wrapper) and not isinstance(dataset, SkipUnreadable):
        dataset = dataset.dataset
    if isinstance(dataset, (SkipUnreadable, SkipHighBitDepth)):
        dataset.input_img_mode = mode
        return
    for source in (dataset, getattr(dataset, 'reader', dataset)):
        if hasattr(source, 'input_img_mode'):
            source.input_img_mode = mode


def class_names(dataset) -> Optional[List[str]]:
    """Return the class names by index; None if they are unknown, have gaps, or share an index."""
    class_to_idx = class_indices(dataset)
    if not class_to_idx or sorted(class_to_idx.values()) != list(range(len(class_to_idx))):
        return None
    return [str(name) for name in sorted(class_to_idx, key=lambda name: class_to_idx[name])]


def count_classes(dataset) -> Optional[int]:
    """Return the number of classes; None if they are unknown or their indices have gaps. Names may share an index."""
    indices = set(class_indices(dataset).values())
    return len(indices) if indices and indices == set(range(len(indices))) else None


def check_label_gaps(dataset, class_map: str = '') -> None:
    """Refuse class indices that are not 0 to n - 1. They do not tell how many outputs the model needs.

    Args:
        dataset: The data set.
        class_map: File that the indices come from, for the message.

    Raises:
        ValueError: If the indices have gaps or do not begin with 0.
    """
    indices = sorted(set(class_indices(dataset).values()))
    if indices and indices != list(range(len(indices))):
        source = f'--class-map {class_map!r}' if class_map else 'The data set'
        shown = ', '.join(map(str, indices[:5])) + (f', ..., {indices[-1]}' if len(indices) > 5 else '')
        raise ValueError(
            f'{source} has the class indices {shown}, expected 0 to {len(indices) - 1}. Number the classes without gaps'
            f' from 0, or set --num-classes {indices[-1] + 1} for a model with unused outputs.')


def spread(length: int, count: int) -> List[int]:
    """Return at most `count` evenly spaced places in a sequence."""
    return torch.linspace(0, length - 1, min(count, length)).long().tolist()


def check_labels(dataset, num_classes: int, remedy: str = '') -> None:
    """Refuse a data set with more classes than the model has.

    Args:
        dataset: The data set.
        num_classes: Number of classes of the model.
        remedy: Advice for the message; by default, to set --num-classes.

    Raises:
        ValueError: If the data set has more than `num_classes` classes.
    """
    class_to_idx = class_indices(dataset)
    count = max(class_to_idx.values(), default=-1) + 1
    if count > num_classes:
        remedy = remedy or f'Set --num-classes {count}.'
        raise ValueError(f'The data set has {count} classes, the model {num_classes}. {remedy}')


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
