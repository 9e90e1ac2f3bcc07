"""Drawing that the tools share: matplotlib figures as PNG, or as SVG in the colours of the page around it."""
import io
import logging
import re
from typing import Any, Optional, Sequence, Tuple

__all__ = ['new_figure', 'plain', 'plot_series', 'render', 'shade_stage2']

logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)


def new_figure(rows: int = 1, columns: int = 1, size: Tuple[float, float] = (7, 4), **kwargs: Any) -> Tuple[Any, Any]:
    """A figure and its axes, (rows, columns).

    Raises:
        ValueError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError('Pictures need matplotlib: pip install "timm-dearkd[analysis]".') from e
    figure = Figure(figsize=size, layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def plain(text: Any) -> str:
    """Text of somebody else as a label: no formulas between dollars, and not hidden for a leading underscore."""
    text = str(text).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def render(figure: Any, kind: str = 'png', dpi: int = 110) -> bytes:
    """A figure as the bytes of a PNG, or of an SVG to put into a page, whose text and lines take the page's colour."""
    import matplotlib

    buffer = io.BytesIO()
    if kind == 'png':
        figure.savefig(buffer, format='png', dpi=dpi, bbox_inches='tight', pad_inches=0.08)
        return buffer.getvalue()
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'timm-dearkd'}):
        figure.savefig(
            buffer, format='svg', transparent=True, bbox_inches='tight', pad_inches=0.08, metadata={'Date': None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index('<svg'):].replace('#000000', 'currentColor')
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', '<g', svg)  # several of them share a page
    return re.sub(r'^<svg ', '<svg fill="currentColor" ', svg).encode()


def plot_series(axes: Any, epochs: Sequence[int], values: Sequence[float], **kwargs: Any) -> None:
    """A line over the epochs; with points where there are few."""
    axes.plot(epochs, values, marker='.' if len(epochs) <= 30 else None, **kwargs)


def shade_stage2(axes: Any, first: Optional[int], last: int, label: str = 'stage II') -> None:
    """Shade the epochs of stage II, `first` to `last`; None has none."""
    if first is not None:
        axes.axvspan(first - 0.5, last + 0.5, color='tab:orange', alpha=0.15, lw=0, label=label)
