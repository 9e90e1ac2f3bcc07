"""DearKD vision transformers as a timm plugin: importing this package registers the architectures."""
from ._version import __version__
from .attention import AdaptiveRelPos, ConvAttention
from .models import DearKD, add_mhca

__all__ = ['AdaptiveRelPos', 'ConvAttention', 'DearKD', 'add_mhca', '__version__']
