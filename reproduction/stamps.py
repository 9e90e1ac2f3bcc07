"""Write the stamps of Tux Paint, small drawings and photographs, as an image folder of 12 classes.

    python reproduction/stamps.py DIR [--source FOLDER]

They are in the Debian package `tuxpaint-stamps-default`. DIR/CLASS/*.png has the PNG files of each group, of any size,
in colour or grey, with transparent pixels. Groups of fewer than 10 images are skipped.
"""
import argparse
import shutil
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from timm_dearkd.commands import run_command  # noqa: E402
from timm_dearkd.files import new_folder  # noqa: E402

DEBIAN_FOLDER = Path('/usr/share/tuxpaint/stamps')
MIN_IMAGES = 10  # per class


def write_stamps(folder: Path, source: Optional[Path] = None) -> None:
    """Write the folder described above, unless it exists.

    Raises:
        FileNotFoundError: If the stamps are not installed.
        ValueError: If the source has no stamps.
    """
    source = source or DEBIAN_FOLDER
    if folder.exists():
        return
    if not source.is_dir():
        raise FileNotFoundError(
            f'No folder {source}. Install the stamps (apt-get install tuxpaint-stamps-default), or give their folder'
            ' with --source.')
    groups = {group.name: sorted(group.rglob('*.png')) for group in sorted(source.iterdir()) if group.is_dir()}
    groups = {name: files for name, files in groups.items() if len(files) >= MIN_IMAGES}
    if not groups:
        raise ValueError(f'{source} has no folder with {MIN_IMAGES} PNG files or more. Give the folder of the stamps.')
    with new_folder(folder) as temporary:
        for name, files in groups.items():
            (temporary / name).mkdir()
            for file in files:
                shutil.copy(file, temporary / name / '_'.join(file.relative_to(source / name).parts))


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--source', type=Path, help=f'folder of the stamps (default: {DEBIAN_FOLDER})')
    args = parser.parse_args(argv)
    write_stamps(args.folder, args.source)


if __name__ == '__main__':
    run_command('stamps.py', main)
