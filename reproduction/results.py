"""Read and keep the results of the cells: one JSON file each, and the files of the teacher."""
import csv
import functools
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set

from reproduction.cells import ROOT, Cell, CellError, Scale, definition
from reproduction.table import Entry, Key, Table
from reproduction.tables import collect_cells, tables_of

RESULTS = ROOT / 'reproduction' / 'results'
# Kept with the results, because another machine would train a different teacher
TEACHER_FILES = ('model_best.safetensors', 'config.json')
# Main figures of the programs, and their log lines
FIGURES = {
    'top1': '{:.2f} %', 'distance': 'distance {:.3f}', 'sure': '{:.0f} % of the images recognised',
    'merged': '{:.0f} images'}


def read_result(path: Path) -> Optional[Dict[str, Any]]:
    """Return the content of a result file; None if there is none, with a warning if it is invalid."""
    try:
        result = json.loads(path.read_text())
        if {'definition', 'seconds'} <= set(result) and set(FIGURES) & set(result):
            return result
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        pass
    print(f'Skipped {path}: it is not a result of the driver.', file=sys.stderr)
    return None


def own_models(cell: Cell) -> List[Cell]:
    """Return the trained models that a cell needs, besides the teacher of all students."""
    return [need for need in cell.needs if need.program == 'train' and need.name != 'teacher']


def is_current(cell: Cell, result: Optional[Dict[str, Any]], read: Callable[[str], Optional[Dict[str, Any]]]) -> bool:
    """Return whether a result has the definition of its cell, and came from the models whose figures are kept.

    Args:
        cell: The cell.
        result: Its result.
        read: Returns the result of another cell by name.
    """
    if result is None or result['definition'] != definition(cell):
        return False
    kept = {need.name: (read(need.name) or {}).get('weights') for need in own_models(cell)}
    return all(weights in (None, result.get('models', {}).get(name)) for name, weights in kept.items())


@functools.lru_cache(maxsize=None)
def _file_hash(path: Path, modified: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def weights_hash(folder: Path) -> str:
    """Return the first digits of the SHA-256 of a run's weights; '' if there are none."""
    path = folder / 'model_best.safetensors'
    return _file_hash(path, path.stat().st_mtime_ns) if path.exists() else ''


def teacher_figures(folder: Path) -> Dict[str, Any]:
    """Return the teacher's top-1 as it taught a run, and how many of its labels were read and computed, if recorded."""
    path = folder / 'run.json'
    results = json.loads(path.read_text()).get('results', {}) if path.exists() else {}
    return {name: results[name] for name in ('teacher_top1', 'labels_read', 'labels_computed') if name in results}


def student_figures(folder: Path) -> Dict[str, Any]:
    """Return top-1 after the last epoch and at each evaluation, the teacher agreement, and `teacher_figures`."""
    with open(folder / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    if not rows or None in rows[-1] or not rows[-1].get('eval_top1'):
        raise CellError(f'{folder}/summary.csv does not end with an evaluation. Remove the folder.')
    evaluated = {int(row['epoch']) + 1: float(row['eval_top1']) for row in rows if row['eval_top1']}
    agreement = [row['train_teacher_agreement'] for row in rows if row.get('train_teacher_agreement')]
    return dict(
        top1=evaluated[max(evaluated)], top1_by_epoch=evaluated, **teacher_figures(folder),
        **(dict(teacher_agreement=float(agreement[-1])) if agreement else {}))


def distill_figures(folder: Path) -> Dict[str, Any]:
    """Return the figures of a student of `timm-dearkd distill`."""
    return student_figures(folder / 'student')


def shares(images: Sequence[Dict[str, Any]]) -> Dict[str, float]:
    """Return the share of the images in a manifest that their CNN and the verifier recognise."""
    def share(key: str) -> float:
        return 100 * sum(image[key] > 0.5 for image in images) / len(images)

    return dict(sure=share('teacher_prob'), recognised=share('verifier_prob'))


def image_figures(folder: Path) -> Dict[str, Any]:
    """Return the figures of a set of images: `shares`, and how many there are."""
    images = json.loads((folder / 'manifest.json').read_text())['images']
    return dict(**shares(images), images=len(images), kept=sum(image['kept'] for image in images))


def merged_figures(folder: Path) -> Dict[str, Any]:
    """Return the figures of a merged folder: the number of its images, and `shares`."""
    merged = json.loads((folder / 'merged.json').read_text())
    return dict(merged=merged['merged'], **shares(merged['images']))


def distance_figures(folder: Path) -> Dict[str, Any]:
    """Return the mean distance between images of a class."""
    measured, = json.loads((folder / 'diversity.json').read_text())['folders'].values()
    return dict(distance=measured['mean'])


# Reads the figures in the folder of a run, by program
READERS: Dict[str, Callable[[Path], Dict[str, Any]]] = {
    'train': student_figures, 'distill': distill_figures, 'data_free': image_figures, 'merge': merged_figures,
    'diversity': distance_figures}


class Figure(NamedTuple):
    """Figures of an entry by seed, and the decimals to print."""
    by_seed: Dict[int, float]
    digits: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())


class Results:
    """Results by cell.

    Args:
        scale: Scale of the experiments.
        folder: Folder of the JSON files.
        seeds: Seeds to look for.
    """

    def __init__(self, scale: Scale, folder: Path, seeds: Sequence[int]) -> None:
        self.tables = {name: make(scale, seeds) for name, make in tables_of(scale).items()}
        cells = {cell.name: cell for cell in collect_cells(scale, list(self.tables), seeds)}
        results = {name: read_result(folder / f'{name}.json') for name in cells}
        self.cells = {name: result for name, result in results.items()
                      if result is not None and is_current(cells[name], result, results.get)}
        for result in self.cells.values():
            if 'images' in result:
                result['seconds_per_image'] = result['seconds'] * result.get('threads', 1) / result['images']
        self.stale = [name for name, result in results.items() if result is not None and name not in self.cells]

    def figure(self, entry: Entry) -> Optional[Figure]:
        """Return the figure over the cells that have a result; None if none has."""
        by_seed = {
            cell.seed: self.cells[cell.name][entry.key] for cell in entry.cells
            if entry.key in self.cells.get(cell.name, {})}
        return Figure(by_seed, entry.digits) if by_seed else None

    def teachers(self, name: str) -> Dict[str, Set[str]]:
        """Return the teachers of a table's students by seed; by column in table 2, whose columns share no student."""
        teachers: Dict[str, Set[str]] = {}
        for entry in self.tables[name].entries:
            for cell in entry.cells:
                if 'teacher' in self.cells.get(cell.name, {}):
                    place = entry.column if name == 'table2' else f'seed {cell.seed}'
                    teachers.setdefault(place, set()).add(self.cells[cell.name]['teacher'])
        return teachers

    def figures(self, table: Table) -> Dict[Key, Figure]:
        """Return the figures of a table by row and column."""
        found = {(entry.row, entry.column): self.figure(entry) for entry in table.entries}
        return {key: figure for key, figure in found.items() if figure is not None}
