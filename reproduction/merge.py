"""Link the images of several sets of data_free into one: `python reproduction/merge.py OUT FOLDER ...`."""
import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('output', type=Path, metavar='OUT', help='new folder, replaced if it exists')
    parser.add_argument('folders', type=Path, nargs='+', metavar='FOLDER', help='folder that data_free wrote')
    args = parser.parse_args(argv)
    shutil.rmtree(args.output, ignore_errors=True)
    images: List[Dict[str, Any]] = []
    for number, folder in enumerate(args.folders):
        paths = sorted(folder.glob('train/*/*.png'))
        for path in paths:
            link = args.output / 'train' / path.parent.name / f'{number}-{path.name}'
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
        if not paths:
            parser.error(f'no images in {folder}. Expected train/CLASS/IMAGE.png.')
        images += json.loads((folder / 'manifest.json').read_text())['images']
    kept = sum(image['kept'] for image in images)
    (args.output / 'merged.json').write_text(json.dumps(dict(merged=kept, images=images)))


if __name__ == '__main__':
    main()
