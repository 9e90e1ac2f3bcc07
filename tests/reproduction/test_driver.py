"""Cells in parallel: what is run, skipped, waited for and begun anew."""
import fcntl
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_driver

from reproduction.cells import Cell, CellError, teacher_cell
from reproduction.driver import count_processes, git_commit
from reproduction.report import write_report
from reproduction.results import READERS, TEACHER_FILES, Results, image_figures, student_figures
from reproduction.tables import TABLES, collect_cells


@pytest.fixture()
def driver(tmp_path, monkeypatch):
    """A driver whose commands fail or write the summary of a run, by name, and note that they ran."""
    driver = make_driver(tmp_path)
    driver.ran, driver.broken = [], set()

    def execute(command, log):
        name = Path(log.name).stem
        driver.ran.append(name)
        if name in driver.broken:
            raise CellError('status 2: no data')
        folder = tmp_path / 'work' / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'summary.csv').write_text('epoch,train_teacher_agreement,eval_top1\n0,0.8,\n1,0.9,50.5\n2,,49.5\n')
        (folder / 'model_best.safetensors').touch()
        (folder / 'config.json').write_text('{}')
        if '--kd-label-cache' in command:
            (folder / 'run.json').write_text('{"results": {"labels_read": 30, "labels_computed": 10}}')

    monkeypatch.setattr(driver, 'execute', execute)
    return driver


def test_what_is_there_is_skipped_and_what_needs_a_failure_waits(driver, capsys):
    cells = collect_cells(driver.scale, ['table1', 'table2'], [0])
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
    assert result['teacher_agreement'] == 0.9 and result['seed'] == 0 and result['commits'] == [git_commit()]
    assert '--kd-model-name' in result['command'] and (result['labels_read'], result['labels_computed']) == (30, 10)
    count = sum('--kd-label-cache' in driver.command(cell) for cell in cells)
    assert 0 < count < sum(bool(cell.needs) for cell in cells)  # soft labels and features have no cache
    labels = f'The teacher labelled {10 * count} of {40 * count} images. The other labels (75 %) were in '
    assert labels in capsys.readouterr().out
    driver.ran = []
    assert driver.run(cells) and not driver.ran
    assert 'labelled' not in capsys.readouterr().out


def test_labels_of_another_teacher_are_in_another_folder(driver):
    cell = next(cell for cell in collect_cells(driver.scale, ['table2'], [0]) if cell.needs)
    folders = set()
    for weights in ('one', 'other', 'one'):
        (driver.work / 'teacher').mkdir(parents=True, exist_ok=True)
        (driver.work / 'teacher' / 'model_best.safetensors').write_text(weights)
        command = driver.command(cell)
        folders.add(command[command.index('--kd-label-cache') + 1])
    assert len(folders) == 2


def test_a_changed_cell_starts_anew_and_the_report_leaves_its_figure_out(driver):
    cell = TABLES['table2'](driver.scale, [0]).entries[0].cells[0]
    assert driver.run([cell])
    left_over = driver.work / cell.name / 'old'
    left_over.touch()
    assert driver.run([cell]) and driver.ran == [cell.name] and left_over.exists()
    changed = replace(cell, argv=(*cell.argv, '--lr', '1'))
    assert not driver.has_result(changed)
    assert driver.run([changed]) and driver.ran == [cell.name] * 2 and not left_over.exists()
    found = Results(driver.scale, driver.results, [0])
    assert found.stale == [cell.name] and not found.cells


def test_students_of_a_cnn_that_was_trained_again_are_run_again(driver):
    """Its figures become those of the weights that are there, and the report has no student of other weights."""
    cells = collect_cells(driver.scale, ['own_teacher'], [0])
    assert driver.run(cells)
    cnn, hard, dearkd = 'cnn-0.05-seed0', 'pupil_hard-0.05-seed0', 'pupil_dearkd-0.05-seed0'
    driver.ran = []
    assert driver.run(cells) and not driver.ran
    (driver.work / cnn / 'model_best.safetensors').write_text('others')
    (driver.results / f'{dearkd}.json').unlink()
    left_over = driver.work / dearkd / 'old'
    left_over.touch()
    kept = (driver.results / f'{hard}.json').read_text()
    assert driver.run(cells) and driver.ran[0] == cnn and sorted(driver.ran[1:]) == [dearkd, hard]
    assert not left_over.exists() and not Results(driver.scale, driver.results, [0]).stale
    (driver.results / f'{hard}.json').write_text(kept)
    assert Results(driver.scale, driver.results, [0]).stale == [hard]


def test_photographs_that_change_are_trained_on_again(driver):
    """Although the folder keeps its name."""
    cell = Cell('photos_pets_vit', 'photos/pets', ('-c', 'recipes/small_folder.yaml'), 1.)
    folder = driver.data / cell.data / 'train' / 'cat'
    assert not driver.has_result(cell)  # before the folder is linked
    folder.mkdir(parents=True)
    for names in (['1.png', '2.png'], ['1.png', '3.png']):
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_text(name)
        driver.ran = []
        assert driver.run([cell]) and driver.run([cell]) and driver.ran == [cell.name]
        driver.hashes.clear()  # as in a new process


def test_what_is_needed_is_made_where_only_its_result_is_there(driver):
    cells = collect_cells(driver.scale, ['table2'], [0])
    assert driver.run(cells)
    (driver.work / 'teacher' / 'model_best.safetensors').unlink()
    shutil.rmtree(driver.results / 'teacher')
    (driver.results / 'dearkd-0.05-seed0.json').write_text('')
    driver.ran = []
    assert driver.run(cells) and driver.ran == ['teacher', 'dearkd-0.05-seed0']


def test_one_exception_is_one_cell(driver, monkeypatch, capsys):
    cells = collect_cells(driver.scale, ['table2'], [0])
    monkeypatch.setitem(
        READERS, 'train', lambda folder: {}['x'] if folder.name.startswith('vit-0.05') else student_figures(folder))
    assert not driver.run(cells)
    assert len(list(driver.results.glob('*.json'))) == len(cells) - 1
    assert "No result: vit-0.05-seed0: KeyError: 'x'" in capsys.readouterr().err


def test_commands_that_fail_or_are_stopped(tmp_path):
    driver = make_driver(tmp_path)
    with driver.locked('cell') as log:
        driver.execute([sys.executable, '-c', 'print("done")'], log)
        assert (driver.work / 'cell.log').read_text() == 'done\n'
        with pytest.raises(CellError, match='status 2: no such file'):
            driver.execute([sys.executable, '-c', 'import sys; print("no such file"); sys.exit(2)'], log)
    driver.stop(15)
    with pytest.raises(CellError, match='stopped'), driver.locked('cell'):
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

        monkeypatch.setattr('reproduction.driver.time.sleep', sleep)
        assert driver.run([cell]) and driver.ran == [cell.name]
    assert 'waiting for another process' in capsys.readouterr().out


def test_students_of_another_teacher_start_anew(driver):
    cells = collect_cells(driver.scale, ['table2'], [0])
    assert driver.run(cells)
    results = [json.loads(path.read_text()) for path in driver.results.glob('*.json')]
    for folder in (driver.work, driver.results):
        (folder / 'teacher' / 'model_best.safetensors').write_bytes(b'others')
    (driver.results / 'dearkd-0.05-seed0.json').unlink()
    left_over = driver.work / 'dearkd-0.05-seed0' / 'old'
    left_over.touch()
    assert driver.run(cells) and not left_over.exists()
    write_report(driver.scale, driver.results, [0], driver.work / 'RESULTS.md')
    text = (driver.work / 'RESULTS.md').read_text()
    other = hashlib.sha256(b'others').hexdigest()[:12]
    first, = {result['teacher'] for result in results if 'teacher' in result}
    assert f'Other weights of the same recipe ({first}) taught ' in text
    both = ', '.join(sorted([first, other]))
    assert f'Not all students have the same teacher (5 %: {both}; 10 %: {first}).' in text


def test_the_teacher_of_the_results_teaches_elsewhere(driver, tmp_path):
    """One network, also where another machine would train another one; another definition is another teacher."""
    cells, teacher = collect_cells(driver.scale, ['table2'], [0]), teacher_cell(driver.scale)
    assert driver.run(cells)
    for name in TEACHER_FILES:
        (driver.results / 'teacher' / name).write_text(f'kept {name}')
    for is_new in (True, False):  # where another one was trained, too
        if is_new:
            shutil.rmtree(driver.work)
        else:
            (driver.work / 'teacher' / 'model_best.safetensors').write_text('others')
        (driver.results / 'dearkd-0.05-seed0.json').unlink()
        driver.ran.clear()
        assert driver.run(cells) and driver.ran == ['dearkd-0.05-seed0']
        for name in TEACHER_FILES:
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


def test_the_teacher_is_restored_once_and_a_stop_while_waiting_is_said(driver, capsys, monkeypatch):
    """Another driver has it: what that one restored is left alone."""
    cells = collect_cells(driver.scale, ['table2'], [0])
    assert driver.run(cells)
    shutil.rmtree(driver.work / 'teacher')
    other = make_driver(driver.work.parent)
    with open(driver.work / 'teacher.log', 'a') as log:
        fcntl.flock(log, fcntl.LOCK_EX)

        def sleep(seconds):
            fcntl.flock(log, fcntl.LOCK_UN)
            other.restore_teacher()
            (driver.work / 'teacher' / 'mark').touch()

        monkeypatch.setattr('reproduction.driver.time.sleep', sleep)
        assert driver.run(cells) and (driver.work / 'teacher' / 'mark').exists()
        fcntl.flock(log, fcntl.LOCK_EX)
        monkeypatch.setattr('reproduction.driver.time.sleep', lambda seconds: driver.stop(15))
        capsys.readouterr()
        assert not driver.run(cells) and capsys.readouterr().err == 'Stopped. Run the same command to resume.\n'


def test_seconds_of_a_cell_add_up_over_its_goes(driver, monkeypatch):
    cell, times = TABLES['table2'](driver.scale, [0]).entries[0].cells[0], iter([10., 13., 20., 24.])
    monkeypatch.setattr('reproduction.driver.time.monotonic', lambda: next(times))
    driver.broken = {cell.name}
    with pytest.raises(CellError):
        driver.run_cell(cell)
    driver.broken = set()
    assert driver.run_cell(cell)['seconds'] == 3 + 4


def test_launchers():
    for launcher, count in (('torchrun --nproc_per_node=4', 4), ('torchrun --nnodes 2 --nproc-per-node 8', 16),
                            ('python', 1), ('/usr/bin/python3 -m torch.distributed.run --nproc-per-node 3', 3)):
        assert count_processes(launcher.split()) == count
    for launcher in ('torchrun --nproc-per-node gpu', 'torchrun --nnodes 1:4 --nproc_per_node 2'):
        with pytest.raises(ValueError, match='expected two numbers'):
            count_processes(launcher.split())
    with pytest.raises(ValueError, match='is not supported, expected torchrun'):
        count_processes(['accelerate', 'launch', '--num_processes', '8'])


def test_what_two_cnns_say_of_images(tmp_path):
    driver = make_driver(tmp_path)
    (tmp_path / 'data' / 'digits' / 'validation').mkdir(parents=True)
    cell, folder = Cell('images', 'digits', (), 1., program='data_free'), tmp_path / 'work' / 'images'
    folder.mkdir(parents=True)
    probabilities = ((0.9, 0.1), (0.8, 0.7), (0.6, 0.2), (0.4, 0.3))
    (folder / 'manifest.json').write_text(json.dumps(dict(images=[
        dict(teacher_prob=teacher, verifier_prob=verifier, kept=verifier > 0.1)
        for teacher, verifier in probabilities])))
    assert image_figures(folder) == dict(sure=75., recognised=25., images=4, kept=3)
    driver.keep_files(cell)
    assert (folder / 'validation').samefile(tmp_path / 'data' / 'digits' / 'validation')


def test_a_merged_set_has_the_figures_of_its_images(tmp_path, capsys):
    driver = make_driver(tmp_path)
    (tmp_path / 'data' / 'digits' / 'validation').mkdir(parents=True)
    for name, probability in (('a', 0.9), ('b', 0.2)):
        (tmp_path / 'work' / name / 'train' / '0').mkdir(parents=True)
        (tmp_path / 'work' / name / 'train' / '0' / '0.png').touch()
        (tmp_path / 'work' / name / 'manifest.json').write_text(json.dumps(dict(images=[
            dict(teacher_prob=probability, verifier_prob=0.1, kept=True)])))
    assert driver.run([Cell('both', 'digits', ('{runs}/a', '{runs}/b'), 1., program='merge')])
    assert 'both: 50 % of the images recognised, 2 images (0 cells' in capsys.readouterr().out
    result = json.loads((tmp_path / 'results' / 'both.json').read_text())
    assert (result['merged'], result['sure'], result['recognised']) == (2, 50., 0.)
