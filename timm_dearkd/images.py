"""The images of a distillation: their splits, and what the choice of options depends on."""
import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence

from PIL import Image

from .engine.data import describe_files
from .engine.image_folder import (
    UNREADABLE,
    FolderScan,
    check_class_folders,
    check_split_names,
    class_order,
    exceeds_8_bits,
    find_splits,
    has_class_folders,
    open_folder,
    resolve_class_map,
    scan_folder,
    warn_of_other_types,
)
from .engine.run_folder import has_run
from .engine.wrappers import num_kept
from .files import write_text

_logger = logging.getLogger(__name__)

# Our choices
VALIDATION_SHARE = 0.2
NUM_SAMPLES = 64  # images that are opened
RECORD = 'images.json'  # in the folder of the runs
SPLIT_NAMES = ('train', 'training', 'val', 'valid', 'validation', 'test', 'testing', 'eval')


@dataclass(frozen=True)
class Images:
    """Counts and properties of the images.

    Args:
        num_train: Number of training images.
        epoch_length: Number of training images per epoch.
        num_validation: Number of validation images.
        num_classes: Number of classes.
        side: Median of the shorter sides, in pixels.
        is_grey: Whether no sample has colours.
        samples: Paths of some training images.
        read_seconds: Mean time to read a sample and to decode it.
        files: Number, bytes and hash of the files of each split.
    """
    num_train: int
    epoch_length: int
    num_validation: int
    num_classes: int
    side: int
    is_grey: bool
    samples: Sequence[str]
    read_seconds: float = 0.
    files: Dict[str, str] = field(default_factory=dict)


def inspect_images(
        data: str,
        train_split: str,
        val_split: str,
        train_fraction: float = 1.,
        class_map: str = '',
        keep_length: bool = False,
        **kwargs: Any,
) -> Images:
    """Count the images of a folder with splits, and open some of them.

    Args:
        data: The folder.
        train_split: Name of the training split.
        val_split: Name of the validation split; '' if there is none.
        train_fraction: Share of each class that is used.
        class_map: See `open_folder`.
        keep_length: An epoch is as long as with all images.
        **kwargs: Further arguments of `open_folder`.

    Raises:
        FileNotFoundError: If a split or the class map does not exist.
        ValueError: If there are no images, or none of the samples can be read.
    """
    reader = open_folder(data, train_split, class_map, **kwargs)
    images, names = reader.samples, list(reader.class_to_idx)
    _check_classes(reader.root, names)
    chosen = [images[i * len(images) // NUM_SAMPLES][0] for i in range(NUM_SAMPLES)]
    samples, sides, modes, began = [], [], set(), time.monotonic()
    for path in dict.fromkeys(chosen):
        try:
            with Image.open(path) as image:
                image.load()
        except UNREADABLE:
            continue  # train.py names and skips it
        if exceeds_8_bits(image.mode):
            continue  # in the same way
        samples.append(path)
        sides.append(min(image.size))
        modes.add(image.mode)
    read_seconds = (time.monotonic() - began) / max(1, len(samples))
    if not samples:
        raise ValueError(f'No image of a sample in {reader.root!r} can be read. Convert the images to PNG or JPEG.')
    validation: Any = open_folder(data, val_split, reader.class_to_idx, **kwargs) if val_split else []
    files = {split: describe_files(found) for split, found in ((train_split, reader), (val_split, validation)) if split}
    num_train = sum(num_kept(train_fraction, count) for count in Counter(label for _, label in images).values())
    return Images(
        num_train, len(images) if keep_length else num_train, len(validation), len(set(reader.class_to_idx.values())),
        sorted(sides)[len(sides) // 2], modes <= {'L', '1'}, samples, read_seconds, files)


def check_unchanged(images: Images, output: str) -> None:
    """Refuse other images than those of the runs in OUTPUT.

    Raises:
        ValueError: If an image was added, removed, renamed, replaced or moved to another class.
    """
    path = Path(output, RECORD)
    known = json.loads(path.read_text(encoding='utf-8')) if _has_runs(Path(output)) and path.exists() else {}
    for split, found in images.files.items():
        if known.get(split, found) != found:
            raise ValueError(
                f'The images in {split} have changed since the run in {output!r}: it had {known[split]}, now there are'
                f' {found}. Set another --output, or remove the folder.')


def record_images(images: Images, output: str) -> None:
    """Record the images that the runs in OUTPUT see, for `check_unchanged`."""
    Path(output).mkdir(parents=True, exist_ok=True)
    write_text(Path(output, RECORD), json.dumps(images.files))


def _check_classes(root: str, names: Collection[str]) -> None:
    names = sorted(names)
    if len(names) < 2:
        raise ValueError(f'{root!r} has one class, {names[0]!r}. Expected two or more folders with images.')
    if sum(name.casefold() in SPLIT_NAMES for name in names) > 1:
        raise ValueError(
            f'The folders with images in {root!r} are named like splits: {", ".join(names)}. Put the images of'
            f' each class into a folder of its own: {root}/train/CLASS/IMAGE.')


def prepare_splits(data: str, output: str, class_map: str = '', input_key: Optional[str] = None) -> str:
    """Return a folder with splits: `data`, or OUTPUT/data with links to its images.

    Args:
        data: The folder.
        output: Parent of the new folder.
        class_map: See `open_folder`.
        input_key: See `open_folder`.

    Raises:
        FileNotFoundError: If `data` is no folder.
        ValueError: If the folder does not allow a split, or see `split_images`.
    """
    if not os.path.isdir(data):
        raise FileNotFoundError(f'No folder {data!r}. Give a folder with one folder of images per class.')
    check_split_names(data)
    splits = [name for name in find_splits(data) if has_class_folders(os.path.join(data, name))]
    if len(splits) > 1:
        return data
    root = data
    if splits:
        if not splits[0].startswith('train'):
            raise ValueError(f'{data!r} has the split {splits[0]!r}, and no training images in {data}/train.')
        root = os.path.join(data, splits[0])
        others = sorted(entry.name for entry in os.scandir(data) if entry.is_dir() and entry.name != splits[0])
        ignored = f' Ignored: {", ".join(others)}.' if others else ''
        _logger.info(f'No validation images in {data!r}: a fifth of {splits[0]!r} is set aside.{ignored}')
    scan = scan_folder(root, input_key.split(';') if input_key else None)
    if not scan.images:
        raise ValueError(f'No images in {root!r}. Put the images into one folder per class: {root}/CLASS/IMAGE.')
    if class_map:
        if not os.path.isfile(class_map):  # train.py looks for it in the split, too, where it is not
            raise FileNotFoundError(f'--class-map: no file {class_map!r}.')
        class_to_idx = resolve_class_map(class_map, root, scan.names) or {}
        scan.images = [(path, name) for path, name in scan.images if name in class_to_idx]
    else:
        check_class_folders(scan, is_training=True)
    _check_classes(scan.root, scan.names)
    if not input_key:
        warn_of_other_types(scan)
    split_images(scan, Path(output) / 'data')
    return os.path.join(output, 'data')


def split_images(scan: FolderScan, folder: Path, seed: int = 0) -> None:
    """Link images as FOLDER/train/CLASS/* and FOLDER/validation/CLASS/*.

    A fifth of each class, drawn with the seed, is for validation, but at least one image of each class with two or
    more. An existing split of the same images is kept, and gets new links if the images were moved (not on Windows
    without the right to link). A split of other images is replaced if no run beside FOLDER has seen it. Nothing else is
    ever removed or overwritten.

    Args:
        scan: The images.
        folder: Folder to write.
        seed: Random seed of the split.

    Raises:
        ValueError: If the folder exists and is not a split of these images, or lies inside the images or around them.
    """
    root, place = os.path.realpath(scan.root), os.path.realpath(folder)
    if os.path.splitdrive(root)[0] == os.path.splitdrive(place)[0] and os.path.commonpath([root, place]) in (
            root, place):
        raise ValueError(
            f'The split {str(folder)!r} would lie inside the images {scan.root!r}, or around them. Set --output to'
            ' another folder.')
    by_class: Dict[str, List[str]] = defaultdict(list)
    for path, name in scan.images:
        by_class[name].append(os.path.relpath(path, scan.root))
    if max(map(len, by_class.values())) < 2:
        raise ValueError(
            f'No class in {scan.root!r} has two images, so there is none for validation. Add images.')
    num_bytes = sum(os.path.getsize(path) for path, _ in scan.images if os.path.exists(path))
    record = json.dumps(dict(source=root, seed=seed, images=by_class, num_bytes=num_bytes), sort_keys=True)
    written = folder / 'split.json'
    known = written.read_text(encoding='utf-8') if written.exists() else ''
    if known == record:
        return
    is_removable = _is_removable(folder)
    before = json.loads(known) if is_removable else {}
    was_moved = {**before, 'source': root} == json.loads(record) and not os.path.exists(before['source'])
    if folder.exists() and not (is_removable and (was_moved or not _has_runs(folder.parent))):
        raise ValueError(
            f'{str(folder)!r} exists, and is not a split of the images that {scan.root!r} has now. Set another'
            ' --output.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix='.data-', dir=folder.parent))
    try:
        _write_split(scan.root, by_class, temporary, seed)
        (temporary / 'split.json').write_text(record, encoding='utf-8')
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(f'{temporary.name}-old')
            os.rename(folder, old)
            shutil.rmtree(old)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _has_runs(output: Path) -> bool:
    """Return whether OUTPUT has a run that has seen the images."""
    return any(has_run(file.parent) for file in output.glob('*/args.yaml'))


def _is_removable(folder: Path) -> bool:
    """Return whether a folder has nothing but a `split.json` of `split_images`, and links."""
    written = folder / 'split.json'
    if folder.is_symlink() or not written.is_file() or not written.read_text('utf-8').startswith('{"images": {'):
        return False
    return all(path.is_symlink() or path.is_dir() or path == written for path in folder.rglob('*'))


def _write_split(root: str, by_class: Dict[str, List[str]], folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    for name in class_order(by_class):
        images = draw.sample(by_class[name], len(by_class[name]))
        count = max(round(VALIDATION_SHARE * len(images)), int(len(images) > 1))
        for i, image in enumerate(images):
            # images of two folders of one name, which a class map allows, may have one name
            parts = Path(image).parts
            file = parts[-1] if len(parts) == 2 else '-'.join(parts)
            target = folder / ('validation' if i < count else 'train') / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            source = os.path.abspath(os.path.join(root, image))
            try:
                os.symlink(source, target)
            except FileExistsError:
                raise
            except OSError:  # Windows without the right to link
                shutil.copy2(source, target)
