"""Evaluate the models of examples/digits.sh, print their table and draw how the students learned.

The models are loaded as any user would load them, with `timm.create_model('local-dir:...')`.
"""
import argparse
import csv
from pathlib import Path
from typing import Dict, List

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.task import ClassificationEvaluator

import timm_dearkd  # noqa: F401  registers the architectures

RUNS = {'teacher': 'CNN teacher', 'vit': 'plain ViT', 'student': 'DearKD student'}


def read_summary(run: Path) -> List[Dict[str, str]]:
    with open(run / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


@torch.inference_mode()
def evaluate(run: Path, data: Path) -> Dict[str, float]:
    """Top-1 of the exported model on the validation images, and its parameters."""
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    config = resolve_model_data_config(model)
    dataset = create_dataset('', str(data), split='validation', input_img_mode='L')
    loader = create_loader(
        dataset, config['input_size'], batch_size=128, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], num_workers=0, device=torch.device('cpu'))
    evaluator = ClassificationEvaluator()
    for images, labels in loader:
        evaluator.update(model(images), labels)
    return {'top1': evaluator.compute()['top1'], 'params': sum(p.numel() for p in model.parameters())}


def count_images(folder: Path) -> int:
    return sum(1 for _ in folder.rglob('*.png'))


def print_table(out: Path) -> None:
    data = out / 'data'
    images = {'teacher': count_images(data / 'train')}
    print(f'\nTop-1 on the {count_images(data / "validation")} validation images\n')
    print('| model | parameters | training images | last epoch | best epoch, loaded from its folder |')
    print('| --- | --- | --- | --- | --- |')
    for run, label in RUNS.items():
        result = evaluate(out / run, data)
        last = [float(row['eval_top1']) for row in read_summary(out / run) if row['eval_top1']][-1]
        count = images.get(run, count_images(data / 'train_10pct'))
        print(f'| {label} | {result["params"]:,} | {count:,} | {last:.1f} % | {result["top1"]:.1f} % |')


def draw(out: Path) -> Path:
    """Loss and accuracy of both students over the epochs, stage II shaded."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (loss_axes, top1_axes) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for run, color in (('vit', 'tab:gray'), ('student', 'tab:blue')):
        rows = read_summary(out / run)
        epochs = [int(row['epoch']) for row in rows]
        key = 'train_ce_loss' if 'train_ce_loss' in rows[0] else 'train_loss'
        loss_axes.plot(epochs, [float(row[key]) for row in rows], color=color, label=f'{RUNS[run]}, labels')
        if run == 'student':
            for name, style in (('logit_loss', '--'), ('hidden_loss', ':')):
                points = [(e, float(row[f'train_{name}'])) for e, row in zip(epochs, rows) if row[f'train_{name}']]
                loss_axes.plot(*zip(*points), style, color=color, label=f'{RUNS[run]}, {name.replace("_loss", "")}')
            stage2 = [e for e, row in zip(epochs, rows) if row['train_stage'] == '2']
            for axes in (loss_axes, top1_axes) if stage2 else ():
                axes.axvspan(stage2[0] - 0.5, stage2[-1] + 0.5, color='tab:orange', alpha=0.15, label='stage II')
        points = [(e, float(row['eval_top1'])) for e, row in zip(epochs, rows) if row['eval_top1']]
        top1_axes.plot(*zip(*points), color=color, marker='.', label=RUNS[run])
    loss_axes.set(xlabel='epoch', ylabel='loss', title='Training losses')
    top1_axes.set(xlabel='epoch', ylabel='top-1, %', title='Validation accuracy', ylim=(0, 100))
    for axes in (loss_axes, top1_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path = out / 'digits.png'
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, help='folder that examples/digits.sh wrote')
    args = parser.parse_args()
    print_table(args.output)
    picture = draw(args.output)
    print(f'\nPicture:  {picture}')
    print(f'Report:   {args.output / "student" / "report.html"}')
    print(f'Student:  {args.output / "student"}  (model_best.safetensors, config.json, summary.csv, args.yaml)')
    name = f'local-dir:{args.output / "student"}'
    print(f'Load it:  import timm, timm_dearkd; timm.create_model({name!r}, pretrained=True)')


if __name__ == '__main__':
    main()
