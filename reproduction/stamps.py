"""Write the stamps of Tux Paint, small drawings and photographs, as an image folder of 12 classes.

    python reproduction/stamps.py DIR [--source FOLDER]

They are in the Debian package `tuxpaint-stamps-default`. DIR/CLASS/*.png has the PNG files of each group, of any size,
in colour or grey, with transparent pixels. Groups of fewer than 10 images are skipped.
"""
import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Optional

__all__ = ['write_stamps']

DEBIAN_FOLDER = Path('/usr/share/tuxpaint/stamps')
MIN_IMAGES = 10  # per class


def write_stamps(folder: Path, source: Optional[Path] = None) -> None:
    """Write the folder described above, unless it exists.

    Raises:
        FileNotFoundError: If the stamps are not installed.
    """
    source = source or DEBIAN_FOLDER
    if folder.exists():
        return
    if not source.is_dir():
        raise FileNotFoundError(
            f'No folder {source}. Install the stamps (apt-get install tuxpaint-stamps-default), or give their folder'
            ' with --source.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as temporary:
        for group in sorted(path for path in source.iterdir() if path.is_dir()):
            files = sorted(group.rglob('*.png'))
            if len(files) >= MIN_IMAGES:
                target = Path(temporary, 'images', group.name)
                target.mkdir(parents=True)
                for file in files:
                    shutil.copy(file, target / '_'.join(file.relative_to(group).parts))
        Path(temporary, 'images').rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--source', type=Path, help=f'folder of the stamps (default: {DEBIAN_FOLDER})')
    args = parser.parse_args()
    write_stamps(args.folder, args.source)


if __name__ == '__main__':
    main()
