"""Drivers and results for the tests."""
import json

from reproduction.cells import SCALES, definition
from reproduction.driver import Driver
from reproduction.tables import TABLES
from timm_dearkd.analysis.__main__ import build_parser as analysis_parser
from timm_dearkd.data_free.__main__ import build_parser as data_free_parser
from timm_dearkd.engine.options import build_config_parser, build_parser, parse_args

SEEDS = [0, 1, 2]


def make_driver(tmp_path, scale='smoke', jobs=2):
    return Driver(SCALES[scale], tmp_path / 'data', tmp_path / 'work', tmp_path / 'results', jobs)


def options(driver, cell):
    """What a cell's program makes of its arguments; in the folder of the repository, where the recipes are."""
    argv = driver.command(cell)
    if cell.program == 'train':
        return vars(parse_args(build_parser(), build_config_parser(), argv[1:])[0])
    return vars({'data_free': data_free_parser, 'diversity': analysis_parser}[cell.program]().parse_args(argv[2:]))


def write_results(folder, scale, figures):
    """Results of cells by table, row, column: one figure for each seed."""
    folder.mkdir(exist_ok=True)
    for (table, row, column), values in figures.items():
        entry, = (e for e in TABLES[table](scale, SEEDS).entries if (e.row, e.column) == (row, column))
        for cell, value in zip(entry.cells, values):
            result = {entry.key: value, 'seconds': 60, 'definition': definition(cell)}
            (folder / f'{cell.name}.json').write_text(json.dumps(result))
