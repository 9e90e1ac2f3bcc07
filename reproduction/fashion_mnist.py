"""Write Fashion-MNIST (Xiao et al., 2017) as image folders, for `train.py` and other tools.

    python reproduction/fashion_mnist.py DIR [--source FOLDER]

DIR/train and DIR/validation hold the 60,000 training and the 10,000 test images. DIR/tuning splits the training images:
5,000 of them, 500 of each class, are set aside as `validation` for tuning. Its files are hard links and need no space.
"""
import argparse
import gzip
import os
import sys
import zlib
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from timm_dearkd.commands import run_command  # noqa: E402
from timm_dearkd.files import new_folder  # noqa: E402

DEBIAN_FOLDER = Path('/usr/share/datasets/fashion-mnist')  # Debian package dataset-fashion-mnist
NUM_SET_ASIDE = 500  # per class


def find_source(source: Optional[Path], folder: Path) -> Path:
    """Return the folder with the four idx files, gzipped or not. torchvision downloads them if there is none.

    Raises:
        FileNotFoundError: If `source` has no idx files.
        OSError: If the download fails.
    """
    for candidate in (source,) if source else (DEBIAN_FOLDER,):
        if any(candidate.glob('train-images-idx3-ubyte*')):
            return candidate
    if source:
        raise FileNotFoundError(
            f'--source {source} has no train-images-idx3-ubyte.gz. Give the folder of the four idx files.')
    try:
        FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as e:
        raise OSError(
            f'Cannot download Fashion-MNIST ({e}). Install it (apt-get install dataset-fashion-mnist), or give'
            ' the folder of its four idx files with --source.') from e
    return folder / 'FashionMNIST' / 'raw'


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes, gzipped or not."""
    packed = path.with_name(f'{path.name}.gz')
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except (EOFError, zlib.error) as e:
        raise OSError(f'{packed} is damaged ({e}). Download it again.') from e
    shape = np.frombuffer(content, '>i4', count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def write_fashion_mnist(folder: Path, source: Optional[Path] = None) -> None:
    """Write the folders described above, unless they exist."""
    if folder.exists():
        return
    with new_folder(folder) as temporary:
        _write_images(temporary, find_source(source, temporary.parent))


def _write_images(folder: Path, source: Path) -> None:
    for split, name in (('train', 'train'), ('validation', 't10k')):
        labels = read_idx(source / f'{name}-labels-idx1-ubyte')
        images = read_idx(source / f'{name}-images-idx3-ubyte')
        count = dict.fromkeys(range(10), 0)
        bar = tqdm(images, desc=split, unit='image', leave=False, disable=None)
        for index, (image, label) in enumerate(zip(bar, labels)):
            path = folder / split / str(label) / f'{index:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            if split == 'train':
                count[label] += 1
                part = 'validation' if count[label] <= NUM_SET_ASIDE else 'train'
                link = folder / 'tuning' / part / str(label) / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--source', type=Path, help='folder of the four idx files, gzipped or not')
    args = parser.parse_args(argv)
    write_fashion_mnist(args.folder, args.source)


if __name__ == '__main__':
    run_command('fashion_mnist.py', main)
