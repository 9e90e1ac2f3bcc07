"""DearKD vision transformers as a timm plugin: importing this package registers the architectures."""
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .attention import ConvAttention
from .models import DearKD, add_mhca
from .rel_pos import AdaptiveRelPos

if TYPE_CHECKING:
    from .api import distill

__all__ = ['AdaptiveRelPos', 'ConvAttention', 'DearKD', 'add_mhca', 'distill', '__version__']


def __getattr__(name: str) -> Any:
    if name != 'distill':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .api import distill  # imports the training code, which the models do not need
    return distill
