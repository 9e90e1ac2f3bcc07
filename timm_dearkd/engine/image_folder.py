"""Image folders: which files are images, which classes they have, and in which order."""
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from mimetypes import guess_type
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from PIL import Image
from timm.data import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

__all__ = [
    'FolderScan', 'ImageFolderReader', 'check_depth', 'check_mode', 'class_digests', 'class_order', 'find_splits',
    'is_deep', 'is_image_file', 'normal_name', 'numbered', 'open_folder', 'read_class_map', 'scan_folder',
    'split_folder',
]

_logger = logging.getLogger(__name__)

NUM_DEPTH_CHECKS = 50
_DEEP_MODES = ('I', 'F')
_TRAIN_SPLITS = ('train', 'training')
_EVAL_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation')


def normal_name(name: str) -> str:
    """Return a class name in Unicode's composed form (NFC), in which equal names are equal strings."""
    return unicodedata.normalize('NFC', name)


def class_order(names: Iterable[str]) -> List[str]:
    """Sort class names as timm does, and names that timm takes for equal (`A` and `a`, `1` and `01`) by themselves.

    timm sorts a set by its natural key alone, so that such names come in another order in every process.
    """
    return sorted(names, key=_total_key)


def _total_key(name: str) -> Tuple[List[Any], str]:
    try:
        return natural_key(name), name
    except ValueError:  # a digit that int() does not read, such as ²
        return [name.lower()], name


def numbered(names: Iterable[str]) -> Dict[str, int]:
    """Return the class index of each name, in `class_order`."""
    return {name: index for index, name in enumerate(class_order(set(names)))}


def is_image_file(path: str, types: Optional[Collection[str]] = None) -> bool:
    """Return whether a file is an image by its ending and not hidden (macOS writes `._photo.jpg`)."""
    name = os.path.basename(path)
    return not name.startswith('.') and os.path.splitext(name)[1].lower() in (types or get_img_extensions(as_set=True))


@dataclass
class FolderScan:
    """Images of a folder and of the folders in it, without hidden ones.

    Args:
        root: The folder.
        images: Path and class name of each image, in an order that depends on the paths alone. The class is the name
            of the image's folder, see `normal_name`.
        folders: Folders that hold images, relative to `root`.
        other_types: Number of image files whose type is not read, by ending.
    """
    root: str
    images: List[Tuple[str, str]] = field(default_factory=list)
    folders: List[Path] = field(default_factory=list)
    other_types: Counter = field(default_factory=Counter)

    @property
    def names(self) -> Set[str]:
        """Names of the classes."""
        return {name for _, name in self.images}


def scan_folder(root: str, types: Optional[Collection[str]] = None) -> FolderScan:
    """Look for images.

    Args:
        root: The folder.
        types: File name endings, such as '.png'; None means all that are read.

    Raises:
        ValueError: If two folders have names that look the same and differ in their Unicode form.
    """
    types = set(types or get_img_extensions(as_set=True))
    scan = FolderScan(root)
    spellings: Dict[str, str] = {}
    for path, dirs, files in os.walk(root, followlinks=True):
        dirs[:] = [name for name in dirs if not name.startswith('.')]
        images = [file for file in files if is_image_file(file, types)]
        endings = (os.path.splitext(file)[1].lower() for file in files if not file.startswith('.'))
        scan.other_types.update(
            e for e in endings if e not in types and (guess_type(f'x{e}')[0] or '').startswith('image/'))
        if not images:
            continue
        relative = Path(path).relative_to(root)
        scan.folders.append(relative)
        name = normal_name(relative.name)
        if spellings.setdefault(name, relative.name) != relative.name:
            raise ValueError(
                f'{root!r} has two class folders {name!r}, whose names look the same and differ in their Unicode form'
                ' (NFC and NFD). Move the images into one of them.')
        scan.images += [(os.path.join(path, image), name) for image in images]
    scan.images.sort(key=lambda image: _total_key(image[0]))
    return scan


class ImageFolderReader(ReaderImageFolder):
    """timm's reader of an image folder, for the images and class indices that are given.

    Args:
        scan: The images.
        class_to_idx: Index of each class name. Images of other classes are skipped.
    """

    def __init__(self, scan: FolderScan, class_to_idx: Dict[str, int]) -> None:
        super(ReaderImageFolder, self).__init__()  # the parent would walk the folder again
        self.root = scan.root
        self.class_to_idx = class_to_idx
        self.samples = [(path, class_to_idx[name]) for path, name in scan.images if name in class_to_idx]


def open_folder(
        root: str,
        split: str,
        class_map: Any = '',
        is_training: bool = False,
        input_key: Optional[str] = None,
        input_img_mode: str = 'RGB',
) -> ImageFolderReader:
    """Open a split of an image folder.

    Args:
        root: The folder, see `split_folder`.
        split: Its split.
        class_map: Path of a class map, or class index by name; '' numbers the class folders in `class_order`.
        is_training: Whether every class must have images.
        input_key: File name endings to read, separated by semicolons; None means all that are read.
        input_img_mode: Pillow mode that the images are converted to.

    Raises:
        FileNotFoundError: If there is no such split or class map.
        ValueError: If there are no images, the folders are no classes, or an image is too deep for the mode.
    """
    folder = split_folder(root, split)
    scan = scan_folder(folder, input_key.split(';') if input_key else None)
    if not scan.images:
        raise ValueError(
            f'No images in {folder!r}, split {split!r} of {root!r}. Image folders look like DIR/train/CLASS/IMAGE and'
            ' DIR/validation/CLASS/IMAGE.')
    if isinstance(class_map, dict):
        class_to_idx = {normal_name(str(name)): index for name, index in class_map.items()}
    else:
        if scan.other_types and is_training and not input_key:
            counts = ', '.join(f'{count} {kind}' for kind, count in scan.other_types.most_common())
            _logger.warning(
                f'Skips images in {folder!r} whose types are not read: {counts}. Convert them to PNG or JPEG.')
        if class_map:
            class_to_idx = read_class_map(class_map, folder, scan.names)
            _compare_class_map(class_map, scan, class_to_idx, is_training)
        else:
            _check_class_folders(scan, is_training)
            class_to_idx = numbered(scan.names)
    reader = ImageFolderReader(scan, class_to_idx)
    if not reader.samples:
        raise ValueError(
            f'None of the classes of {folder!r} ({_first(class_order(scan.names))}) is among those asked for'
            f' ({_first(class_order(class_to_idx))}). Rename the folders, or correct the --class-map.')
    check_depth(reader.samples, input_img_mode)
    return reader


def class_digests(reader: Any, num_files: int = 20) -> Dict[int, str]:
    """Return a hash of the names and sizes of the first files of each class, by which class folders are recognised.

    Args:
        reader: What `open_folder` returns; any other has no digests.
        num_files: Files of each class that are looked at.
    """
    if not isinstance(reader, ImageFolderReader):
        return {}
    files: Dict[int, List[Tuple[str, int]]] = {}
    for path, index in reader.samples:
        of_class = files.setdefault(index, [])
        if len(of_class) < num_files:
            of_class.append((os.path.basename(path), os.path.getsize(path)))
    return {index: hashlib.sha256(repr(of_class).encode()).hexdigest()[:16] for index, of_class in files.items()}


def find_splits(root: str) -> List[str]:
    """Return the names of the splits in a folder, among those that timm looks for."""
    return [name for name in (*_TRAIN_SPLITS, *_EVAL_SPLITS) if os.path.isdir(os.path.join(root, name))]


def split_folder(root: str, split: str) -> str:
    """Return the folder of a split.

    Args:
        root: Image folder, with a folder for each split or without splits.
        split: Name of a folder in `root`, where timm's other names of the same split count, or a path.

    Raises:
        FileNotFoundError: If there is no such split.
    """
    names = [split]
    names += next((kind for kind in (_TRAIN_SPLITS, _EVAL_SPLITS) if split in kind), ())
    for name in filter(None, names):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    is_path = os.path.basename(split) != split
    if is_path and os.path.isdir(split):
        return split
    if is_path or find_splits(root):
        splits = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))
        what = f'No folder {split!r}, neither here nor' if is_path else f'No split {split!r}'
        raise FileNotFoundError(f'{what} in image folder {root!r}. There are: {", ".join(splits)}.')
    return root


def _check_class_folders(scan: FolderScan, is_training: bool) -> None:
    """Refuse folders from which timm would make other classes than are meant."""
    root = scan.root
    if Path() in scan.folders:
        raise ValueError(f'There are images in {root!r} itself. Expected a folder for each class. Move them.')
    nested = class_order({path.name for path in scan.folders if len(path.parts) > 1})
    if nested:
        raise ValueError(
            f'There are folders in class folders of {root!r}, and classes are taken from the innermost folders:'
            f' {_first(nested)}. Move the images up. If these are the classes, list them in a --class-map.')
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name) if is_training else ():
        if entry.is_dir() and not entry.name.startswith('.') and normal_name(entry.name) not in scan.names:
            raise ValueError(f'Class folder {entry.path!r} has no images. Add some, or remove the folder.')


def read_class_map(path: str, root: str = '', names: Collection[str] = ()) -> Dict[str, int]:
    """Read a --class-map: a class name per line, in the order of the indices, or an index and a name per line.

    Skips empty lines and lines that start with #. A pickled dictionary (`.pkl`) is read by timm.

    Args:
        path: The file.
        root: Folder to look in where there is no such file.
        names: Names of the class folders. A line that is one of them has no index.

    Returns:
        Class index by name, see `normal_name`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line cannot be read. The message names it.
    """
    found = next((file for file in (path, os.path.join(root, path)) if os.path.isfile(file)), None)
    if found is None:
        raise FileNotFoundError(f'--class-map: no file {path!r}.')
    if path.endswith('.pkl'):
        return {normal_name(name) if isinstance(name, str) else name: i for name, i in load_class_map(found).items()}
    with open(found, encoding='utf-8-sig', errors='replace') as file:
        lines = [(number, normal_name(line.strip())) for number, line in enumerate(file, 1)]
    lines = [(number, line) for number, line in lines if line in names or (line and not line.startswith('#'))]
    if not lines:
        raise ValueError(f'--class-map {path!r} is empty. Write one class name per line.')
    pairs = [(number, re.fullmatch(r'(\d+)\s+(\S.*)', line)) for number, line in lines]
    if not pairs[0][1] or lines[0][1] in names:
        return _indexed(path, [(number, line, index) for index, (number, line) in enumerate(lines)])
    for (number, match), (_, line) in zip(pairs, lines):
        if match is None:
            raise ValueError(
                f'Line {number} of --class-map {path!r} is {line[:40]!r}, expected an index and a name as in line'
                f' {lines[0][0]}. Write either in every line or in none.')
    return _indexed(path, [(number, match[2], int(match[1])) for number, match in pairs if match])


def _indexed(path: str, entries: Sequence[Tuple[int, str, int]]) -> Dict[str, int]:
    """Return the index by name of (line, name, index)."""
    class_to_idx: Dict[str, int] = {}
    for number, name, index in entries:
        if name in class_to_idx:
            raise ValueError(f'Line {number} of --class-map {path!r} repeats the class {name!r}. Remove it.')
        class_to_idx[name] = index
    return class_to_idx


def _compare_class_map(path: str, scan: FolderScan, class_to_idx: Dict[str, int], is_training: bool) -> None:
    """Warn of folders that a class map does not name and, in training, of classes without a folder."""
    skipped = class_order(scan.names - set(class_to_idx))
    missing = class_order(set(class_to_idx) - scan.names) if is_training else []
    if skipped or missing:
        _logger.warning(
            f'--class-map {path} does not fit {scan.root!r}.'
            + (f' Skips folders that it does not name: {_first(skipped)}.' if skipped else '')
            + (f' These classes have no images: {_first(missing)}.' if missing else ''))


def _first(names: Sequence[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def check_depth(samples: Sequence[Tuple[str, int]], mode: str) -> None:
    """Refuse a folder of images that are too deep, by the first image of each class (of 50 classes at most).

    Raises:
        ValueError: See `check_mode`.
    """
    paths = list({label: path for path, label in reversed(samples)}.values())
    for path in paths[::-(-len(paths) // NUM_DEPTH_CHECKS)]:
        try:
            with Image.open(path) as image:
                found = image.mode
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # a warning names it when it is read
        check_mode(path, found, mode)


def is_deep(found: str, mode: str) -> bool:
    """Return whether an image of mode `found` has more bits per channel than `mode`, so that Pillow would clip it."""
    return found.split(';')[0] in _DEEP_MODES and mode.split(';')[0] not in _DEEP_MODES


def check_mode(path: str, found: str, mode: str) -> None:
    """Refuse an image that Pillow would clip instead of converting it, to white as a rule.

    Args:
        path: Its file.
        found: Pillow mode of the image.
        mode: Pillow mode to convert it to.

    Raises:
        ValueError: If the image has more than 8 bits per channel and the mode has 8.
    """
    if is_deep(found, mode):
        raise ValueError(
            f'{path!r} has 16 bits per channel or more (mode {found}), which Pillow clips to white. Convert it to 8'
            ' bits.')
