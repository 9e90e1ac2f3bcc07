"""Image folders: their image files, their classes and the order of the classes."""
import hashlib
import logging
import numbers
import os
import pickle
import re
import struct
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from mimetypes import guess_type
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from PIL import Image
from timm.data import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from distill_hooks.errors import one_line

_logger = logging.getLogger(__name__)

IMAGE_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'CMYK'}  # Pillow's, by number of channels
NUM_CHECKED_CLASSES = 1000
NUM_CHECKED_IMAGES = 10  # of a class
# Pillow's errors for broken files and for files that are not images
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
NUM_DIGEST_FILES = 20
# Images that are not read; each system knows other ones
_OTHER_TYPES = {'.avif', '.heic', '.heif', '.j2k', '.jp2', '.jxl', '.tga'}
_HIGH_BIT_DEPTH_MODES = ('I', 'F')
UNUSED_CLASS = '(no folder, class '  # start of the names of outputs without a folder, see --num-classes
_TRAIN_SPLITS = ('train', 'training')
_EVAL_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation')


def normal_name(name: str) -> str:
    """Return a class name in Unicode's composed form (NFC).

    `é` may be one character (NFC) or two (NFD, as macOS writes file names). Both look the same.
    """
    return unicodedata.normalize('NFC', name)


def normal_label(label: Any) -> Any:
    """Return the `normal_name` of a label of text; other labels as they are."""
    return normal_name(label) if isinstance(label, str) else label


def normal_names(names: Iterable[str], root: str) -> Dict[str, str]:
    """Return the `normal_name` of each class name of a data set.

    Args:
        names: Names as they are stored.
        root: Place of the data set, for the message.

    Raises:
        ValueError: If two names differ only in their Unicode form.
    """
    stored: Dict[str, str] = {}
    for name in names:
        normal = normal_name(name)
        if stored.setdefault(normal, name) != name:
            raise ValueError(
                f'{root!r} has two class folders {normal!r}. Their names look the same and differ in their Unicode form'
                ' (NFC and NFD). Move the images into one of them.')
    return {name: normal for normal, name in stored.items()}


def class_order(names: Iterable[str]) -> List[str]:
    """Sort class names by timm's natural key, then by the name itself.

    The natural key of some names is equal (`A` and `a`, `1` and `01`). timm sorts a set by this key alone, so the order
    of such names differs between processes.
    """
    return sorted(names, key=_total_key)


def _total_key(name: str) -> Tuple[List[Any], str]:
    try:
        return natural_key(name), name
    except ValueError:  # int() does not read digits such as ²
        return [name.lower()], name


def index_by_name(names: Iterable[str]) -> Dict[str, int]:
    """Return the class index of each name. Classes are numbered in `class_order`."""
    return {name: index for index, name in enumerate(class_order(set(names)))}


def image_types() -> Set[str]:
    """Return the file name endings of images: those that timm reads, and others that Pillow reads."""
    return get_img_extensions(as_set=True) | {'.jfif', '.jpe', '.webp', '.bmp', '.tif', '.tiff', '.gif'}


def is_image_file(path: str, types: Optional[Collection[str]] = None) -> bool:
    """Return whether a file has the ending of an image and is not hidden (macOS writes `._photo.jpg`)."""
    name = os.path.basename(path)
    return not name.startswith('.') and os.path.splitext(name)[1].lower() in (types or image_types())


@dataclass
class FolderScan:
    """Images in a folder and its subfolders. Hidden files and folders are ignored.

    Args:
        root: The folder.
        images: Path and class name of each image, sorted by path. The class name is the `normal_name` of the folder
            that holds the image.
        folders: Folders that hold images, relative to `root`.
        other_types: Number of image files of types that are not read, by ending.
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
    """Find the images in a folder.

    Args:
        root: The folder.
        types: File name endings to read, such as '.png'; None reads all known types.

    Raises:
        ValueError: If the names of two folders differ only in their Unicode form.
    """
    types = set(types or image_types())
    scan = FolderScan(root)
    for path, dirs, files in os.walk(root, followlinks=True):
        dirs[:] = [name for name in dirs if not name.startswith('.')]
        images = [file for file in files if is_image_file(file, types)]
        endings = (os.path.splitext(file)[1].lower() for file in files if not file.startswith('.'))
        scan.other_types.update(
            e for e in endings if e not in types and (
                e in _OTHER_TYPES or (guess_type(f'x{e}')[0] or '').startswith('image/')))
        if not images:
            continue
        relative = Path(path).relative_to(root)
        scan.folders.append(relative)
        name = normal_name(relative.name)
        scan.images += [(os.path.join(path, image), name) for image in images]
    normal_names((folder.name for folder in scan.folders), root)
    scan.images.sort(key=lambda image: _total_key(image[0]))
    return scan


class ImageFolderReader(ReaderImageFolder):
    """A timm reader of given image files.

    Args:
        root: The folder.
        images: Path and class name of each image.
        class_to_idx: Class index by name. Images of other classes are skipped.
    """

    def __init__(self, root: str, images: Sequence[Tuple[str, str]], class_to_idx: Dict[str, int]) -> None:
        Reader.__init__(self)
        self.root = root
        self.class_to_idx = class_to_idx
        self.samples = [(path, class_to_idx[name]) for path, name in images if name in class_to_idx]

    @cached_property
    def digests(self) -> Dict[int, str]:
        """Hash of the names and sizes of the first files of each class, by class index.

        A class folder is recognised by it after a renaming.
        """
        files: Dict[int, List[Tuple[str, int]]] = {}
        for path, index in self.samples:
            of_class = files.setdefault(index, [])
            if len(of_class) < NUM_DIGEST_FILES:
                # a link may lead nowhere, and is skipped when it is read
                of_class.append((os.path.basename(path), os.path.getsize(path) if os.path.exists(path) else -1))
        return {index: hashlib.sha256(repr(of_class).encode()).hexdigest()[:16] for index, of_class in files.items()}


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
        split: The split.
        class_map: Path of a class map, or class index by name; '' numbers the class folders in `class_order`.
        is_training: Whether every class must have images.
        input_key: File name endings to read, separated by semicolons; None reads all known types.
        input_img_mode: Pillow mode that the images are converted to.

    Raises:
        FileNotFoundError: If the split or the class map does not exist.
        ValueError: If there are no images, the folders are not classes, or see `check_images`.
    """
    folder = split_folder(root, split)
    scan = scan_folder(folder, input_key.split(';') if input_key else None)
    if not scan.images:
        raise ValueError(
            f'No images in {folder!r}, split {split!r} of {root!r}. Image folders look like DIR/train/CLASS/IMAGE and'
            ' DIR/validation/CLASS/IMAGE.')
    if is_training and not input_key and not isinstance(class_map, dict):
        warn_of_other_types(scan)
    class_to_idx = resolve_class_map(class_map, folder, scan.names, is_training)
    if class_to_idx is None:
        check_class_folders(scan, is_training)
        class_to_idx = index_by_name(scan.names)
    reader = ImageFolderReader(scan.root, scan.images, class_to_idx)
    check_images(reader.samples, is_training)
    return reader


def warn_of_other_types(scan: FolderScan) -> None:
    """Warn of images of types that are not read."""
    if scan.other_types:
        counts = ', '.join(f'{count} {kind}' for kind, count in scan.other_types.most_common())
        _logger.warning(
            f'Skips images in {scan.root!r} of types that are not read: {counts}. Convert them to PNG or JPEG.')


def find_splits(root: str) -> List[str]:
    """Return the names of timm's splits that a folder has."""
    return [name for name in (*_TRAIN_SPLITS, *_EVAL_SPLITS) if os.path.isdir(os.path.join(root, name))]


def split_folder(root: str, split: str) -> str:
    """Return the folder of a split.

    Args:
        root: Image folder, with a folder for each split or without splits.
        split: Name of a folder in `root`, or timm's other name of it (`val` for `validation`), or a path.

    Raises:
        FileNotFoundError: If the split does not exist.
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
    check_split_names(root)
    return root


def has_class_folders(folder: str) -> bool:
    """Return whether a path is a folder with folders in it."""
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith('.') for entry in entries)


def check_split_names(root: str) -> None:
    """Refuse folders of classes with the name of a split in capitals, which would be taken for classes or ignored."""
    known = (*_TRAIN_SPLITS, *_EVAL_SPLITS)
    misnamed = [
        name for name in sorted(os.listdir(root)) if name not in known and name.lower() in known
        and has_class_folders(os.path.join(root, name))]
    if misnamed:
        changes = ' and '.join(f'{name!r} to {name.lower()!r}' for name in misnamed)
        raise ValueError(f'The splits of {root!r} must have lower-case names. Rename {changes}.')


def check_class_folders(scan: FolderScan, is_training: bool) -> None:
    """Refuse folders whose classes are unclear: images without a class, classes in classes, empty classes."""
    root = scan.root
    if Path() in scan.folders:
        raise ValueError(f'There are images in {root!r} itself. Expected a folder for each class. Move them.')
    nested = class_order({path.name for path in scan.folders if len(path.parts) > 1})
    if nested:
        raise ValueError(
            f'There are folders in class folders of {root!r}, and classes are taken from the innermost folders:'
            f' {first_names(nested)}. Move the images up. If these are the classes, list them in a --class-map.')
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name) if is_training else ():
        if entry.is_dir() and not entry.name.startswith('.') and normal_name(entry.name) not in scan.names:
            raise ValueError(f'Class folder {entry.path!r} has no images. Add some, or remove the folder.')


def resolve_class_map(
        class_map: Any,
        root: str,
        names: Collection[str],
        is_training: bool = False,
) -> Optional[Dict[Any, int]]:
    """Return the class index by name of a class map, and compare a file with the class folders.

    Warns of folders that a file does not name and, in training, of its classes without a folder.

    Args:
        class_map: Path of a class map, or class index by name; '' is no class map.
        root: Place of the class folders.
        names: Names of the class folders, see `normal_name`.
        is_training: Whether every class must have images.

    Returns:
        Class index by name; None without a class map.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or the class map has none of the class folders.
    """
    if isinstance(class_map, dict):
        class_to_idx = {normal_name(str(name)): int(index) for name, index in class_map.items()}
    elif class_map:
        class_to_idx = read_class_map(class_map, root, names)
    else:
        return None
    skipped = class_order(set(names) - set(class_to_idx))
    missing = class_order(map(str, set(class_to_idx) - set(names))) if is_training else []
    if len(skipped) == len(set(names)):
        raise ValueError(
            f'None of the classes of {root!r} ({first_names(skipped)}) is among those asked for'
            f' ({first_names(class_order(map(str, class_to_idx)))}). Rename the folders, or correct the --class-map.')
    if (skipped or missing) and not isinstance(class_map, dict):
        _logger.warning(
            f'--class-map {class_map} does not fit {root!r}.'
            + (f' Skips folders that it does not name: {first_names(skipped)}.' if skipped else '')
            + (f' These classes have no images: {first_names(missing)}.' if missing else ''))
    return class_to_idx


def read_class_map(path: str, root: str = '', names: Collection[str] = ()) -> Dict[Any, int]:
    """Read a --class-map: a class name per line, in the order of the indices, or an index and a name per line.

    Skips empty lines and lines that start with #. timm reads a pickled dictionary (`.pkl`).

    Args:
        path: The file.
        root: Folder to look in if the path does not exist.
        names: Names of the class folders. A line that equals one of them is a name without an index.

    Returns:
        Class index by name, see `normal_name`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line cannot be read. The message has its number.
    """
    found = next((file for file in (path, os.path.join(root, path)) if os.path.isfile(file)), None)
    if found is None:
        raise FileNotFoundError(f'--class-map: no file {path!r}.')
    if path.lower().endswith('.pkl'):
        return _read_pickled_class_map(found)
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


def _read_pickled_class_map(path: str) -> Dict[Any, int]:
    try:
        class_to_idx = load_class_map(path)
        for name, index in class_to_idx.items():
            if not isinstance(index, numbers.Integral) or index < 0:
                raise ValueError(f'class {name!r} has the index {index!r}')
    except (AttributeError, EOFError, IndexError, ValueError, pickle.UnpicklingError) as e:
        raise ValueError(
            f'--class-map {path!r} cannot be read ({str(e).rstrip(".")}). Expected a pickled dictionary of class names'
            ' and plain integers, 0 or more. Write a text file with a class name per line instead.') from e
    # torch.load(weights_only=True) does not read checkpoints with other kinds of integers
    return {normal_label(name): int(i) for name, i in class_to_idx.items()}


def _indexed(path: str, entries: Sequence[Tuple[int, str, int]]) -> Dict[Any, int]:
    """Return the class index by name of (line number, name, index)."""
    class_to_idx: Dict[Any, int] = {}
    for number, name, index in entries:
        if name in class_to_idx:
            raise ValueError(f'Line {number} of --class-map {path!r} repeats the class {name!r}. Remove it.')
        class_to_idx[name] = index
    return class_to_idx


def first_names(names: Sequence[str]) -> str:
    """Return the first five names for a message, and how many more there are."""
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def check_images(samples: Sequence[Tuple[str, int]], is_training: bool) -> None:
    """Refuse classes without a readable image, and classes of images with more than 8 bits per channel.

    Looks at the first and the last image of each class, of 1,000 classes at most. If one of them cannot be read, or has
    more bits than the mode, it looks at ten of the class. Other such images are left to `SkipUnreadable`, and so is a
    class with one image for validation.

    Args:
        samples: Path and class index of each image.
        is_training: Whether every class must have images.

    Raises:
        ValueError: If no image of a class can be read, or most have more than 8 bits per channel.
    """
    by_class: Dict[int, List[str]] = defaultdict(list)
    for path, label in samples:
        by_class[label].append(path)

    def find_fault(path: str) -> Optional[str]:
        """Return 'deep' for more than 8 bits per channel, or why the image cannot be read."""
        try:
            with Image.open(path) as image:
                return 'deep' if exceeds_8_bits(image.mode) else None
        except UNREADABLE as e:
            return one_line(e)

    for paths in list(by_class.values())[::-(-len(by_class) // NUM_CHECKED_CLASSES)]:
        first, last = find_fault(paths[0]), find_fault(paths[-1])
        if not (first or last) or (len(paths) == 1 and not is_training):
            continue
        seen = paths[::-(-len(paths) // NUM_CHECKED_IMAGES)]
        faults = [find_fault(path) for path in seen]
        if 2 * faults.count('deep') > len(seen):
            raise ValueError(
                'Most images of a class have 16 bits per channel or more, such as'
                f' {resolve_link(seen[faults.index("deep")])!r}. Pillow clips them to white. Convert them to 8 bits.')
        if all(fault not in (None, 'deep') for fault in [last, *faults]):
            raise ValueError(
                f'No image of a class can be read: {resolve_link(seen[0])!r} ({faults[0]}), and {len(seen)} of'
                f' {len(paths)} were tried. Convert them to PNG or JPEG, or remove the class.')


def resolve_link(path: str) -> str:
    """Return the target of an absolute link, such as those of `distill`; other paths as they are."""
    target = os.readlink(path) if os.path.islink(path) else ''
    return target if os.path.isabs(target) else path


def exceeds_8_bits(mode: str) -> bool:
    """Return whether an image of a Pillow mode has more than 8 bits per channel."""
    return mode.split(';')[0] in _HIGH_BIT_DEPTH_MODES


def check_mode(path: str, mode: str) -> None:
    """Refuse an image that Pillow clips to white instead of converting it.

    Args:
        path: The image file.
        mode: Pillow mode of the image.

    Raises:
        ValueError: If the image has more than 8 bits per channel.
    """
    if exceeds_8_bits(mode):
        raise ValueError(
            f'{resolve_link(path)!r} has 16 bits per channel or more (mode {mode}). Pillow clips such images to white.'
            ' Convert it to 8 bits.')
