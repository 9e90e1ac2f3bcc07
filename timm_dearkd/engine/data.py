"""Data sets of train.py, opened by timm."""
import hashlib
import logging
import os
import tarfile
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from PIL import ImageMode
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, extract_tarinfos
from torch.utils.data import IterableDataset

from distill_hooks.errors import one_line

from .hf_labels import hf_classes
from .image_folder import (
    ImageFolderReader,
    check_images,
    class_order,
    find_splits,
    image_types,
    index_by_name,
    is_image_file,
    normal_label,
    normal_names,
    open_folder,
    read_class_map,
    resolve_class_map,
    split_folder,
)
from .wrappers import ClassFraction, SkipHighBitDepth, SkipUnreadable

_logger = logging.getLogger(__name__)


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
        return SkipUnreadable(_open_tar(root, **kwargs))
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
    if isinstance(dataset, IterableImageDataset) and kwargs.get('class_map'):
        _name_labels(dataset.reader, kwargs['class_map'])
    if isinstance(dataset, IterableImageDataset) and name.lower().startswith(('wds/', 'hfids/')):
        return SkipHighBitDepth(dataset)
    return dataset


def _name_labels(reader: Any, class_map: Dict[Any, int]) -> None:
    """Give the integer labels of a stream the names of a class map, in which timm then finds their indices."""
    if not reader._source_names:
        reader._source_names = {index: name for name, index in class_map.items() if isinstance(name, str)}


def _create_dataset(name: str, root: Optional[str], split: str, **kwargs: Any):
    try:
        return create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        reason = one_line(e).rstrip('.')
        for argument, flag in (('download=True', '--dataset-download'), ('num_samples not', '--train-num-samples not')):
            reason = reason.replace(argument, flag)
        raise ValueError(f'Could not open split {split!r} of data set {name!r} in {root!r}: {reason}.') from e


def _read_torch_folder(name: str, root: str, split: str, class_map: Any = '', **kwargs: Any) -> ImageFolderReader:
    """Return a reader of torchvision's `ImageFolder`: its images, and its classes in its order.

    With a timm reader, these images are converted and skipped like those of any other folder. The arguments are those
    of `open_dataset`. Without a class map, the class indices are torchvision's.
    """
    folder = _create_dataset(
        name, split_folder(root, split), split, search_split=False, is_valid_file=is_image_file, **kwargs)
    normal = normal_names(folder.classes, folder.root)
    names = [normal[name] for name in folder.classes]
    class_to_idx = resolve_class_map(class_map, folder.root, names, kwargs.get('is_training', False))
    if class_to_idx is None:
        class_to_idx = {name: index for index, name in enumerate(names)}
    check_images(folder.samples, kwargs.get('is_training', False))
    return ImageFolderReader(folder.root, [(path, names[index]) for path, index in folder.samples], class_to_idx)


class _TarReader(ReaderImageInTar):
    """timm's reader of a tar file, for all `image_types`. timm's own skips some of them silently.

    Args:
        root: The file.
    """

    def __init__(self, root: str) -> None:
        Reader.__init__(self)
        self.root = root
        self.samples, self.targets, self.class_name_to_idx, tar_files = extract_tarinfos(
            root, extensions=image_types())
        self.class_idx_to_name = {index: name for name, index in self.class_name_to_idx.items()}
        self.root_is_tar = self.cache_tarfiles = True
        self.tar_state = tar_files[0][1]


def _open_tar(
        root: str,
        class_map: Any = '',
        is_training: bool = False,
        input_img_mode: str = 'RGB',
        **kwargs: Any,
) -> ImageDataset:
    """Open a tar file of class folders, without hidden files and with class names in `normal_name`.

    The arguments are those of `open_dataset`. Without a class map, the classes are numbered in `class_order`.

    Raises:
        ValueError: If the file cannot be read, has no images, or the class map has none of the classes.
    """
    if os.path.splitext(root)[1].lower() != '.tar':
        raise ValueError(f'{root!r} is a file, expected an image folder or a .tar file.')
    expected = 'Expected CLASS/IMAGE in the tar file.'
    try:
        reader = _TarReader(root)
    except (OSError, RuntimeError, tarfile.TarError) as e:
        raise ValueError(f'{root!r} cannot be read ({one_line(e)}). {expected}') from e
    except ValueError as e:  # of zip(*[])
        raise ValueError(f'No images in {root!r}. {expected}') from e
    found = [
        (sample, reader.class_idx_to_name[index]) for sample, index in zip(reader.samples, reader.targets)
        if not os.path.basename(sample[0].name).startswith('.')]
    if not found:
        raise ValueError(f'No images in {root!r}, apart from hidden files. {expected}')
    normal = normal_names((name for _, name in found), root)
    class_to_idx = resolve_class_map(class_map, root, normal.values(), is_training)
    if class_to_idx is None:
        class_to_idx = index_by_name(normal.values())
    kept = [(sample, class_to_idx[normal[name]]) for sample, name in found if normal[name] in class_to_idx]
    reader.samples, reader.targets = [sample for sample, _ in kept], [index for _, index in kept]
    reader.class_name_to_idx = class_to_idx
    reader.class_idx_to_name = {index: name for name, index in class_to_idx.items()}
    return ImageDataset(root, reader=reader, input_img_mode=input_img_mode)


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
    """Open the training split of a resumed run, see `open_dataset`, with the class indices of its checkpoint.

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
    if isinstance(dataset, IterableDataset) and kwargs.get('class_map'):  # the user's map names the labels
        raise ValueError(
            f'The class order of the stream {name!r} differs from that of training. Set the --class-map of training.')
    if class_indices(dataset) != class_to_idx:  # most of torchvision's data sets ignore a class map
        raise ValueError(
            f'Split {split!r} of data set {name!r} has other classes, or another class order, than training. Its labels'
            ' cannot be changed. Use a data set with the same classes, or an image folder without --dataset.')
    return dataset


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


def describe_files(dataset: Any) -> str:
    """Return number, bytes and a hash of the files of a data set: of their names and sizes.

    For images that are not files: the number of images, and the fingerprint or the targets of the data set.
    """
    reader = getattr(dataset, 'reader', dataset)
    digest, size = hashlib.sha256(), 0
    samples = getattr(reader, 'samples', None) or ()
    for place, *_ in samples:
        if isinstance(place, str):
            name = os.path.relpath(place, reader.root)
            try:
                num_bytes = os.path.getsize(place)
            except OSError:  # a link may lead nowhere
                num_bytes = -1
        else:  # of a tar file
            name, num_bytes = place.name, place.size
        size += num_bytes
        digest.update(f'{name}\0{num_bytes}\n'.encode(errors='surrogateescape'))
    if not samples:
        digest.update(repr((
            len(dataset), str(getattr(getattr(reader, 'dataset', None), '_fingerprint', '')),
            list(getattr(dataset, 'targets', ())))).encode())
    return f'{len(samples) or len(dataset)} ({size} bytes, {digest.hexdigest()[:12]})'


def evenly_spaced(length: int, count: int) -> List[int]:
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


def dataset_kwargs(args) -> Dict[str, Any]:
    """Return the options that both data sets share."""
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
    """Open the validation split with its own class indices, or with given ones."""
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
        trained: Classes of the run to resume.
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
                    f'--{name.replace("_", "-")} is for streamed data sets, and has no effect here.{instead}')
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
    if have_same_folder(args, train_set, eval_set):
        _logger.warning(
            f'{root} has no splits, so the validation images are those of the training, and their accuracy says little.'
            f' {_advise_splits(root)}')
    return train_set, eval_set


def have_same_folder(args, train_set, eval_set) -> bool:
    """Return whether both are image folders, and of the same images."""
    folders = {os.path.realpath(str(folder_of(dataset))) for dataset in (train_set, eval_set)}
    return is_image_folder(args.dataset) and eval_set is not None and len(folders) == 1


def _advise_splits(root: str) -> str:
    parent = os.path.normpath(os.path.join(root, os.pardir))
    splits = find_splits(parent)
    if len(splits) > 1 and os.path.basename(os.path.abspath(root)) in splits:
        return f'Did you mean {parent}?'
    return f'Make {root}/train and {root}/validation.'


def image_mode(mode: Optional[str], in_chans: int) -> str:
    """Return the Pillow mode of the images.

    Args:
        mode: --input-img-mode; None takes the one for the model's channels.
        in_chans: Channels of the model.

    Raises:
        ValueError: If the mode is unknown or has another number of channels.
    """
    mode = mode or {1: 'L', 3: 'RGB'}.get(in_chans)
    if mode is None:  # CMYK and RGBA both have 4
        raise ValueError(
            f'The model takes {in_chans} channels. Set the mode of the images, CMYK or RGBA for 4 channels:'
            ' --input-img-mode.')
    try:
        known = ImageMode.getmode(mode)
    except KeyError:
        raise ValueError(f'--input-img-mode {mode} is none of Pillow, expected RGB, L, CMYK, RGBA, ...') from None
    bands = known.bands
    if known.typestr != '|u1':  # timm's loader would take each value modulo 256
        raise ValueError(
            f'--input-img-mode {mode} does not have 8 bits per channel, expected RGB, L, CMYK, RGBA, ... Convert the'
            ' images to 8 bits.')
    if len(bands) != in_chans:
        raise ValueError(f'--input-img-mode {mode} gives another number of channels than the model takes, {in_chans}.')
    return mode
