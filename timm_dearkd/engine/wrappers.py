"""Data sets around those of timm: they skip unreadable images, or take a fraction."""
import copy
import logging
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch
from PIL import ExifTags, Image
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from distill_hooks.errors import one_line

from .image_folder import UNREADABLE, check_mode, exceeds_8_bits, resolve_link

_logger = logging.getLogger(__name__)

MAX_SKIPS = 10  # unreadable images in a row


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


def orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation; 1 is as it is stored."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raise many kinds
        return 1


def warn_of_changes(image: Image.Image, mode: str, has_warned: torch.Tensor, get_name: Callable[[], str]) -> None:
    """Warn of the first image that a viewer shows differently: with transparent pixels, or turned.

    Args:
        image: The image as its file stores it.
        mode: Pillow mode to convert it to.
        has_warned: Whether each of the two warnings was given (2,). Workers share it.
        get_name: Returns the image's name, which takes time.
    """
    transparent, turned = range(2)
    has_alpha = image.has_transparency_data and mode not in ('LA', 'RGBA')
    if has_alpha and not has_warned[transparent] and np.asarray(image.convert('RGBA'))[..., 3].min() < 255:
        has_warned[transparent] = True
        _logger.warning(
            f'{get_name()!r} has transparent pixels. They get the colour that the file has there, often black. So do'
            ' those of other images. Fill their background if that hides what they show.')
    if not has_warned[turned] and orientation(image) != 1:
        has_warned[turned] = True
        _logger.warning(
            f'{get_name()!r} has an EXIF orientation, by which viewers turn it. timm does not. Turn this file and'
            ' others like it.')


class SkipUnreadable(_Wrapper):
    """A timm data set that replaces each image it cannot read by the next one.

    Each such file is reported once, also with several workers. Images of 16 bits and more count as unreadable if 8 bits
    are asked for. Pillow would clip them, and few file types tell how many of the bits are used. A warning names the
    first image that has transparent pixels, or that a viewer would turn.

    Args:
        dataset: timm's `ImageDataset`, or a fraction of one.
        input_img_mode: Pillow mode to convert the images to; '' takes the mode of the data set.

    Raises:
        OSError: If `MAX_SKIPS` images in a row cannot be read.
    """

    def __init__(self, dataset, input_img_mode: str = '') -> None:
        super().__init__(dataset)
        source: Any = dataset
        while isinstance(source, _Wrapper):
            source = source.dataset
        self._transform, source.transform = source.transform, None
        self.input_img_mode = input_img_mode or source.input_img_mode
        source.input_img_mode = ''  # leaves the conversion to `_read`
        source._max_retries = 1
        # shared, because a loader may start new workers in each epoch; a fraction may repeat its files
        self.was_reported = torch.zeros(len(getattr(dataset, 'indices', dataset)), dtype=torch.bool).share_memory_()
        self.has_warned = torch.zeros(2, dtype=torch.bool).share_memory_()  # see `warn_of_changes`

    @property
    def transform(self):
        return self._transform

    @transform.setter
    def transform(self, transform) -> None:
        self._transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        for _ in range(MAX_SKIPS):
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
        raise OSError(f'{MAX_SKIPS} images in a row cannot be read. The last one: {reason}')

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
        except UNREADABLE as e:
            raise ValueError(f'{self._name(index)!r} cannot be read as an image ({one_line(e)}).') from e
        if exceeds_8_bits(image.mode):  # first, because the name of each image takes time
            check_mode(self._name(index), image.mode)
        try:
            warn_of_changes(image, self.input_img_mode, self.has_warned, lambda: self._name(index))
            return image.convert(self.input_img_mode), *rest
        except UNREADABLE as e:
            raise ValueError(f'{self._name(index)!r} cannot be read as an image ({one_line(e)}).') from e

    def _name(self, index: int) -> str:
        name = self.dataset.filename(index, absolute=True)
        return resolve_link(name) if name else f'image {index}'


class SkipHighBitDepth(IterableImageDataset):
    """A stream that replaces each image of 16 bits and more by the last one of 8 bits, with one warning.

    The stream keeps its length. A shorter one would lose batches that the loader has announced, and the other
    processes of a distributed run would wait for them.

    Args:
        dataset: timm's data set of WebDataset shards, or streamed from Hugging Face.

    Raises:
        OSError: If the shards of a process have no image of 8 bits, or the class map lacks a label.
    """

    def __init__(self, dataset: IterableImageDataset) -> None:
        super().__init__('', reader=dataset.reader, transform=dataset.transform)
        self.input_img_mode, self.reader.input_img_mode = self.reader.input_img_mode, ''
        self.was_reported = torch.zeros(1, dtype=torch.bool).share_memory_()  # by any worker

    def __iter__(self):
        last: Any = None
        num_missing = 0  # images that are yet to be yielded
        for image, target in self._read():
            if not exceeds_8_bits(image.mode):
                last = image.convert(self.input_img_mode), target
            else:
                self._report(image.mode)
            num_missing += 1
            for _ in range(num_missing if last is not None else 0):
                yield last[0] if self.transform is None else self.transform(last[0]), last[1]
                num_missing -= 1
        if num_missing:
            raise OSError(
                f'All {num_missing} images in the shards of a process have 16 bits per channel or more. Convert them to'
                ' 8 bits.')

    def _read(self):
        try:
            yield from self.reader
        except KeyError as e:
            if not self.reader.remap_class:
                raise
            raise OSError(f'--class-map has no class for the label {one_line(e)} of an image. Add it.') from e

    def _report(self, mode: str) -> None:
        if not self.was_reported[0]:
            self.was_reported[0] = True
            _logger.warning(
                f'The stream has images with 16 bits per channel or more (mode {mode}). Pillow clips such images to'
                ' white. Skipped: the last image of 8 bits takes their place. Convert them to 8 bits.')


def _copy(dataset):
    """Copy a data set and the one that it wraps, so that the copy has a transform of its own."""
    dataset = copy.copy(dataset)
    if isinstance(dataset, _Wrapper):
        dataset.dataset = _copy(dataset.dataset)
    return dataset


class Sample(_Wrapper):
    """Some images of a data set, with a transform of their own.

    Args:
        dataset: A map-style data set. It keeps its transform.
        indices: Places of the images.
    """

    def __init__(self, dataset, indices: Sequence[int]) -> None:
        super().__init__(_copy(dataset))
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[self.indices[index]]


def listed_labels(dataset) -> Optional[np.ndarray]:
    """Return the labels of a data set that lists them, without opening its images; None for others."""
    reader: Any = getattr(dataset, 'reader', None)
    labels = getattr(reader, 'targets', None) or getattr(dataset, 'targets', None)
    if labels is None and hasattr(reader, 'samples'):
        labels = [sample[1] for sample in reader.samples]
    return None if labels is None or np.ndim(labels) != 1 else np.asarray(labels)


def num_kept(fraction: float, num_images: int) -> int:
    """Return how many images of a class `ClassFraction` keeps."""
    return max(1, round(fraction * num_images))


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
        labels = listed_labels(dataset)
        if labels is None:
            raise ValueError(
                '--train-fraction needs a data set that lists its labels: an image folder, or one of torchvision.')
        kept = []
        for label in np.unique(labels):
            members = np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
            kept.append(members[:num_kept(fraction, len(members))])
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
    """Set the Pillow mode that a data set converts its images to."""
    while isinstance(dataset, _Wrapper) and not isinstance(dataset, SkipUnreadable):
        dataset = dataset.dataset
    dataset.input_img_mode = mode
    if not isinstance(dataset, (SkipUnreadable, SkipHighBitDepth)) and hasattr(dataset, 'reader'):
        dataset.reader.input_img_mode = mode
