"""The driver of the reproduction and its report; what the cells train is train.py's to test."""
import fcntl
import gzip
import hashlib
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from reproduction import report, run
from reproduction.cells import SCALES, Cell, teacher_cell
from reproduction.fashion_mnist import write_fashion_mnist
from reproduction.table import Claim, Entry, Table
from reproduction.tables import CHOOSING, TABLES, tables_of
from timm_dearkd.analysis.__main__ import build_parser as analysis_parser
from timm_dearkd.data_free.__main__ import build_parser as data_free_parser
from timm_dearkd.engine.options import build_config_parser, build_parser, parse_args

SEEDS = [0, 1, 2]


def make_driver(tmp_path, scale='smoke', jobs=2):
    return run.Driver(SCALES[scale], tmp_path / 'data', tmp_path / 'work', tmp_path / 'results', jobs)


@pytest.mark.parametrize('name', list(SCALES))
def test_every_cell_is_a_command_that_can_be_parsed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(run.ROOT)
    driver = make_driver(tmp_path, name)
    commands = {}

    def and_needs(cell):
        return [cell, *(other for need in cell.needs for other in and_needs(need))]

    for cell in (cell for make in tables_of(driver.scale).values() for entry in make(driver.scale, SEEDS).entries
                 for of_seed in entry.cells for cell in and_needs(of_seed)):
        if cell.name in commands:  # a name means one command, in whichever table it stands
            assert commands[cell.name] == driver.command(cell)
            continue
        command = driver.command(cell)
        assert not any('{' in word for word in command), command
        if cell.program == 'train':
            parse_args(build_parser(), build_config_parser(), command[1:])
        elif cell.program == 'data_free':
            data_free_parser().parse_args(command[2:])
        else:
            analysis_parser().parse_args(command[2:])
        commands[cell.name] = command
    # and a command has one name
    bare = [tuple(w for w in command if w != name) for name, command in commands.items()]
    assert len(set(bare)) == len(bare)


@pytest.mark.parametrize('name', list(SCALES))
def test_methods_differ_in_what_the_tables_say_and_share_the_rest(name, tmp_path, monkeypatch):
    monkeypatch.chdir(run.ROOT)
    driver = make_driver(tmp_path, name)
    column = f'{100 * driver.scale.fractions[1]:g} %'
    options = {
        entry.row: vars(parse_args(build_parser(), build_config_parser(), driver.command(entry.cells[0])[1:])[0])
        for entry in TABLES['table2'](driver.scale, [1]).entries if entry.column == column}
    vit, hard, dearkd = options.values()
    assert not vit['kd_model_name'] and hard['kd_model_name'] == dearkd['kd_model_name'] == driver.teacher()
    assert vit['model_kwargs'] == hard['model_kwargs'] == {'num_mhca_blocks': 0}
    assert 'num_mhca_blocks' not in dearkd['model_kwargs']
    assert hard['dearkd_beta'] == 0 and dearkd['dearkd_beta'] == 10
    method = {'kd_model_name', 'model_kwargs', 'dearkd_beta', 'dearkd_hooks', 'dearkd_stage1_epochs', 'experiment'}
    for other in (hard, dearkd):
        assert {key for key in vit if vit[key] != other[key]} <= method
    for table, make in tables_of(driver.scale).items():
        cells = [cell for entry in make(driver.scale, SEEDS).entries for cell in entry.cells]
        chooses = table in CHOOSING
        assert all(cell.data.endswith('tuning') == chooses for cell in cells)


def test_a_teacher_of_no_more_images_than_its_student(tmp_path, monkeypatch):
    """The CNN's images, architecture and recipe, and whom it teaches; all else is as with the CNN of all images."""
    monkeypatch.chdir(run.ROOT)
    driver = make_driver(tmp_path, 'small')

    def options(cell):
        return vars(parse_args(build_parser(), build_config_parser(), driver.command(cell)[1:])[0])

    rows = {entry.row: entry.cells for entry in TABLES['own_teacher'](driver.scale, SEEDS).entries}
    cnns, pupils = rows['that CNN'], rows['DearKD with that CNN']
    assert [cell.seed for cell in cnns] == [cell.seed for cell in pupils] == [0, 1]
    for cnn, pupil, usual in zip(cnns, pupils, rows['DearKD with the CNN of all images']):
        teacher, student, other = options(cnn), options(pupil), options(usual)
        assert pupil.needs == (cnn,) and student['kd_model_name'] == f'{driver.path(driver.work)}/{cnn.name}'
        assert (student['train_fraction'], student['fraction_seed'], student['data_dir'], student['epochs']) \
            == (teacher['train_fraction'], teacher['fraction_seed'], teacher['data_dir'], teacher['epochs'])
        different = {key for key in student if student[key] != other[key]}
        assert different == {'kd_model_name', 'experiment', 'track_attention_distance'}
    different = {key for key in teacher if teacher[key] != student[key] and not key.startswith('dearkd_')}
    assert different == {'model', 'model_kwargs', 'val_interval', 'experiment', 'kd_model_name'}
    all_images = options(teacher_cell(driver.scale))
    assert all_images['model_kwargs'] == teacher['model_kwargs'] and all_images['model'] == teacher['model']


def test_rows_are_the_commands_that_they_say(tmp_path, monkeypatch):
    """Table 1 by what is on, table 7 by its stages, tables 5 and 6 by who helps whom."""
    monkeypatch.chdir(run.ROOT)
    driver = make_driver(tmp_path, 'small')

    def options(cell):
        parser = data_free_parser() if cell.program == 'data_free' else None
        argv = driver.command(cell)
        return vars(parser.parse_args(argv[2:]) if parser else parse_args(
            build_parser(), build_config_parser(), argv[1:])[0])

    rows = {entry.row: options(entry.cells[0]) for entry in TABLES['table1'](driver.scale, SEEDS).entries}
    for row, found in rows.items():
        everything = row.startswith('all')
        assert ('num_mhca_blocks' not in found['model_kwargs']) == (everything or 'MHCA' in row), row
        assert bool(found['kd_model_name']) == (everything or 'hard' in row), row
        if found['kd_model_name']:
            assert (found['dearkd_beta'] > 0) == (everything or 'hidden' in row), row
            assert (found['dearkd_stage1_epochs'] < found['epochs']) == everything, row
    for entry in TABLES['table7'](driver.scale, SEEDS).entries:
        found, percent = options(entry.cells[0]), float(entry.row.split()[0])
        if not found['kd_model_name']:
            assert (percent, entry.column) == (0, 'ce')
            continue
        assert 100 * found['dearkd_stage1_epochs'] / 40 == pytest.approx(percent, abs=1)
        assert percent == 100 or found['dearkd_stage2'] == entry.column
    synthetic = [entry for entry in TABLES['table5'](driver.scale, SEEDS).entries if entry.noise == 'synthetic']
    assert len(synthetic) == 3
    for entry in synthetic:
        for cell in entry.cells:
            images, = (need for need in cell.needs if need.program == 'data_free')
            made = options(images)
            assert cell.seed == images.seed and driver.command(cell)[1] == made['output']
            assert run.is_taught(images) and made['min_prob'] == 0  # all are kept
            assert Path(made['verifier']).name in {need.name for need in images.needs}
            if entry.row == 'ADI':
                helper, = (need for need in images.needs if 'student' in need.name)
                assert helper.seed == cell.seed and made['student'] == f'{driver.path(driver.work)}/{helper.name}'
                assert driver.command(helper)[1].endswith(f'images-none-seed{cell.seed}')
            else:
                assert not made['student'] and made['diversity'] == {'DeepInversion': 'none'}.get(entry.row, 'intra')
            if made['diversity'] == 'intra':  # Eq. 13's weights
                assert made['ep_weight'] / made['triplet_weight'] == pytest.approx(50 / 0.5)


def test_sets_of_images(tmp_path):
    """What is set aside is no training image of the tuning set, and all come from the training file."""
    source, rng = tmp_path / 'source', np.random.default_rng(0)
    source.mkdir()
    pixels = {}
    for name, count in (('train', 6000), ('t10k', 20)):
        labels = np.arange(count) % 10
        pixels[name] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, array in (('images-idx3', pixels[name]), ('labels-idx1', labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
            (source / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes(), 1))
    write_fashion_mnist(tmp_path / 'out', source)
    files = {part: {(p.parent.name, p.name) for p in (tmp_path / 'out' / part).rglob('*.png')}
             for part in ('train', 'validation', 'tuning/train', 'tuning/validation')}
    assert [len(files[part]) for part in files] == [6000, 20, 1000, 5000]
    assert not files['tuning/train'] & files['tuning/validation']
    assert files['tuning/train'] | files['tuning/validation'] == files['train']
    image = np.asarray(Image.open(tmp_path / 'out' / 'validation' / '7' / '00017.png'))
    np.testing.assert_array_equal(image, pixels['t10k'][17])
    with pytest.raises(FileNotFoundError, match='Name the folder'):
        write_fashion_mnist(tmp_path / 'other', tmp_path)


@pytest.fixture()
def driver(tmp_path, monkeypatch):
    """A driver whose commands fail or write the summary of a run, by name, and note that they ran."""
    driver = make_driver(tmp_path)
    driver.ran, driver.broken = [], set()

    def execute(command, log):
        name = Path(log.name).stem
        driver.ran.append(name)
        if name in driver.broken:
            raise run.CellError('status 2: no data')
        folder = tmp_path / 'work' / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'summary.csv').write_text('epoch,train_teacher_agreement,eval_top1\n0,0.8,\n1,0.9,50.5\n2,,49.5\n')
        (folder / 'model_best.safetensors').touch()
        (folder / 'config.json').write_text('{}')

    monkeypatch.setattr(driver, 'execute', execute)
    return driver


def test_what_is_there_is_skipped_and_what_needs_a_failure_waits(driver, capsys):
    cells = run.collect_cells(driver.scale, ['table1', 'table2'], [0])
    names = [cell.name for cell in cells]
    assert names.count('teacher') == 1
    driver.broken = {'teacher'}
    assert not driver.run(cells)
    untaught = {cell.name for cell in cells if not cell.needs} - {'teacher'}
    assert set(driver.ran) == untaught | {'teacher'} and 'status 2: no data' in capsys.readouterr().out
    driver.ran, driver.broken = [], set()
    assert driver.run(cells)
    assert sorted(driver.ran) == sorted(set(names) - untaught) and driver.ran[0] == 'teacher'
    result = json.loads((driver.results / 'dearkd-0.05-seed0.json').read_text())
    assert result['top1'] == 49.5 and result['top1_by_epoch'] == {'2': 50.5, '3': 49.5}
    assert result['teacher_agreement'] == 0.9 and result['seed'] == 0 and result['commits'] == [run.git_commit()]
    assert '--kd-model-name' in result['command']
    driver.ran = []
    assert driver.run(cells) and not driver.ran


def test_a_changed_cell_starts_anew_and_the_report_leaves_its_figure_out(driver):
    cell = TABLES['table2'](driver.scale, [0]).entries[0].cells[0]
    assert driver.run([cell])
    left_over = driver.work / cell.name / 'old'
    left_over.touch()
    assert driver.run([cell]) and driver.ran == [cell.name] and left_over.exists()
    changed = replace(cell, argv=(*cell.argv, '--lr', '1'))
    assert not driver.has_result(changed)
    assert driver.run([changed]) and driver.ran == [cell.name] * 2 and not left_over.exists()
    found = report.Results(driver.scale, driver.results, [0])
    assert found.stale == [cell.name] and not found.cells


def test_what_is_needed_is_made_where_only_its_result_is_there(driver):
    cells = run.collect_cells(driver.scale, ['table2'], [0])
    assert driver.run(cells)
    (driver.work / 'teacher' / 'model_best.safetensors').unlink()
    shutil.rmtree(driver.results / 'teacher')
    (driver.results / 'dearkd-0.05-seed0.json').write_text('')
    driver.ran = []
    assert driver.run(cells) and driver.ran == ['teacher', 'dearkd-0.05-seed0']


def test_one_exception_is_one_cell(driver, monkeypatch, capsys):
    cells = run.collect_cells(driver.scale, ['table2'], [0])
    collect = driver.student_figures
    monkeypatch.setattr(
        driver, 'student_figures', lambda cell: {}['x'] if cell.name.startswith('vit-0.05') else collect(cell))
    assert not driver.run(cells)
    assert len(list(driver.results.glob('*.json'))) == len(cells) - 1
    assert "No result: vit-0.05-seed0: KeyError: 'x'" in capsys.readouterr().err


def test_commands_that_fail_or_are_stopped(tmp_path):
    driver = make_driver(tmp_path)
    with driver.locked('cell') as log:
        driver.execute([sys.executable, '-c', 'print("done")'], log)
        assert (driver.work / 'cell.log').read_text() == 'done\n'
        with pytest.raises(run.CellError, match='status 2: no such file'):
            driver.execute([sys.executable, '-c', 'import sys; print("no such file"); sys.exit(2)'], log)
    driver.stop(15)
    with pytest.raises(run.CellError, match='stopped'), driver.locked('cell'):
        pass


def test_a_cell_of_another_process_is_waited_for(driver, capsys, monkeypatch):
    """Its folder is left alone, also by a driver that knows another definition of it."""
    cell = TABLES['table2'](driver.scale, [0]).entries[0].cells[0]
    folder = driver.work / cell.name
    folder.mkdir(parents=True)
    with open(driver.work / f'{cell.name}.log', 'a') as log:
        fcntl.flock(log, fcntl.LOCK_EX)

        def sleep(seconds):
            assert folder.exists() and not driver.ran
            fcntl.flock(log, fcntl.LOCK_UN)

        monkeypatch.setattr(run.time, 'sleep', sleep)
        assert driver.run([cell]) and driver.ran == [cell.name]
    assert 'another process works on it' in capsys.readouterr().out


def test_students_of_another_teacher_start_anew(driver):
    cells = run.collect_cells(driver.scale, ['table2'], [0])
    assert driver.run(cells)
    results = [json.loads(path.read_text()) for path in driver.results.glob('*.json')]
    assert len({result['teacher'] for result in results if 'teacher' in result}) == 1
    for folder in (driver.work, driver.results):
        (folder / 'teacher' / 'model_best.safetensors').write_bytes(b'others')
    (driver.results / 'dearkd-0.05-seed0.json').unlink()
    left_over = driver.work / 'dearkd-0.05-seed0' / 'old'
    left_over.touch()
    assert driver.run(cells) and not left_over.exists()
    report.write_report(driver.scale, driver.results, [0], driver.work / 'RESULTS.md')
    text = (driver.work / 'RESULTS.md').read_text()
    other = hashlib.sha256(b'others').hexdigest()[:12]
    assert f'1 figures are of students of teacher {other}, which is kept.' in text
    assert '**Not all students of seed 0 at 5 % have the same teacher.**' in text
    assert '0 at 10 %' not in text


def test_the_teacher_of_the_results_teaches_elsewhere(driver, tmp_path):
    """One network, also where another machine would train another one; another definition is another teacher."""
    cells, teacher = run.collect_cells(driver.scale, ['table2'], [0]), teacher_cell(driver.scale)
    assert driver.run(cells)
    for name in run.TEACHER_FILES:
        (driver.results / 'teacher' / name).write_text(f'kept {name}')
    for is_new in (True, False):  # where another one was trained, too
        if is_new:
            shutil.rmtree(driver.work)
        else:
            (driver.work / 'teacher' / 'model_best.safetensors').write_text('others')
        (driver.results / 'dearkd-0.05-seed0.json').unlink()
        driver.ran.clear()
        assert driver.run(cells) and driver.ran == ['dearkd-0.05-seed0']
        for name in run.TEACHER_FILES:
            assert (driver.work / 'teacher' / name).read_text() == f'kept {name}'
    shutil.rmtree(driver.work)
    (driver.results / 'teacher' / 'model_best.safetensors').unlink()  # as it is without the weights, in an archive
    (driver.results / 'dearkd-0.05-seed0.json').unlink()
    driver.ran.clear()
    assert driver.run(cells) and driver.ran == ['teacher', 'dearkd-0.05-seed0']
    driver.ran.clear()
    shutil.rmtree(driver.work)
    changed = replace(teacher, argv=(*teacher.argv, '--epochs', '3'))
    assert driver.run([changed]) and driver.ran == ['teacher']
    assert not (driver.results / 'teacher' / 'model_best.safetensors').read_text()


def test_seconds_of_a_cell_add_up_over_its_goes(driver, monkeypatch):
    cell, times = TABLES['table2'](driver.scale, [0]).entries[0].cells[0], iter([10., 13., 20., 24.])
    monkeypatch.setattr(run.time, 'monotonic', lambda: next(times))
    driver.broken = {cell.name}
    with pytest.raises(run.CellError):
        driver.run_cell(cell)
    driver.broken = set()
    assert driver.run_cell(cell)['seconds'] == 3 + 4


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
    assert again.stdout == '1 cells, 1 of them done\n'
    report.write_report(SCALES['smoke'], tmp_path / 'results', [0], tmp_path / 'RESULTS.md')
    assert f'| ViT | {kept["top1"]:.1f} (1 seed) [40.5]' in (tmp_path / 'RESULTS.md').read_text()


def write_results(folder, scale, figures):
    """Results of cells by table, row, column: one figure for each seed."""
    folder.mkdir(exist_ok=True)
    for (table, row, column), values in figures.items():
        entry, = (e for e in TABLES[table](scale, SEEDS).entries if (e.row, e.column) == (row, column))
        for cell, value in zip(entry.cells, values):
            result = {entry.key: value, 'seconds': 60, 'definition': run.definition(cell)}
            (folder / f'{cell.name}.json').write_text(json.dumps(result))


def test_the_report_is_made_of_the_files_alone(tmp_path):
    scale = SCALES['small']
    vit, hard, dearkd = 'ViT', 'ViT, hard-label distillation', 'DearKD'
    values = {vit: [60., 62., 61.], hard: [61., 60., 63.5], dearkd: [70., 71., 72.]}
    write_results(tmp_path / 'results', scale, {
        ('table2', row, column): [figure + shift for figure in figures]
        for row, figures in values.items()
        for column, shift in (('1 %', 0.), ('2.5 %', 5.), ('5 %', 6. - (row == vit)))})
    (tmp_path / 'results' / 'vit-0.1-seed0.json').write_text('{"top1": 3')
    report.write_report(scale, tmp_path / 'results', SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    mean, error = statistics.mean(values[hard]), statistics.stdev(values[hard]) / math.sqrt(3)
    assert f'| {hard} | {mean:.1f} ± {error:.1f} [50.3] | {mean + 5:.1f}' in text
    # the two without the hidden loss are a t-test of pairs: 2 degrees of freedom, for which Student's t has 4.303
    margin = 4.303 * statistics.stdev(a - b for a, b in zip(values[hard], values[vit])) / math.sqrt(3)
    told = '- 1 %: hard labels above the plain ViT: not to be told from the noise, leaning this way'
    assert f'{told} (+0.5 ± {margin:.1f})' in text
    # with it: Welch's t of a variance of 1 with 2 degrees and one pooled from two samples, with 4
    plain, own = (statistics.variance(values[vit]) + statistics.variance(values[hard])) / 2, 1.
    degrees = (plain + own) ** 2 / (plain ** 2 / 4 + own ** 2 / 2)
    assert 5 < degrees < 6
    margin = 2.571 * math.sqrt((plain + own) / 3)
    assert f'- 1 %: DearKD above hard labels: holds (+9.5 ± {margin:.1f})' in text
    assert f'DearKD on 2.5 % of the images above the plain ViT on 5 %: holds (+10.0 ± {margin:.1f})' in text
    # the same of four figures, with twice the degrees
    margin = 2.228 * math.sqrt((plain + own) * 2 / 3)
    assert f'above "ViT" at 1 % than at 5 %: not to be told from the noise, leaning the other way (-1.0 ± ' \
           f'{margin:.1f}; +10.0 at 1 %, +10.0 at 2.5 %, +11.0 at 5 %)' in text
    assert '## Ablation (table 1)' in text and '## Recipe' not in text
    assert (tmp_path / 'reproduction' / 'plots' / 'table2.png').stat().st_size > 3000


def test_verdicts():
    def judge(*rows, noise='a'):
        entries = [Entry(row, 'top-1', (), noise=word) for row, word in zip('abcd', (noise, 'a', 'a', 'a'))]
        figures = {(row, 'top-1'): report.Figure(dict(enumerate(v)), 1) for row, v in zip('abcd', rows)}
        return ' '.join(report.judge(Table('', '', entries, [Claim('x', ('a', 'top-1'), ('b', 'top-1'))]), figures))

    assert judge([65.], [60.]) == ''
    # differences of a seed 14, 12 and 13: a mean of 13 and a deviation of 1; 95 % of t with 2 degrees is 4.30
    assert 'x: holds (+13.0 ± 2.5)' in judge([74., 66., 76.], [60., 54., 63.])
    assert 'x: **does not hold, the other way round** (-13.0 ± 2.5)' in judge([60., 54., 63.], [74., 66., 76.])
    assert 'x: not to be told from the noise, leaning this way (+2.0 ± 2.5)' in judge([63., 55., 65.], [60., 54., 63.])
    # "a" and "b" share one seed, which is where they are compared; the other rows tell of the noise: residuals of 0.5
    # with one degree, 12.71
    assert f'(-5.0 ± {12.71 * math.sqrt(2):.1f})' in judge([15.], [20., 24.], [10., 12.])
    # other noise, so not paired: two that differ by 2 each; a degree each is two together
    assert f'(+7.0 ± {4.30 * math.sqrt(2):.1f})' in judge([66., 68.], [59., 61.], noise='b')
    assert 'nan' not in judge([66.], [59.], noise='b') + judge([66., 68.], [59.], noise='b') + judge([5., 5.], [4., 4.])


def test_intervals_hold_for_95_percent():
    """Of simulated tables like ours: seeds that move the rows without the hidden loss, and quiet rows with it."""
    rng = np.random.default_rng(0)
    loud, quiet = ('vit', 'mhca', 'hard', 'mhca_hard'), ('hidden', 'mhca_hidden', 'dearkd')
    table = Table('', '', [Entry(row, '', (), noise='quiet' if row in quiet else '') for row in loud + quiet])
    pairs = (('hard', 'vit'), ('dearkd', 'hard'), ('dearkd', 'mhca_hidden'))
    missed = dict.fromkeys(pairs, 0)
    for _ in range(200):
        seed_effects = rng.normal(0, 1.7, 3)
        figures = {(row, ''): report.Figure(dict(enumerate(
            rng.normal(0, 0.15, 3) if row in quiet else seed_effects + rng.normal(0, 0.8, 3))), 1)
            for row in loud + quiet}
        for higher, lower in pairs:
            gap = report.measure(table, figures, {(higher, ''): 1., (lower, ''): -1.})
            missed[higher, lower] += abs(gap.value) > gap.margin
    # binomial with 200 and 5 %: 10 with a deviation of 3.1; across groups more, as the loud rows share their seeds
    assert all(2 <= missed[pair] <= 20 for pair in (pairs[0], pairs[2])) and 2 <= missed[pairs[1]] <= 30


@pytest.mark.parametrize('name', list(SCALES))
def test_claims_are_about_figures_that_the_tables_have(name):
    scale = SCALES[name]
    for table, make in tables_of(scale).items():
        made = make(scale, SEEDS)
        keys = {(entry.row, entry.column) for entry in made.entries}
        assert len(keys) == len(made.entries)
        assert all({claim.higher, claim.lower} <= keys for claim in made.claims)
        assert made.claims or table in ('recipes', 'inversion', 'figure4') or made.reference in {row for row, _ in keys}


def test_only_what_is_alike_shares_its_noise(tmp_path):
    """Students on real images differ by less than those on synthetic ones, whose noise would hide it."""
    scale, modes = SCALES['small'], ('DeepInversion', 'ADI', 'DF-DearKD (intra-divergence)')
    write_results(tmp_path, scale, {
        **{('table5', mode, 'top-1'): [50., 60.] for mode in modes},
        ('table5', 'real images', 'top-1'): [85., 86., 87.]})
    table, real = TABLES['table5'](scale, SEEDS), ('real images', 'top-1')
    figures = report.Results(scale, tmp_path, SEEDS).figures(table)
    gap = report.measure(table, figures, {real: 1., (modes[2], 'top-1'): -1.})
    # variances of 1 and 50, of three seeds and two, with 2 and 3 degrees: 3.05 in all
    assert gap.value == pytest.approx(31) and gap.margin == pytest.approx(3.18 * math.sqrt(1 / 3 + 50 / 2))


def test_choices_are_compared_with_the_default(tmp_path):
    write_results(tmp_path, SCALES['small'], {
        ('choices', 'default', 'top-1'): [80., 82.], ('choices', 'alpha 0.25', 'top-1'): [83., 87.]})
    report.write_report(SCALES['small'], tmp_path, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    # differences of 3 and 5, one degree: 12.71 * sqrt(2) / sqrt(2)
    assert '| alpha 0.25 | 85.0 ± 2.0 (2 seeds) | +4.0 ± 12.7 |' in text
    assert '| default | 81.0 ± 1.0 (2 seeds) |  |' in text


def test_figure4_is_told_in_numbers(tmp_path):
    scale, results = SCALES['small'], tmp_path / 'results'
    write_results(results, scale, {('figure4', 'DearKD', 'top-1'): [80., 81.]})
    for seed, growth in ((0, 0.1), (1, 0.2)):
        lines = ['epoch,layer,head,patches,pixels']
        for epoch in range(40):
            for layer in (1, 2):
                for head in range(2):
                    patches = layer + growth * epoch + 0.02 * head
                    lines.append(f'{epoch},{layer},{head},{patches},{4 * patches}')
        (results / f'dearkd-0.025-seed{seed}.distances.csv').write_text('\n'.join(lines) + '\n')
    report.write_report(scale, results, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    assert ('after the first epoch 1.01, 2.01; after epoch 20 2.91, 3.91; after epoch 33 4.21, 5.21; after the last'
            ' 4.91, 5.91') in text
    # seven epochs of 0.1 and of 0.2, and twenty
    assert 'Change from epoch 33 to the last, a mean over the layers: DearKD 1.050 ± 0.350' in text
    assert 'Change from epoch 20 to the last, a mean over the layers: DearKD 3.000 ± 1.000' in text
    assert (tmp_path / 'reproduction' / 'plots' / 'figure4-dearkd.png').exists()


def test_another_scale_has_its_own_report(tmp_path):
    write_results(tmp_path / 'results', SCALES['smoke'], {('table2', 'ViT', '5 %'): [50.]})
    report.write_report(SCALES['smoke'], tmp_path / 'results', SEEDS, tmp_path / 'RESULTS-smoke.md')
    assert 'reproduction/plots/smoke/table2.png' in (tmp_path / 'RESULTS-smoke.md').read_text()
    assert (tmp_path / 'reproduction/plots/smoke/table2.png').exists()


def test_command_line(tmp_path):
    result = run_python('reproduction/run.py', 'table2', 'table5', '--list', '--scale', 'imagenet', '--seeds', '0',
                        '--launcher', 'torchrun --nnodes 2 --nproc-per-node=4')
    assert result.returncode == 0, result.stderr
    launcher, batches = ['torchrun', '--nnodes', '2', '--nproc-per-node=4'], {2048: 0, 1024: 0}
    for line in result.stdout.splitlines():
        words = shlex.split(line)
        assert words[:4] == launcher
        if words[4] == 'train.py':  # the batch is the paper's
            found, _ = parse_args(build_parser(), build_config_parser(), words[5:])
            batches[found.batch_size * found.grad_accum_steps * 8] += 1
    assert batches == {2048: 12, 1024: 4}
    assert run_python('reproduction/run.py', 'figure4', '--list').stdout.count('--track-attention-distance') == 17
    listed = run_python('reproduction/run.py', 'table7', '--list', '--only', 'stage50_ce*', 'mhca-*1').stdout
    assert [line.split('--experiment ')[1].split()[0] for line in listed.splitlines()] == [
        'stage50_ce-0.025-seed0', 'stage50_ce-0.025-seed1', 'mhca-0.025-seed1']
    for args, message in (
            (['table9'], 'table9'),
            (['table2', '--scale', 'imagenet', '--data', tmp_path], 'no folder validation'),
            (['table2', '--only', 'stage50_*'], 'named stage50_*'),
            (['table2', '--launcher', 'torchrun --nproc-per-node=2'], '2 processes can not share the 1 accumulation'),
            (['choices', '--scale', 'imagenet'], 'has no choices. It has table2, table1, table7,')):
        result = run_python('reproduction/run.py', *args)
        assert result.returncode == 2 and message in result.stderr.strip().splitlines()[-1]


def test_launchers():
    for launcher, count in (('torchrun --nproc_per_node=4', 4), ('torchrun --nnodes 2 --nproc-per-node 8', 16),
                            ('python', 1), ('accelerate launch', 1)):
        assert run.count_processes(launcher.split()) == count
    for launcher in ('torchrun --nproc-per-node gpu', 'torchrun --nnodes 1:4 --nproc_per_node 2'):
        with pytest.raises(ValueError, match='expected two numbers'):
            run.count_processes(launcher.split())


def test_the_listed_commands_are_those_of_a_shell():
    listed = run_python('reproduction/run.py', 'table2', '--list').stdout.splitlines()[0]
    shell = subprocess.run(
        ['sh', '-c', f'set -- {listed}; for a; do echo "$a"; done'], capture_output=True, text=True).stdout.splitlines()
    driver = run.Driver(SCALES['small'], run.ROOT / 'output/reproduction/data', run.ROOT / 'output/reproduction/small',
                        run.RESULTS / 'small', 1)
    cell = run.collect_cells(driver.scale, ['table2'], [0])[0]
    assert shell == ['python', *driver.command(cell)]


def test_what_two_cnns_say_of_images(tmp_path):
    driver = make_driver(tmp_path)
    (tmp_path / 'data' / 'digits' / 'validation').mkdir(parents=True)
    cell, folder = Cell('images', 'digits', (), 1., program='data_free'), tmp_path / 'work' / 'images'
    folder.mkdir(parents=True)
    probabilities = ((0.9, 0.1), (0.8, 0.7), (0.6, 0.2), (0.4, 0.3))
    (folder / 'manifest.json').write_text(json.dumps(dict(images=[
        dict(teacher_prob=teacher, verifier_prob=verifier, kept=verifier > 0.1)
        for teacher, verifier in probabilities])))
    assert driver.image_figures(cell) == dict(sure=75., recognised=25., images=4, kept=3)
    assert (folder / 'validation').samefile(tmp_path / 'data' / 'digits' / 'validation')


def test_weights_for_diversity_are_those_that_the_table_tells():
    scale = SCALES['small']
    found = report.Results(scale, run.RESULTS / 'small', SEEDS)
    sure = {entry.cells[0]: found.figure(entry) for entry in found.tables['inversion'].entries if entry.key == 'sure'}
    for mode, chosen in (('intra', scale.intra), ('adi', scale.adi)):
        tried = {cell.argv[-len(chosen):]: figure.mean for cell, figure in sure.items()
                 if figure is not None and f'-{mode}-' in cell.name}
        if tried:
            assert chosen == [weights for weights, figure in tried.items() if figure >= 90][-1]


def test_an_odd_file_is_no_result(tmp_path, capsys):
    for text in ('', '{', '[]', '3', '{"top1": 3}'):
        (tmp_path / 'x.json').write_text(text)
        assert run.read_result(tmp_path / 'x.json') is None
        assert 'is not a result' in capsys.readouterr().err
    assert run.read_result(tmp_path / 'y.json') is None and not capsys.readouterr().err


def test_a_definition_tells_teachers_apart():
    scale = SCALES['small']
    cell = TABLES['table2'](scale, [0]).entries[-1].cells[0]
    other = replace(cell, needs=(replace(teacher_cell(scale), argv=('-c', scale.recipe)),))
    assert run.definition(cell) != run.definition(other)
