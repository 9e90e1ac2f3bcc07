"""Print what the students of examples/data_free_digits.sh have learned, and draw the images beside the real ones."""
import argparse
import csv
import json
from pathlib import Path

import yaml
from PIL import Image

from timm_dearkd.data_free.look import contact_sheet

NAMES = {
    'pixels': 'DeepInversion', 'generator': 'generator', 'real': 'real images',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('output', type=Path, help='folder that examples/data_free_digits.sh wrote')
    out = parser.parse_args().output

    distances = {
        Path(folder).parent.name if Path(folder).name == 'train' else Path(folder).name: result
        for folder, result in json.loads((out / 'diversity.json').read_text())['folders'].items()
    }
    print('\n| training images | images | recognised by the CNN | distance within a class | student, top-1 |')
    print('| --- | --- | --- | --- | --- |')
    for name, label in NAMES.items():
        with open(out / f'student_{name}' / 'summary.csv', newline='') as f:
            top1 = float([row['eval_top1'] for row in csv.DictReader(f) if row['eval_top1']][-1])
        called = ''
        if name == 'real':
            fraction = yaml.safe_load((out / 'student_real' / 'args.yaml').read_text())['train_fraction']
            count = round(fraction * sum(1 for _ in (out / 'data' / 'train').rglob('*.png')))
        else:
            images = json.loads((out / name / 'manifest.json').read_text())['images']
            count = sum(image['kept'] for image in images)
            called = f'{100 * sum(image["teacher_prob"] > 0.5 for image in images) / len(images):.0f} %'
        distance = distances['data' if name == 'real' else name]['mean']
        print(f'| {label} | {count} | {called} | {distance:.2f} | {top1:.1f} % |')

    rows = {}
    for name, label in NAMES.items():
        folder = out / ('data' if name == 'real' else name) / 'train'
        paths = [path for digit in range(10) for path in sorted((folder / str(digit)).glob('*.png'))[:2]]
        rows[label.split(' ')[0]] = [Image.open(path) for path in paths]
    (out / 'images.png').write_bytes(contact_sheet(rows))
    print(f'\nPicture: {out / "images.png"}')


if __name__ == '__main__':
    main()
