"""Link the images of several folders into one: `python reproduction/merge.py OUT FOLDER ...`."""
import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Optional, Sequence


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('output', type=Path, metavar='OUT', help='new folder, replaced if it exists')
    parser.add_argument('folders', type=Path, nargs='+', metavar='FOLDER', help='folder with train/CLASS/IMAGE.png')
    args = parser.parse_args(argv)
    shutil.rmtree(args.output, ignore_errors=True)
    count = 0
    for number, folder in enumerate(args.folders):
        for path in sorted(folder.glob('train/*/*.png')):
            link = args.output / 'train' / path.parent.name / f'{number}-{path.name}'
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
            count += 1
    if not count:
        parser.error(f'no images in {", ".join(map(str, args.folders))}. Expected train/CLASS/IMAGE.png.')
    (args.output / 'merged.json').write_text(json.dumps(dict(merged=count)))


if __name__ == '__main__':
    main()
