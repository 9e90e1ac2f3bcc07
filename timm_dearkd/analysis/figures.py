"""Helpers for matplotlib figures, and their conversion to PNG or SVG."""
import functools
import io
import logging
import re
import warnings
from typing import Any, List, Optional, Sequence, Tuple

logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)


def new_figure(rows: int = 1, columns: int = 1, size: Tuple[float, float] = (7, 4), **kwargs: Any) -> Tuple[Any, Any]:
    """Return a new figure and its axes (rows, columns).

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError(
            "Plots need matplotlib: pip install -e '.[analysis]' in the clone, or pip install matplotlib.") from e
    figure = Figure(figsize=size, layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def escape_label(text: Any) -> str:
    """Escape text for matplotlib: `$` starts math mode, a leading `_` hides a label."""
    text = str(text).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def render(figure: Any, kind: str = 'png') -> bytes:
    """Return a figure as the bytes of a PNG file or of an SVG element.

    Args:
        figure: The figure.
        kind: 'png', or 'svg' for an element of an HTML page, which takes the text colour of the page.
    """
    import matplotlib

    buffer = io.BytesIO()
    options: Any = dict(bbox_inches='tight', pad_inches=0.08)
    if kind == 'png':
        options.update(dpi=110)
    else:
        options.update(transparent=True, metadata={'Date': None})
    settings: Any = {'svg.fonttype': 'none', 'svg.hashsalt': 'timm-dearkd', 'font.sans-serif': _fonts()}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph .* missing')
        figure.savefig(buffer, format=kind, **options)
    if kind == 'png':
        return buffer.getvalue()
    svg = buffer.getvalue().decode()
    svg = svg[svg.index('<svg'):].replace('#000000', 'currentColor')
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', '<g', svg)  # ids of several figures would clash on a page
    return re.sub(r'^<svg ', '<svg fill="currentColor" ', svg).encode()


@functools.lru_cache(maxsize=None)
def _fonts() -> List[str]:
    """Return matplotlib's font, and the installed fonts for scripts that it lacks."""
    from matplotlib.font_manager import get_font_names

    wanted = ('Noto Sans', 'Source Han Sans', 'WenQuanYi', 'PingFang', 'Hiragino Sans', 'Microsoft YaHei')
    return ['DejaVu Sans', *(name for name in sorted(get_font_names()) if name.startswith(wanted))]


def plot_series(axes: Any, epochs: Sequence[int], values: Sequence[float], **kwargs: Any) -> None:
    """Draw values by epoch as a line, with points for up to 30 epochs."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.plot(epochs, values, marker='.' if len(epochs) <= 30 else None, **kwargs)


def shade_stage2(axes: Any, start: Optional[int], first: int, last: int) -> None:
    """Shade the epochs of stage II.

    Args:
        axes: Axes with epochs on x.
        start: First epoch of stage II; None draws nothing.
        first: First epoch of the plot.
        last: Last epoch of the plot.
    """
    if start is not None and start <= last:
        axes.axvspan(max(start, first) - 0.5, last + 0.5, color='tab:orange', alpha=0.15, lw=0, label='stage II')
