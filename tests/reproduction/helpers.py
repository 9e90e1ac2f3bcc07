"""Drivers and results for the tests."""
import json
import math
from unittest import mock

import numpy as np

from reproduction.cells import SCALES, definition
from reproduction.driver import Driver
from reproduction.tables import TABLES
from timm_dearkd.analysis.__main__ import build_parser as analysis_parser
from timm_dearkd.api import build_parser as distill_parser
from timm_dearkd.data_free.options import build_parser as data_free_parser
from timm_dearkd.data_free.options import fill_defaults
from timm_dearkd.engine.options import parse_args

SEEDS = [0, 1, 2]


def make_driver(tmp_path, scale='smoke', jobs=2):
    return Driver(SCALES[scale], tmp_path / 'data', tmp_path / 'work', tmp_path / 'results', jobs)


def options(driver, cell):
    """What a cell's program makes of its arguments; in the folder of the repository, where the recipes are."""
    argv = driver.command(cell)
    if cell.program in ('train', 'distill'):
        argv = argv[1:] if cell.program == 'train' else distill_parser().parse_known_args(argv[3:])[1]
        with mock.patch('yaml.safe_dump'):  # three quarters of the time, for a text that nobody reads here
            return vars(parse_args(argv)[0])
    if cell.program == 'merge':
        return dict(output=argv[1], folders=argv[2:])
    args = {'data_free': data_free_parser, 'diversity': analysis_parser}[cell.program]().parse_args(argv[2:])
    if cell.program == 'data_free':
        fill_defaults(args)  # it refuses options without effect
    return vars(args)


def write_results(folder, scale, figures):
    """Results of cells by table, row, column: one figure for each seed."""
    folder.mkdir(exist_ok=True)
    for (table, row, column), values in figures.items():
        entry, = (e for e in TABLES[table](scale, SEEDS).entries if (e.row, e.column) == (row, column))
        for cell, value in zip(entry.cells, values):
            result = {entry.key: value, 'seconds': 60, 'definition': definition(cell)}
            (folder / f'{cell.name}.json').write_text(json.dumps(result))


def t_quantile(degrees: float) -> float:
    """The two-sided 95 % quantile of Student's t, from its density by quadrature and bisection."""
    norm = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    low, high = 0., 100.
    for _ in range(50):
        middle = (low + high) / 2
        x = (np.arange(100_000) + 0.5) * middle / 100_000
        inside = 2 * norm * float(((1 + x * x / degrees) ** (-(degrees + 1) / 2)).sum()) * middle / 100_000
        low, high = (middle, high) if inside < 0.95 else (low, middle)
    return low
