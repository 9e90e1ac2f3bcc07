"""What is kept of the cells: a JSON file each, and the files of the teacher."""
import csv
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Set, Tuple

from reproduction.cells import ROOT, CellError, Scale, definition
from reproduction.table import Entry, Table
from reproduction.tables import collect_cells, tables_of

__all__ = ['FIGURES', 'READERS', 'RESULTS', 'TEACHER_FILES', 'Figure', 'Key', 'Results', 'read_result', 'weights_hash']

RESULTS = ROOT / 'reproduction' / 'results'
# Kept with the results: another machine would train another teacher, and figures of its students would not compare
TEACHER_FILES = ('model_best.safetensors', 'config.json')
# What the three programs measure, and how it is told
FIGURES = {'top1': '{:.2f} %', 'distance': 'distance {:.3f}', 'sure': 'sure of {:.0f} % of the images'}
Key = Tuple[str, str]


def read_result(path: Path) -> Optional[Dict[str, Any]]:
    """What is in a result's file; None, with a warning, where it holds none."""
    try:
        result = json.loads(path.read_text())
        if {'definition', 'seconds'} <= set(result) and set(FIGURES) & set(result):
            return result
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        pass
    print(f'{path} is not a result of the driver. It is left out.', file=sys.stderr)
    return None


def weights_hash(folder: Path) -> str:
    """The beginning of the SHA-256 of a run's weights; '' where there are none."""
    path = folder / 'model_best.safetensors'
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ''


def student_figures(folder: Path) -> Dict[str, Any]:
    """Top-1 after the last epoch, which is the figure, and on the way; and how often the teacher found the label."""
    with open(folder / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    if not rows or None in rows[-1] or not rows[-1].get('eval_top1'):
        raise CellError(f'{folder}/summary.csv does not end with an evaluation. Remove the folder.')
    evaluated = {int(row['epoch']) + 1: float(row['eval_top1']) for row in rows if row['eval_top1']}
    agreement = [row['train_teacher_agreement'] for row in rows if row.get('train_teacher_agreement')]
    return dict(
        top1=evaluated[max(evaluated)], top1_by_epoch=evaluated,
        **(dict(teacher_agreement=float(agreement[-1])) if agreement else {}))


def image_figures(folder: Path) -> Dict[str, Any]:
    """How sure of the images their CNN and the verifier are."""
    images = json.loads((folder / 'manifest.json').read_text())['images']

    def share(key: str) -> float:
        return 100 * sum(image[key] > 0.5 for image in images) / len(images)

    return dict(sure=share('teacher_prob'), recognised=share('verifier_prob'), images=len(images),
                kept=sum(image['kept'] for image in images))


def distance_figures(folder: Path) -> Dict[str, Any]:
    """How far apart the images of a class are."""
    measured, = json.loads((folder / 'diversity.json').read_text())['folders'].values()
    return dict(distance=measured['mean'])


# What is read of the folder of a run, by its program
READERS: Dict[str, Callable[[Path], Dict[str, Any]]] = {
    'train': student_figures, 'data_free': image_figures, 'diversity': distance_figures}


class Figure(NamedTuple):
    """The figures of an entry by seed, and the digits that they are printed with."""
    by_seed: Dict[int, float]
    digits: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def error(self) -> Optional[float]:
        """Standard error of the mean; None for one seed."""
        values = self.by_seed.values()
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    def __str__(self) -> str:
        if self.error is None:
            return f'{self.mean:.{self.digits}f} (1 seed)'
        seeds = f' ({len(self.by_seed)} seeds)' if len(self.by_seed) != 3 else ''
        return f'{self.mean:.{self.digits}f} ± {self.error:.{self.digits}f}{seeds}'


class Results:
    """Figures by cell.

    Args:
        scale: Of the experiments.
        folder: Of the JSON files.
        seeds: That may be there.
    """

    def __init__(self, scale: Scale, folder: Path, seeds: Sequence[int]) -> None:
        self.tables = {name: make(scale, seeds) for name, make in tables_of(scale).items()}
        cells = {cell.name: cell for cell in collect_cells(scale, list(self.tables), seeds)}
        results = {name: read_result(folder / f'{name}.json') for name in cells}
        self.cells = {name: result for name, result in results.items()
                      if result is not None and result['definition'] == definition(cells[name])}
        self.stale = [name for name, result in results.items() if result is not None and name not in self.cells]

    def figure(self, entry: Entry) -> Optional[Figure]:
        """Of the cells that are there; None without any."""
        by_seed = {
            cell.seed: self.cells[cell.name][entry.key] for cell in entry.cells
            if entry.key in self.cells.get(cell.name, {})}
        return Figure(by_seed, entry.digits) if by_seed else None

    def teachers(self, name: str) -> Dict[str, Set[str]]:
        """Those of the students of a table, by seed, or by column in table 2, whose columns share no student."""
        teachers: Dict[str, Set[str]] = {}
        for entry in self.tables[name].entries:
            for cell in entry.cells:
                if 'teacher' in self.cells.get(cell.name, {}):
                    place = entry.column if name == 'table2' else f'seed {cell.seed}'
                    teachers.setdefault(place, set()).add(self.cells[cell.name]['teacher'])
        return teachers

    def figures(self, table: Table) -> Dict[Key, Figure]:
        """Figures by row and column."""
        found = {(entry.row, entry.column): self.figure(entry) for entry in table.entries}
        return {key: figure for key, figure in found.items() if figure is not None}
