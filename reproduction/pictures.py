"""Draw synthetic images of table 5 beside real ones: `python reproduction/pictures.py`, after that table was run."""
import argparse
import io
import sys
from pathlib import Path
from typing import List, Optional, Sequence

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from timm_dearkd.commands import run_command  # noqa: E402
from timm_dearkd.data_free.look import GAP, MARGIN, contact_sheet, encode_png  # noqa: E402
from timm_dearkd.files import write_bytes  # noqa: E402

CLASSES = (
    'T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')
HEADING = 20  # height in pixels
SIDE = 32  # of an image in pixels
SETS = {
    'DeepInversion': 'small/images-none-seed1', 'generator': 'small/images-generator-seed1',
    'real images': 'data/fashion_mnist'}


def first_images(folder: Path, label: int, count: int) -> List[Image.Image]:
    """Return the first images of a class.

    Raises:
        FileNotFoundError: If there are fewer.
    """
    paths = sorted((folder / 'train' / str(label)).glob('*.png'))[:count]
    if len(paths) < count:
        raise FileNotFoundError(f'{folder} has fewer than {count} images of class {label}. Run table5 first.')
    return [Image.open(path) for path in paths]


def add_headings(sheet: bytes, headings: Sequence[str]) -> bytes:
    """Write a heading above each group of four images and a gap in a contact sheet."""
    image = Image.open(io.BytesIO(sheet))
    above = Image.new('RGB', (image.width, image.height + HEADING), 'white')
    above.paste(image, (0, HEADING))
    for number, heading in enumerate(headings):
        left = MARGIN + number * 5 * (SIDE + GAP)
        ImageDraw.Draw(above).text((left, 4), heading, fill='black', font=ImageFont.load_default())
    return encode_png(above)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, default=ROOT / 'output/reproduction',
                        help='folder with the data and the runs (default: output/reproduction)')
    parser.add_argument('--picture', type=Path, default=ROOT / 'docs/data_free_fashion_mnist.png',
                        help='file to write (default: docs/data_free_fashion_mnist.png)')
    args = parser.parse_args(argv)
    sets = [args.output / name for name in SETS.values()]
    gap = Image.new('L', (SIDE, SIDE), 'white')
    rows = {}
    for label, name in enumerate(CLASSES):
        synthetic, generated, real = (first_images(folder, label, 4) for folder in sets)
        rows[name] = [*synthetic, gap, *generated, gap, *real]
    write_bytes(args.picture, add_headings(contact_sheet(rows), list(SETS)))
    print(args.picture)


if __name__ == '__main__':
    run_command('pictures.py', main)
