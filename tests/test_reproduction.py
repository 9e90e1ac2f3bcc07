"""The driver of the reproduction and its report; what the cells train is train.py's to test."""
import json
import math
import statistics

import pytest
from conftest import run_python

from reproduction import report, run
from reproduction.cells import SCALES, TABLES, teacher_cell
from timm_dearkd.data_free.__main__ import build_parser as data_free_parser
from timm_dearkd.engine.options import build_config_parser, build_parser, parse_args

SEEDS = [0, 1, 2]


def all_cells(scale):
    cells = [cell for table in TABLES.values() for entry in table(scale, SEEDS).entries for cell in entry.cells]
    teacher = teacher_cell(scale)
    return cells + ([teacher] if teacher else [])


@pytest.mark.parametrize('name', list(SCALES))
def test_every_cell_is_a_command_that_can_be_parsed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(run.ROOT)
    scale = SCALES[name]
    driver = run.Driver(scale, tmp_path / 'data', tmp_path / 'work', tmp_path / 'results', jobs=1)
    commands = {}
    for cell in all_cells(scale):
        command = driver.command(cell)
        assert not any('{' in word for word in command), command
        if cell.program == 'train':
            parse_args(build_parser(), build_config_parser(), command[1:])
        else:
            data_free_parser().parse_args(command[2:])
        # a name means one command, in whichever table it stands, and a command has one name
        assert commands.setdefault(cell.name, command) == command
    bare = [tuple(w for w in command if w != name) for name, command in commands.items()]
    assert len(set(bare)) == len(bare)


def test_methods_differ_in_what_the_tables_say_and_share_the_rest():
    scale = SCALES['small']
    rows = {entry.row: entry.cells[0].argv for entry in TABLES['table2'](scale, SEEDS).entries if entry.column == '5 %'}
    shared = set.intersection(*(set(argv) for argv in rows.values()))
    assert {scale.recipe, scale.student, '0.05', str(scale.epochs)} <= shared
    assert set(rows['ViT']) - shared == {'--model-kwargs', 'num_mhca_blocks=0'}
    assert set(rows['DearKD']) - shared == {'--kd-model-name', '{teacher}'}
    assert not any(cell.data.endswith('tuning') for name in ('table1', 'table2', 'table5', 'table7')
                   for entry in TABLES[name](scale, SEEDS).entries for cell in entry.cells)
    assert all(cell.data.endswith('tuning') for name in ('choices', 'recipes')
               for entry in TABLES[name](scale, SEEDS).entries for cell in entry.cells)


@pytest.fixture()
def driver(tmp_path, monkeypatch):
    """A driver whose commands fail or write the summary of a run, by name, and note that they ran."""
    driver = run.Driver(SCALES['smoke'], tmp_path / 'data', tmp_path / 'work', tmp_path / 'results', jobs=2)
    driver.ran, driver.broken = [], set()

    def execute(name, command):
        driver.ran.append(name)
        if name in driver.broken:
            return 'status 2: no data'
        folder = tmp_path / 'work' / name
        folder.mkdir(parents=True)
        (folder / 'summary.csv').write_text('epoch,eval_top1\n0,\n1,50.5\n2,49.5\n')
        return None

    monkeypatch.setattr(driver, 'execute', execute)
    return driver


def test_what_is_there_is_skipped_and_what_needs_a_failure_waits(driver, capsys):
    cells = run.collect_cells(driver.scale, ['table1', 'table2'], [0])
    names = [cell.name for cell in cells]
    assert names.count('teacher') == 1 and len(set(names)) == len(names)
    driver.broken = {'teacher'}
    assert not driver.run(cells)
    untaught = {cell.name for cell in cells if not cell.needs} - {'teacher'}
    assert set(driver.ran) == untaught | {'teacher'} and 'status 2: no data' in capsys.readouterr().out
    driver.ran, driver.broken = [], set()
    assert driver.run(cells)
    assert sorted(driver.ran) == sorted(set(names) - untaught) and driver.ran[0] == 'teacher'
    result = json.loads((driver.results / 'dearkd-0.05-seed0.json').read_text())
    assert result['top1'] == 49.5 and result['top1_by_epoch'] == {'2': 50.5, '3': 49.5} and len(result['commit']) >= 40
    assert '--kd-model-name' in result['command'] and result['seed'] == 0
    driver.ran = []
    assert driver.run(cells) and not driver.ran


def test_seconds_of_a_cell_add_up_over_its_goes(tmp_path):
    driver = run.Driver(SCALES['smoke'], tmp_path, tmp_path, tmp_path / 'results', jobs=1)
    assert driver.seconds('cell') == 0
    assert driver.execute('cell', ['-c', 'import time, sys; time.sleep(0.3); sys.exit(2)']).startswith('status 2')
    first = driver.seconds('cell')
    assert first >= 0.3
    assert driver.execute('cell', ['-c', 'import time; time.sleep(0.2)']) is None
    assert driver.seconds('cell') >= first + 0.2


def test_figure4_is_told_in_numbers(tmp_path):
    lines = ['epoch,layer,head,patches,pixels']
    for epoch in range(40):
        for layer in (1, 2):
            for head in range(2):
                patches = layer + 0.1 * epoch + 0.01 * head
                lines.append(f'{epoch},{layer},{head},{patches},{4 * patches}')
    results = tmp_path / 'results'
    results.mkdir()
    (results / 'dearkd-0.025-seed0.distances.csv').write_text('\n'.join(lines) + '\n')
    report.write_report(SCALES['small'], results, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    expected = [statistics.mean(layer + 0.1 * epoch + 0.005 for layer in (1, 2)) for epoch in (0, 32, 39)]
    assert 'after the first epoch, {:.2f} after stage I, {:.2f} at the end'.format(*expected[1:]) in text
    assert f'in patches: {expected[0]:.2f}' in text
    assert (tmp_path / 'reproduction' / 'plots' / 'figure4-dearkd.png').exists()


def test_the_report_is_made_of_the_files_alone(tmp_path):
    scale = SCALES['small']
    values = {'vit': [60., 62., 61.], 'hard': [61., 60., 63.5], 'dearkd': [70., 71., 72.]}
    for name, figures in values.items():
        for fraction, shift in ((0.01, 0.), (0.025, 5.)):
            for seed, figure in enumerate(figures):
                path = tmp_path / 'results' / f'{name}-{fraction:g}-seed{seed}.json'
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(dict(top1=figure + shift, seconds=60)))
    report.write_report(scale, tmp_path / 'results', SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    mean, error = statistics.mean(values['hard']), statistics.stdev(values['hard']) / math.sqrt(3)
    assert f'| ViT, hard-label distillation | {mean:.1f} ± {error:.1f} [50.3] | {mean + 5:.1f}' in text
    assert '- 1 %: DearKD above hard labels: holds' in text
    assert '- 1 %: hard labels above the plain ViT: leans that way, within the spread of the seeds' in text
    assert 'DearKD on 1 % of the images above the plain ViT on 2.5 %: holds (+5.00' in text
    assert '## Ablation (table 1)' in text and 'set aside' not in text
    assert (tmp_path / 'reproduction' / 'plots' / 'table2.png').stat().st_size > 3000


def test_command_line():
    result = run_python('reproduction/run.py', 'table2', '--list', '--scale', 'imagenet', '--seeds', '0')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 12 and all('recipes/dearkd_300e.yaml' in line for line in lines)
    result = run_python('reproduction/run.py', 'figure4', '--list')
    assert result.stdout.count('--track-attention-distance') == 3
    result = run_python('reproduction/run.py', 'table9')
    assert result.returncode == 2 and 'table9' in result.stderr.strip().splitlines()[-1]
