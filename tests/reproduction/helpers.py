"""Drivers and results for the tests."""
import json

from reproduction.cells import SCALES, definition
from reproduction.driver import Driver
from reproduction.tables import TABLES

SEEDS = [0, 1, 2]


def make_driver(tmp_path, scale='smoke', jobs=2):
    return Driver(SCALES[scale], tmp_path / 'data', tmp_path / 'work', tmp_path / 'results', jobs)


def write_results(folder, scale, figures):
    """Results of cells by table, row, column: one figure for each seed."""
    folder.mkdir(exist_ok=True)
    for (table, row, column), values in figures.items():
        entry, = (e for e in TABLES[table](scale, SEEDS).entries if (e.row, e.column) == (row, column))
        for cell, value in zip(entry.cells, values):
            result = {entry.key: value, 'seconds': 60, 'definition': definition(cell)}
            (folder / f'{cell.name}.json').write_text(json.dumps(result))
