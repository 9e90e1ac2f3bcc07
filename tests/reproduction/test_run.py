"""The command of the reproduction."""
import json
import re
import shlex
import subprocess

import pytest
from conftest import run_python

from reproduction.cells import ROOT, SCALES
from reproduction.driver import Driver
from reproduction.report import write_report
from reproduction.results import RESULTS
from reproduction.tables import collect_cells
from timm_dearkd.engine.options import parse_args


@pytest.mark.slow
def test_a_cell_as_the_user_runs_it(tmp_path):
    """A fresh result of one run, its figure as in summary.csv, found by the report; the second time nothing is done."""
    args = ['figure4', '--scale', 'smoke', '--seeds', '0', '--data', tmp_path / 'data', '--work', tmp_path / 'work',
            '--results', tmp_path / 'results', '--jobs', '1']
    code = ('import sys; from reproduction import cells, run; cells.FIGURE4.clear(); cells.FIGURE4["vit"] = "ViT";'
            'run.main()')
    result = run_python('-c', code, *args)
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / 'results' / 'vit-0.05-seed0.json').read_text())
    with (tmp_path / 'work' / 'vit-0.05-seed0' / 'summary.csv').open() as f:
        header, *rows = [line.strip().split(',') for line in f]
    assert kept['top1'] == float(rows[-1][header.index('eval_top1')])
    assert (tmp_path / 'results' / 'vit-0.05-seed0.distances.csv').exists()
    again = run_python('-c', code, *args)
    assert again.stdout == '1 cells, 1 finished\n'
    write_report(SCALES['smoke'], tmp_path / 'results', [0], tmp_path / 'RESULTS.md')
    assert f'| ViT | {kept["top1"]:.1f} [40.5]' in (tmp_path / 'RESULTS.md').read_text()


@pytest.mark.slow
def test_command_line(tmp_path):
    result = run_python('reproduction/run.py', 'table2', 'table5', '--list', '--scale', 'imagenet', '--seeds', '0',
                        '--launcher', 'torchrun --nnodes 2 --nproc-per-node=4')
    assert result.returncode == 0, result.stderr
    launcher, batches = ['torchrun', '--nnodes', '2', '--nproc-per-node=4'], {2048: 0, 1024: 0}
    for line in result.stdout.splitlines():
        words = shlex.split(line)
        assert words[:4] == launcher
        if words[4] == 'train.py':  # the batch is the paper's
            found, _ = parse_args(words[5:])
            batches[found.batch_size * found.grad_accum_steps * 8] += 1
    assert batches == {2048: 18, 1024: 4}
    assert run_python('reproduction/run.py', 'figure4', '--list').stdout.count('--track-attention-distance') == 28
    listed = run_python('reproduction/run.py', 'table7', '--list', '--only', 'stage50_ce*', 'mhca-*1').stdout
    assert [line.split('--experiment ')[1].split()[0] for line in listed.splitlines()] == [
        'stage50_ce-0.025-seed0', 'stage50_ce-0.025-seed1', 'mhca-0.025-seed1']
    for args, message in (
            (['table9'], 'table9'),
            (['table2', '--scale', 'imagenet', '--data', tmp_path], 'no folder validation'),
            (['table2', '--only', 'stage50_*'], '--only stage50_* matches none'),
            (['table2', '--launcher', 'torchrun --nproc-per-node=2'], '2 processes, but vit-0.01-seed0 has 1 accumu'),
            (['table2', '--launcher', 'torchrun "'], 'No closing quotation'),
            (['choices', '--scale', 'imagenet'], 'has no choices. It has table1, table2, table5,')):
        result = run_python('reproduction/run.py', *args)
        assert result.returncode == 2 and message in result.stderr.strip().splitlines()[-1]


def test_the_listed_commands_are_those_of_a_shell():
    listed = run_python('reproduction/run.py', 'table2', '--list').stdout.splitlines()[0]
    shell = subprocess.run(
        ['sh', '-c', f'set -- {listed}; for a; do echo "$a"; done'], capture_output=True, text=True).stdout.splitlines()
    driver = Driver(SCALES['small'], ROOT / 'output/reproduction/data', ROOT / 'output/reproduction/small',
                        RESULTS / 'small', 1)
    cell = collect_cells(driver.scale, ['table2'], [0])[0]
    assert shell == ['python', *driver.command(cell)]


def test_scripts_import_the_packages_of_their_own_clone():
    """Not those that are installed: the clone comes first on the path, and then the imports."""
    scripts = [text for path in (ROOT / 'reproduction').glob('*.py') if '__main__' in (text := path.read_text())]
    for text in scripts:
        own = re.search(r'^(?:from|import) (?:distill_hooks|reproduction|timm_dearkd)', text, re.MULTILINE)
        assert own is None or 0 < text.find('sys.path[:0] =') < own.start(), text[:80]
    assert len(scripts) == 6
