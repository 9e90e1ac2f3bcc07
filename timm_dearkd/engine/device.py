"""Where a run computes, and in which precision."""
import logging
from typing import Optional

import torch
from timm.utils import NativeScaler

__all__ = ['Precision', 'select_device']

_logger = logging.getLogger(__name__)


def select_device(name: Optional[str]) -> torch.device:
    """The device asked for, else the accelerator there is, else the CPU, with the backend settings that suit it.

    Raises:
        ValueError: An accelerator that is not here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(name) if name else accelerator or torch.device('cpu')
    except RuntimeError:
        raise ValueError(f'--device is {name!r}, expected cpu, cuda, cuda:1 or the like.') from None
    count = torch.accelerator.device_count() if accelerator else 0
    if device.type != 'cpu' and accelerator and (device.index or 0) >= count:
        raise ValueError(f'--device {name} is not available here: there are {count} of its kind, counted from 0.')
    if device.type not in ('cpu', accelerator.type if accelerator else 'cpu'):
        raise ValueError(
            f'--device {name} is not available here'
            f' ({accelerator.type if accelerator else "there is no accelerator"}).'
            f' Use --device {accelerator.type if accelerator else "cpu"}, or leave it out.')
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif device.type == 'cpu':
        # far patches get denormal attention, which CPUs are many times slower at than at zeros
        torch.set_flush_denormal(True)
    _logger.info(f'Training on {device}.')
    return device


class Precision:
    """Autocast and loss scaling of a run.

    Args:
        device: Where it runs.
        amp_dtype: Autocast type; None trains in the model's own.
    """

    def __init__(self, device: torch.device, amp_dtype: Optional[torch.dtype] = None) -> None:
        self.device = device
        self.amp_dtype = amp_dtype
        self.scaler = NativeScaler(device.type) if amp_dtype == torch.float16 and device.type != 'cpu' else None

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)
