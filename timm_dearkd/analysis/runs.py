"""Folder of a run of train.py, finished or not: options, epochs and results."""
import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from distill_hooks import TwoStageSchedule, load_model
from timm_dearkd.engine.checkpoints import EXPORT_NAME
from timm_dearkd.engine.run_folder import read_run_info


@dataclass
class Run:
    """A run of train.py.

    Args:
        folder: Output folder.
        args: Options of train.py.
        rows: Rows of summary.csv, one per epoch: number by column, without empty cells.
        info: Contents of `run.json`: commands, data and environment. Empty for a run of timm's own script.
    """
    folder: Path
    args: Dict[str, Any]
    rows: List[Dict[str, float]] = field(default_factory=list)
    info: Dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        epochs = f'{self.num_epochs} epochs' if self.state == 'finished' else self.state
        top1 = self.summary().get('student')
        return f'Run({str(self.folder)!r}, {epochs}' + (')' if top1 is None else f', top-1 {top1:.1f} %)')

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def metric(self) -> str:
        """Column of summary.csv that selects the best epoch."""
        name = str(self.args.get('eval_metric') or 'top1')
        return next((column for column in (f'eval_{name}', f'train_{name}') if self.series(column)[0]), 'train_loss')

    @property
    def num_epochs(self) -> int:
        """Planned number of epochs."""
        planned = self.info.get('epochs') or int(self.args.get('epochs') or 0)
        return int(self.args.get('stop_epoch') or planned)

    @property
    def state(self) -> str:
        """'finished', or the number of finished epochs as '3 of 10 epochs'."""
        done = self.num_done
        return 'finished' if done >= self.num_epochs else f'{done} of {self.num_epochs} epochs'

    @property
    def num_done(self) -> int:
        """Number of finished epochs, with those of another folder that the run was resumed from."""
        return int(self.rows[-1]['epoch']) + 1 if self.rows else 0

    @property
    def stage2_start(self) -> Optional[int]:
        """First epoch of stage II, counted from 0; None if there is none yet."""
        start = next((int(row['epoch']) for row in self.rows if row.get('train_stage') == 2), None)
        epochs = self.args.get('epochs')
        if start and epochs and start == self.rows[0]['epoch']:  # resumed in stage II from another folder
            return TwoStageSchedule(int(epochs), self.args.get('dearkd_stage1_epochs')).stage1_epochs
        return start

    @property
    def columns(self) -> List[str]:
        """Columns of summary.csv that have a number in at least one epoch."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def series(self, column: str) -> Tuple[List[int], List[float]]:
        """Return epochs, counted from 0, and values of a column; empty if missing."""
        points = [(int(row['epoch']), row[column]) for row in self.rows if column in row]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def best(self) -> Optional[Tuple[int, float]]:
        """Return the epoch and the value of the best metric; None without an epoch.

        Training losses are compared only among epochs with the loss weights of the last one.
        """
        metric = self.metric
        rows = [row for row in self.rows if metric in row]
        if metric.startswith('train_'):
            rows = [row for row in rows if all(
                row.get(key) == rows[-1].get(key) for key in ('train_stage', 'train_alpha'))]
        points = [(int(row['epoch']), row[metric]) for row in rows]
        choose = min if 'loss' in metric else max
        return choose(points, key=lambda point: point[1]) if points else None

    def summary(self) -> Dict[str, float]:
        """Return the top-1 accuracy in percent on the validation images: 'teacher', if any, and 'student'."""
        epochs = dict(zip(*self.series('eval_top1')))
        best = self.best()
        top1 = dict(teacher=self.info.get('results', {}).get('teacher_top1'), student=best and epochs.get(best[0]))
        return {name: value for name, value in top1.items() if value is not None}

    def load_model(self) -> Any:
        """Load the best student, in eval mode."""
        return load_model(str(self.folder)).eval()

    def last(self) -> Optional[Tuple[int, float]]:
        """Return the last epoch that has the metric, and its value; None without one."""
        points = list(zip(*self.series(self.metric)))
        return points[-1] if points else None


def readable(column: str) -> str:
    """Return a column of summary.csv in words, as a title."""
    part, _, name = column.partition('_')
    names = {'eval': 'validation', 'train': 'training'}
    name = {'top1': 'top-1, %', 'top5': 'top-5, %'}.get(name, name.replace('_', ' '))
    return f'{names[part]} {name}' if part in names else column


def _number(text: Optional[str]) -> Optional[float]:
    try:
        value = float(text or '')
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def open_run(folder: str) -> Run:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If train.py did not write the folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f'No folder {folder!r}. Give the output folder of a run, such as output/train/NAME.')
    try:
        args = yaml.safe_load((path / 'args.yaml').read_text())
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(
            f'{folder!r} is not the folder of a run: its args.yaml cannot be read ({type(e).__name__}). Give an output'
            ' folder of train.py.') from e
    if not isinstance(args, dict):
        raise ValueError(f'{folder!r} is not the folder of a run: its args.yaml has no options.')
    rows = []
    if (path / 'summary.csv').exists():
        with open(path / 'summary.csv', newline='') as f:
            for row in csv.DictReader(f):
                if None in row or None in row.values():  # train.py is writing the row
                    continue
                values = {key: _number(text) for key, text in row.items()}
                if values.get('epoch') is not None:
                    rows.append({key: value for key, value in values.items() if value is not None})
    return Run(path, args, rows, read_run_info(path))


def why_no_model(folder: Path) -> str:
    """Return why a run has no config.json, which is needed to load its model."""
    if (folder / EXPORT_NAME).exists():
        return f'timm cannot create it by name, so there is no config.json, only the weights in {EXPORT_NAME}'
    if any(folder.glob('*.pth.tar')) and not (folder / 'run.json').exists():
        return "its checkpoints are from timm's own script, which writes no config.json"
    return 'the run has not finished an epoch'


def distinct_names(runs: Sequence[Run]) -> List[str]:
    """Return a name for each run, with parent folders if runs have the same name."""
    names = [run.name for run in runs]
    for depth in range(2, max(len(run.folder.resolve().parts) for run in runs) + 1):
        if len(set(names)) == len(names):
            break
        names = ['/'.join(run.folder.resolve().parts[-depth:]) if names.count(name) > 1 else name
                 for run, name in zip(runs, names)]
    return names
