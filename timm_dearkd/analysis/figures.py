"""Drawing that the tools share: matplotlib figures as PNG, or as SVG in the colours of the page around it."""
import functools
import io
import logging
import re
import warnings
from typing import Any, List, Optional, Sequence, Tuple

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
        raise ValueError(
            "Pictures need matplotlib: pip install -e '.[analysis]' in the clone, or pip install matplotlib.") from e
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
    options: Any = dict(bbox_inches='tight', pad_inches=0.08)
    if kind == 'png':
        options.update(dpi=dpi)
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
    svg = re.sub(r'<g id="[^"]*"', '<g', svg)  # several of them share a page
    return re.sub(r'^<svg ', '<svg fill="currentColor" ', svg).encode()


@functools.lru_cache(maxsize=None)
def _fonts() -> List[str]:
    """matplotlib's own font, and behind it those that are here for scripts that it lacks."""
    from matplotlib.font_manager import get_font_names

    wanted = ('Noto Sans', 'Source Han Sans', 'WenQuanYi', 'PingFang', 'Hiragino Sans', 'Microsoft YaHei')
    return ['DejaVu Sans', *(name for name in sorted(get_font_names()) if name.startswith(wanted))]


def plot_series(axes: Any, epochs: Sequence[int], values: Sequence[float], **kwargs: Any) -> None:
    """A line over the epochs; with points where there are few."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.plot(epochs, values, marker='.' if len(epochs) <= 30 else None, **kwargs)


def shade_stage2(axes: Any, first: Optional[int], last: int, label: str = 'stage II') -> None:
    """Shade the epochs of stage II, from `first` on; None has none, and neither has a figure that ends before."""
    if first is not None and first <= last:
        axes.axvspan(first - 0.5, last + 0.5, color='tab:orange', alpha=0.15, lw=0, label=label)
