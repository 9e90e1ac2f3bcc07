"""Contact sheets of synthetic images, and plots of their losses."""
import io
from typing import Any, Dict, List, Sequence

from PIL import Image, ImageDraw, ImageFont

from timm_dearkd.analysis.figures import new_figure, render

GAP = 2  # between the images of a contact sheet, in pixels
MARGIN = 90  # for the class names at the left, in pixels


def encode_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def contact_sheet(rows: Dict[str, List[Image.Image]]) -> bytes:
    """Draw a PNG with a row of images for each class.

    Args:
        rows: Images by class name.
    """
    side = max((min(128, max(32, image.size[1])) for images in rows.values() for image in images), default=32)
    columns = max((len(images) for images in rows.values()), default=0)
    sheet = Image.new('RGB', (MARGIN + columns * (side + GAP), max(1, len(rows)) * (side + GAP)), 'white')
    draw, font = ImageDraw.Draw(sheet), _font()
    for y, (name, images) in enumerate(rows.items()):
        draw.text((4, y * (side + GAP) + side // 2 - 6), name[:14], fill='black', font=font)
        for x, image in enumerate(images):
            image = image.convert('RGB').resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (MARGIN + x * (side + GAP), y * (side + GAP)))
    return encode_png(sheet)


def _font() -> Any:
    """Return matplotlib's font if installed; Pillow's own has only ASCII letters."""
    try:
        import matplotlib
        return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf', 10)
    except (ImportError, OSError):
        return ImageFont.load_default()


def loss_curves(losses: Sequence[Dict[str, Any]]) -> bytes:
    """Plot each loss in a panel of a PNG: mean and range over the batches, by step.

    Args:
        losses: Rows with 'step' and the losses of a batch.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    names = [name for name in losses[0] if name not in ('batch', 'step')]
    steps = sorted({row['step'] for row in losses})
    figure, (panels,) = new_figure(1, len(names), (3 * len(names), 2.8))
    for axes, name in zip(panels, names):
        values = [[row[name] for row in losses if row['step'] == step] for step in steps]
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
        axes.plot(steps, [sum(v) / len(v) for v in values], marker='.')
        axes.set(title=name, xlabel='step')
        axes.grid(alpha=0.3)
    return render(figure)
