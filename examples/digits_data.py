"""Write scikit-learn's 1,797 handwritten digits as an image folder, with a train and a validation split.

    python examples/digits_data.py output/digits/data --seed 0

makes DIR/train, DIR/validation, and DIR/train_10pct, the same 10 % of each class of the training images. The images
are real scans of 8x8 pixels, written four times as large.
"""
import argparse
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write_split(folder: Path, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, size: int) -> None:
    """Write the images (N, 8, 8), 0 to 16, that `indices` name as DIR/CLASS/INDEX.png."""
    for index in indices:
        path = folder / f'{labels[index]}' / f'{index:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (images[index] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--seed', type=int, default=0, help='seed of the split')
    parser.add_argument('--size', type=int, default=32, help='side length of the images')
    parser.add_argument('--validation', type=float, default=0.3, help='share of the images for validation')
    args = parser.parse_args()

    digits = load_digits()
    labels = digits.target
    train, validation = train_test_split(
        np.arange(len(labels)), test_size=args.validation, random_state=args.seed, stratify=labels)
    few, _ = train_test_split(train, train_size=0.1, random_state=args.seed, stratify=labels[train])

    splits = ('train', 'train_10pct', 'validation')
    if args.folder.exists() and any(path.name not in splits for path in args.folder.iterdir()):
        parser.error(f'{args.folder} holds something else than digits. Name a new folder.')
    temporary = args.folder.with_name(f'.{args.folder.name}.tmp')
    for folder in (temporary, args.folder):
        shutil.rmtree(folder, ignore_errors=True)
    for name, indices in zip(splits, (train, few, validation)):
        write_split(temporary / name, digits.images, labels, indices, args.size)
        print(f'{args.folder / name}: {len(indices)} images')
    os.replace(temporary, args.folder)


if __name__ == '__main__':
    main()
