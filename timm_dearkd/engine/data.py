"""Data sets of train.py, made of timm's."""
import logging
import os
from collections import Counter
from mimetypes import guess_type
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageDataset, add_img_extensions, create_dataset, get_img_extensions
from timm.models import get_model_input_config
from torch.utils.data import Dataset

__all__ = [
    'ClassFraction', 'SkipUnreadable', 'check_img_size', 'check_labels', 'check_mode', 'class_names',
    'find_splits', 'folder_of', 'is_image_folder', 'open_dataset', 'open_eval_dataset', 'relabel', 'set_image_mode',
    'spread',
]

_logger = logging.getLogger(__name__)

# timm's readers, of folders and of tar files, would leave these out without a word
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff', '.gif'))

NUM_DEPTH_CHECKS = 50
_DEEP_MODES = ('I', 'F')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation')


def open_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    """Open a split of a data set by timm's `create_dataset`.

    Raises:
        FileNotFoundError: No such folder, or no such split in it.
        ValueError: timm can't open it, it is empty, or the folders in it are no classes.
    """
    is_folder = is_image_folder(name)
    if not root and (is_folder or name.lower().startswith('torch/')):
        raise ValueError(
            f'Data set {name!r} needs a folder: train.py DIR --dataset {name}. An image folder is train.py DIR alone.'
            if name else 'No data set given. Name an image folder (train.py DIR) or a --dataset.')
    if is_folder and root and not os.path.exists(root):
        raise FileNotFoundError(f'No data set at {root!r}. Expected an image folder {root}/{split}/CLASS/IMAGE.')
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as e:
        what = f'data set {name!r} in {root!r}' if name else f'image folder {root!r}'
        reason = ' '.join(str(e).split()).rstrip('.').replace('download=True', '--dataset-download')
        raise ValueError(
            f'Could not open split {split!r} of {what}: {reason}.'
            + ('' if name else ' Image folders look like DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE.')) from e
    found = folder_of(dataset) if is_folder else None
    if root and found is not None and os.path.isdir(found):
        if os.path.abspath(found) == os.path.abspath(root):
            _check_split(root, split)
        if '/' not in name:
            _check_folders(found, _class_to_idx(dataset), **kwargs)
        _check_depth(getattr(dataset, 'reader', dataset).samples, kwargs.get('input_img_mode', 'RGB'))
    return SkipUnreadable(dataset) if isinstance(dataset, ImageDataset) else dataset


def is_image_folder(name: str) -> bool:
    """Whether timm takes this for a folder of images: any name without a prefix."""
    prefix, slash, rest = name.lower().partition('/')
    return not slash or (prefix == 'torch' and rest in ('folder', 'image_folder'))


def folder_of(dataset) -> Optional[str]:
    """The folder of a split, where the data set is one of files."""
    return getattr(getattr(dataset, 'reader', dataset), 'root', None)


def _check_split(root: str, split: str) -> None:
    """Refuse a split that is not there, for timm would take the others for classes."""
    if find_splits(root):
        splits = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        raise FileNotFoundError(f'No split {split!r} in image folder {root!r}. There are: {", ".join(splits)}.')


def find_splits(root: str) -> List[str]:
    """Names of the splits in a folder, among those that timm looks for."""
    return [name for name in _SPLITS if os.path.isdir(os.path.join(root, name))]


def _check_folders(
        root: str,
        class_to_idx: Dict[str, int],
        class_map: Any = '',
        is_training: bool = False,
        input_key: Optional[str] = None,
        **_: Any,
) -> None:
    """Refuse folders that timm would take for other classes than are meant, and name what it leaves out."""
    if isinstance(class_map, dict):
        return  # of a model or of the training set, and not of the user
    types = set(input_key.split(';')) if input_key else get_img_extensions(as_set=True)
    folders, others = [], Counter[str]()
    for path, _dirs, files in os.walk(root, followlinks=True):
        kinds = Counter(os.path.splitext(file)[1].lower() for file in files)
        if types & set(kinds):
            folders.append(Path(path).relative_to(root))
        others.update({kind: count for kind, count in kinds.items() if kind not in types})
    others = Counter({k: n for k, n in others.items() if (guess_type(f'x{k}')[0] or '').startswith('image/')})
    if others and is_training and not input_key:
        _logger.warning(
            f'Images in {root!r} that are left out, for they are of types that are not read:'
            f' {", ".join(f"{count} {kind}" for kind, count in others.most_common())}. Convert them, to PNG or JPEG.')
    if class_map:
        _compare_class_map(class_map, root, {path.name for path in folders}, class_to_idx, is_training)
    else:
        _check_class_folders(root, folders, class_to_idx, is_training)


def _check_class_folders(root: str, folders: List[Path], class_to_idx: Dict[str, int], is_training: bool) -> None:
    """timm numbers the innermost folders that have images, so a hidden or an empty one would shift the classes."""
    for path in folders:
        if any(part.startswith('.') for part in path.parts):
            raise ValueError(f'The hidden folder {str(root / path)!r} has images, and would be a class. Remove it.')
        if not path.parts:
            raise ValueError(f'There are images in {root!r} itself. Expected a folder for each class. Move them.')
    nested = sorted({path.name for path in folders if len(path.parts) > 1})
    if nested:
        raise ValueError(
            f'There are folders in class folders of {root!r}, and classes are taken from the innermost folders:'
            f' {_first(nested)}. Move the images up. If these are the classes, list them in a --class-map.')
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name) if is_training else ():
        if entry.is_dir() and entry.name not in class_to_idx and not entry.name.startswith('.'):
            raise ValueError(f'Class folder {entry.path!r} has no images. Add some, or remove the folder.')


def _compare_class_map(
        class_map: str, root: str, names: Set[str], class_to_idx: Dict[str, int], is_training: bool) -> None:
    """timm leaves out what a class map does not name; validation need not have all that it does."""
    unlisted = sorted(names - set(class_to_idx))
    missing = sorted(str(name) for name in set(class_to_idx) - names if name) if is_training else []
    if unlisted or missing:
        _logger.warning(
            f'--class-map {class_map} is not of {root!r}:'
            + (f' folders that it does not name are left out: {_first(unlisted)}.' if unlisted else '')
            + (f' These classes have no images: {_first(missing)}.' if missing else ''))


def _first(names: List[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def _check_depth(samples: Sequence[Tuple[str, int]], mode: str) -> None:
    """Look at an image of each class, of some classes where there are many, for depths that Pillow does not convert."""
    paths = list({label: path for path, label in reversed(samples)}.values())
    for path in paths[::-(-len(paths) // NUM_DEPTH_CHECKS)]:
        try:
            with Image.open(path) as image:
                found = image.mode
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # it is named when it is read
        check_mode(path, found, mode)


def check_mode(path: str, found: str, mode: str) -> None:
    """Refuse an image that Pillow would not convert but clip, to white as a rule.

    Args:
        path: Its file.
        found: The mode that it has.
        mode: The mode that is asked for.

    Raises:
        ValueError: More than 8 bits in each channel where 8 are asked for.
    """
    if found.split(';')[0] in _DEEP_MODES and mode.split(';')[0] not in _DEEP_MODES:
        raise ValueError(
            f'{path!r} is a 16-bit image, or deeper (mode {found}). Pillow would clip it: convert the images to 8 bit'
            ' first.')


def _class_to_idx(dataset) -> Dict[str, int]:
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}


def open_eval_dataset(train_set, name: str, root: Optional[str], split: str, class_map: str = '', **kwargs: Any):
    """Open the validation split with the labels of the training set.

    A class without validation images must not shift the labels of the others, so the classes of a training folder
    serve as the class map.

    Raises:
        ValueError: A validation folder with a class that training does not know, or one that can't be mapped.
    """
    dataset = open_dataset(name, root, split, class_map=class_map, **kwargs)
    known, found = _class_to_idx(train_set), _class_to_idx(dataset)
    if not class_map and known and found and known != found:
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise ValueError(
                f'Split {split!r} has classes that the training set has not: {", ".join(unknown[:5])}.'
                ' Rename or remove their folders, or name the labels with --class-map.')
        dataset = relabel(name, root, split, known, **kwargs)
    return dataset


def relabel(name: str, root: Optional[str], split: str, class_to_idx: Dict[str, int], **kwargs: Any):
    """Open a split with given labels.

    Raises:
        ValueError: See `open_dataset`; or labels that can't be given, and are others.
    """
    dataset = open_dataset(name, root, split, class_map=class_to_idx, **kwargs)
    if _class_to_idx(dataset) != class_to_idx:  # torchvision's data sets take no class map
        raise ValueError(
            f'Split {split!r} of data set {name!r} has other classes than training, which shifts its labels.'
            ' Leave out --dataset, for timm to read the folder.')
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
    """A timm data set that names the files it can not read, once in all workers, and takes the next image instead.

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
        # shared, for the workers of a loader may be others in each epoch; a fraction may have its files several times
        self.is_named = torch.zeros(len(getattr(dataset, 'indices', dataset)), dtype=torch.bool).share_memory_()

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
            if not self.is_named[index % len(self.is_named)]:
                self.is_named[index % len(self.is_named)] = True
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
    padded = getattr(model.patch_embed, 'dynamic_img_pad', False)
    for height, width in (get_model_input_config(model)['input_size'][1:], *((size, size) for size in train_sizes)):
        if dynamic and not padded and (height % patch_size[0] or width % patch_size[1]):
            flag = '--train-img-sizes' if height in train_sizes else '--img-size'
            raise ValueError(
                f'The image size {height}x{width} is no multiple of the patch size {patch_size[0]}x{patch_size[1]}.'
                f' Set {flag} {max(patch_size[0], height // patch_size[0] * patch_size[0])}, say.')
