"""Pictures of synthetic images and of their losses."""
import io
from typing import Any, Dict, List, Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ['contact_sheet', 'loss_curves']


def contact_sheet(rows: Dict[str, List[Image.Image]], gap: int = 2, margin: int = 90) -> bytes:
    """A PNG with a row for each class.

    Args:
        rows: Images of each class.
        gap: Pixels between images.
        margin: Pixels for the names at the left.
    """
    side = max((min(128, max(32, image.size[1])) for images in rows.values() for image in images), default=32)
    columns = max((len(images) for images in rows.values()), default=0)
    sheet = Image.new('RGB', (margin + columns * (side + gap), max(1, len(rows)) * (side + gap)), 'white')
    draw, font = ImageDraw.Draw(sheet), _font()
    for y, (name, images) in enumerate(rows.items()):
        draw.text((4, y * (side + gap) + side // 2 - 6), name[:14], fill='black', font=font)
        for x, image in enumerate(images):
            image = image.convert('RGB').resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (margin + x * (side + gap), y * (side + gap)))
    buffer = io.BytesIO()
    sheet.save(buffer, 'PNG')
    return buffer.getvalue()


def _font() -> Any:
    """matplotlib's own, where it is installed: Pillow's has the letters of English alone."""
    try:
        import matplotlib
        return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf', 10)
    except (ImportError, OSError):
        return ImageFont.load_default()


def loss_curves(losses: Sequence[Dict[str, Any]]) -> bytes:
    """A PNG with a panel for each loss over the steps: its mean over the batches, and their range.

    Args:
        losses: 'step' and the losses of a batch at that step, unweighted.

    Raises:
        ImportError: Without matplotlib.
    """
    from matplotlib.figure import Figure

    names = [name for name in losses[0] if name not in ('batch', 'step')]
    steps = sorted({row['step'] for row in losses})
    figure = Figure(figsize=(3 * len(names), 2.8), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        values = [[row[name] for row in losses if row['step'] == step] for step in steps]
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
        axes.plot(steps, [sum(v) / len(v) for v in values], marker='.')
        axes.set(title=name, xlabel='step')
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=100)
    return buffer.getvalue()
