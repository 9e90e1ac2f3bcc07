"""What the cells run, and what the tables claim of them; what they train is train.py's to test."""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers import SEEDS, make_driver, options
from timm.task import LogitDistillationTask

from reproduction.cells import METHODS, ROOT, SCALES, read_recipe, teacher_cell
from reproduction.driver import is_taught
from reproduction.merge import main as merge
from reproduction.results import RESULTS, Results, merged_figures
from reproduction.tables import CHOOSING, TABLES, tables_of
from timm_dearkd.api import build_parser as distill_parser
from timm_dearkd.engine.label_cache import IMAGE_OPTIONS
from timm_dearkd.engine.options import check_distillation
from timm_dearkd.images import Images
from timm_dearkd.planning import Planner


@pytest.mark.parametrize('name', list(SCALES))
def test_every_cell_is_a_command_that_can_be_parsed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, name)
    commands, images = {}, {}

    def and_needs(cell):
        return [cell, *(other for need in cell.needs for other in and_needs(need))]

    for cell in (cell for make in tables_of(driver.scale).values() for entry in make(driver.scale, SEEDS).entries
                 for of_seed in entry.cells for cell in and_needs(of_seed)):
        if cell.name in commands:  # a name means one command, in whichever table it stands
            assert commands[cell.name] == driver.command(cell)
            continue
        command = driver.command(cell)
        assert not any('{' in word for word in command), command
        found = options(driver, cell)
        commands[cell.name] = command
        if found.get('kd_label_cache'):  # runs that share the teacher's labels have the same images and teacher
            facts = [found[key] for key in (*IMAGE_OPTIONS, 'data', 'train_split', 'img_size', 'kd_model_name')]
            assert images.setdefault(found['kd_label_cache'], facts) == facts
    # and a command has one name
    assert len({repr(facts) for facts in images.values()}) == len(images)
    bare = [tuple(w for w in command if w != name) for name, command in commands.items()]
    assert len(set(bare)) == len(bare)


@pytest.mark.parametrize('name', list(SCALES))
def test_methods_differ_in_what_the_tables_say_and_share_the_rest(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, name)
    column = f'{100 * driver.scale.fractions[1]:g} %'
    vit, hard, dearkd = (
        options(driver, entry.cells[0]) for entry in TABLES['table2'](driver.scale, [1]).entries
        if entry.column == column and entry.row in METHODS.values())
    assert not vit['kd_model_name'] and hard['kd_model_name'] == dearkd['kd_model_name'] == driver.teacher()
    assert vit['model_kwargs'] == hard['model_kwargs'] == {'num_mhca_blocks': 0}
    assert 'num_mhca_blocks' not in dearkd['model_kwargs']
    assert hard['dearkd_beta'] == 0 and dearkd['dearkd_beta'] == 10
    assert hard['kd_label_cache'] == dearkd['kd_label_cache'] and not vit['kd_label_cache']
    method = {
        'kd_model_name', 'kd_label_cache', 'model_kwargs', 'dearkd_beta', 'dearkd_hooks', 'dearkd_stage1_epochs',
        'experiment'}
    for other in (hard, dearkd):
        assert {key for key in vit if vit[key] != other[key]} <= method
    for table, make in tables_of(driver.scale).items():
        cells = [cell for entry in make(driver.scale, SEEDS).entries for cell in entry.cells]
        chooses = table in CHOOSING
        assert all(cell.data.endswith('tuning') == chooses for cell in cells)


@pytest.mark.parametrize('name', ['small', 'imagenet'])
def test_soft_labels_and_features_are_timms_with_its_default_weights(name, tmp_path, monkeypatch):
    """The rows beside the paper's differ from hard labels in the kind of distillation alone."""
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, name)
    column = f'{100 * driver.scale.ablation_fraction:g} %'
    entries = TABLES['table2'](driver.scale, SEEDS).entries
    cells = {entry.row: entry.cells for entry in entries if entry.column == column}
    found = {row: options(driver, of_row[0]) for row, of_row in cells.items()}
    hard, soft, feature, dearkd, dearkd_soft = list(found.values())[1:]
    assert len(cells['ViT, feature distillation']) == len(cells['ViT, hard-label distillation'])
    assert (soft['kd_distill_type'], feature['kd_distill_type']) == ('logit', 'feature')
    other = {'experiment', 'kd_distill_type', 'kd_label_cache', 'distill_loss_weight', 'task_loss_weight',
             'track_attention_distance'}
    for taught in (soft, feature):
        assert taught['kd_label_cache'] is None and taught['kd_temperature'] == 4
        assert {key for key in hard if hard[key] != taught[key]} <= other | {
            key for key in hard if key.startswith('dearkd_')}
        check_distillation(argparse.Namespace(**taught), taught['kd_distill_type'])
    student, teacher = (timm.create_model('test_vit', num_classes=3) for _ in range(2))
    task = LogitDistillationTask(student, teacher, device=torch.device('cpu'), verbose=False)
    assert (soft['distill_loss_weight'], soft['task_loss_weight']) == (task.distill_loss_weight, task.task_loss_weight)
    different = {key for key in dearkd if dearkd[key] != dearkd_soft[key]}
    assert different - {'track_attention_distance'} == {'experiment', 'dearkd_soft_labels', 'kd_label_cache'}
    assert dearkd_soft['dearkd_soft_labels'] and not dearkd_soft['kd_label_cache']


def test_a_teacher_of_no_more_images_than_its_student(tmp_path, monkeypatch):
    """The CNN's images, architecture and recipe, and whom it teaches; all else is as with the CNN of all images."""
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, 'small')

    rows = {entry.row: entry.cells for entry in TABLES['own_teacher'](driver.scale, SEEDS).entries}
    cnns, pupils = rows['CNN trained on the same images'], rows['DearKD with this CNN']
    assert [cell.seed for cell in cnns] == [cell.seed for cell in pupils] == SEEDS
    for cnn, pupil, usual in zip(cnns, pupils, rows['DearKD with the CNN trained on all images']):
        teacher, student, other = (options(driver, cell) for cell in (cnn, pupil, usual))
        assert pupil.needs == (cnn,) and student['kd_model_name'] == f'{driver.path(driver.work)}/{cnn.name}'
        assert (student['train_fraction'], student['fraction_seed'], student['data_dir'], student['epochs']) \
            == (teacher['train_fraction'], teacher['fraction_seed'], teacher['data_dir'], teacher['epochs'])
        different = {key for key in student if student[key] != other[key]}
        assert different == {'kd_model_name', 'kd_label_cache', 'experiment', 'track_attention_distance'}
    different = {key for key in teacher if teacher[key] != student[key] and not key.startswith('dearkd_')}
    assert different == {'model', 'model_kwargs', 'val_interval', 'experiment', 'kd_model_name', 'kd_label_cache'}
    all_images = options(driver, teacher_cell(driver.scale))
    assert all_images['model_kwargs'] == teacher['model_kwargs'] and all_images['model'] == teacher['model']


def test_longer_students_of_a_weak_teacher_differ_in_their_stages_alone(tmp_path, monkeypatch):
    """From the student of table `own_teacher` they differ in the epochs; from each other in the length of stage I."""
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, 'small')
    rows = {entry.row: entry.cells for entry in TABLES['longer_stages'](driver.scale, SEEDS).entries}
    short = next(e.cells for e in TABLES['own_teacher'](driver.scale, SEEDS).entries if e.row == 'DearKD with this CNN')
    assert rows['its teacher'] == rows['100 %']  # whose results have the teacher's top-1
    for cnn, one, *two in zip((cell.needs[0] for cell in short), rows['100 %'], rows['83 %'], rows['50 %']):
        one, *two = (options(driver, cell) for cell in (one, *two))
        assert one['kd_model_name'] == f'{driver.path(driver.work)}/{cnn.name}'
        assert [found['dearkd_stage1_epochs'] for found in (one, *two)] == [160, 133, 80] and one['epochs'] == 160
        for found in two:
            assert {key for key in one if one[key] != found[key]} == {'dearkd_stage1_epochs', 'experiment'}
    usual, long = options(driver, short[0]), options(driver, rows['83 %'][0])
    different = {key for key in long if long[key] != usual[key]}
    assert different == {
        'epochs', 'dearkd_stage1_epochs', 'val_interval', 'track_attention_distance', 'experiment'}


def test_the_patient_cnn_is_that_of_distill_with_the_epochs_of_the_student(tmp_path, monkeypatch):
    """All options are those of the CNN that `distill` plans, but for what the number of epochs decides."""
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, 'small')
    entries = [e for e in TABLES['own_teacher'](driver.scale, SEEDS).entries if 'distill' in e.row]
    for share in (0.01, 0.025):
        cnn, patient, student, _ = (e for e in entries if e.row.startswith(f'{100 * share:g} %, '))
        assert cnn.cells == student.cells and [cell.seed for cell in patient.cells] == SEEDS
        argv = driver.command(cnn.cells[0])
        user = distill_parser().parse_known_args(argv[3:])[1]
        images = Images(round(60000 * share), round(60000 * share), 10000, 10, 28, True, [])
        planner = Planner(argv[3], 'out', images, None, torch.device('cpu'), user, [
            'device', 'fraction_seed', 'seed', 'train_fraction'])
        planned, found = vars(planner.teacher(None).args), options(driver, patient.cells[0])
        assert found['epochs'] == planner.epochs > planned['epochs']
        different = {key for key in found if found[key] != planned[key]}
        assert different == {'epochs', 'warmup_epochs', 'val_interval', 'output', 'experiment', 'device'}


def test_photos_differ_in_the_method_and_have_a_cnn_from_imagenet(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, 'small')
    cnn, *entries = TABLES['photos'](replace(driver.scale, photos='my cats'), SEEDS).entries
    teacher = options(driver, cnn.cells[0])
    assert teacher['pretrained_path'].endswith('.safetensors') and teacher['train_fraction'] == 1
    assert [(entry.row, entry.column) for entry in entries] == [
        (row, column) for column in ('25 %', '100 %')
        for row in ('ViT', 'ViT, hard-label distillation', 'ViT, soft-label distillation', 'DearKD')]
    for entry in entries:
        found = options(driver, entry.cells[1])
        assert found['data'] == f'{driver.data}/photos/my cats' == teacher['data']
        assert f'{100 * found["train_fraction"]:g} %' == entry.column and found['fraction_seed'] == 1
        assert found['auto_epochs'] and found['img_size'] == teacher['img_size'] == 64
        assert ('num_mhca_blocks' in found['model_kwargs']) == entry.row.startswith('ViT')
        assert found['model_kwargs']['patch_size'] == 8
        assert bool(found['kd_model_name']) == bool(entry.cells[1].needs) == (entry.row != 'ViT')
        assert found['kd_model_name'] in (None, f'{driver.path(driver.work)}/{cnn.cells[0].name}')
        assert (found['kd_distill_type'] == 'logit') == ('soft' in entry.row)
        assert bool(found['kd_label_cache']) == (entry.row in ('DearKD', 'ViT, hard-label distillation'))


def test_rows_are_the_commands_that_they_say(tmp_path, monkeypatch):
    """Table 1 by what is on, table 7 by its stages, tables 5 and 6 by who helps whom."""
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, 'small')
    rows = {entry.row: options(driver, entry.cells[0]) for entry in TABLES['table1'](driver.scale, SEEDS).entries}
    for row, found in rows.items():
        everything = row.startswith('all')
        assert ('num_mhca_blocks' not in found['model_kwargs']) == (everything or 'MHCA' in row), row
        assert bool(found['kd_model_name']) == (everything or 'hard' in row), row
        if found['kd_model_name']:
            assert (found['dearkd_beta'] > 0) == (everything or 'hidden' in row), row
            assert (found['dearkd_stage1_epochs'] < found['epochs']) == everything, row
    for entry in TABLES['table7'](driver.scale, SEEDS).entries:
        found, percent = options(driver, entry.cells[0]), float(entry.row.split()[0])
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
            made = options(driver, images)
            assert cell.seed == images.seed and driver.command(cell)[1] == made['output']
            assert is_taught(images) and made['min_prob'] == 0  # all are kept
            assert Path(made['verifier']).name in {need.name for need in images.needs}
            if entry.row == 'ADI':
                helper, = (need for need in images.needs if 'student' in need.name)
                assert helper.seed == cell.seed and made['student'] == f'{driver.path(driver.work)}/{helper.name}'
                assert driver.command(helper)[1].endswith(f'images-none-seed{cell.seed}')
            else:
                assert not made['student'] and made['diversity'] == {'DeepInversion': 'none'}.get(entry.row, 'intra')
            if made['diversity'] == 'intra':  # Eq. 13's weights
                assert made['ep_weight'] / made['triplet_weight'] == pytest.approx(50 / 0.5)


def test_rows_of_the_recipe_are_the_commands_that_they_say(tmp_path, monkeypatch):
    """The fill is the column, the images are the row's, and each round of ADI competes with the student before."""
    monkeypatch.chdir(ROOT)
    driver = make_driver(tmp_path, 'small')
    entries = [entry for entry in TABLES['table5'](driver.scale, SEEDS).entries if '`data_free`' in entry.column]
    assert len(entries) == 16
    epochs = read_recipe(entries[0].cells[0])['epochs']
    for entry in entries:
        assert [cell.seed for cell in entry.cells] == SEEDS
        found = options(driver, entry.cells[0])
        assert not (found['dearkd_soft_labels'] and found['kd_label_cache'])  # which keeps hard labels
        assert entry.column == f'`data_free`, {found["affine_aug"]}' and found['dearkd_labels'] == 'teacher'
        assert found['epochs'] * found['train_batches_per_epoch'] * found['batch_size'] >= 40_000
        assert found['epochs'] == (epochs if 'twice the epochs' in entry.row else epochs // 2)
        images = [need for need in entry.cells[0].needs if need.name != 'teacher']
        if entry.row.startswith('Real images'):
            assert not images and found['train_fraction'] * 60000 == 1500
            continue
        made = options(driver, images[0])
        if images[0].program == 'data_free':
            assert made['generator'] == entry.row.startswith('Generator')
            assert made['diversity'] == ('intra' if 'ntra' in entry.row else 'none')
            if made['generator']:
                assert made['bn_weight'] is None and made['ep_weight'] is None  # by the pilot, and the defaults
            continue
        rounds = images[0].needs
        assert made['folders'] == [f'{driver.path(driver.work)}/{cell.name}' for cell in rounds] and len(rounds) == 3
        assert len({cell.seed for cell in rounds}) == 3
        for before, (first, later) in enumerate(zip(rounds, rounds[1:]), start=1):
            student, = (need for need in later.needs if need.name.startswith('recipe_'))
            assert options(driver, later)['student'].endswith(student.name)
            merged, = (need for need in student.needs if need.program == 'merge')
            assert merged.needs == rounds[:before] and first in merged.needs


def test_folders_are_merged(tmp_path, capsys):
    for folder, name, content in (('a', 'x', '1'), ('b', 'x', '2'), ('b', 'y', '3')):
        path = tmp_path / folder / 'train' / f'class {name}' / '0.png'
        path.parent.mkdir(parents=True)
        path.write_text(content)
    for folder, probs in (('a', [0.9]), ('b', [0.3, 0.8])):
        images = [dict(teacher_prob=prob, verifier_prob=0.1, kept=True) for prob in probs]
        (tmp_path / folder / 'manifest.json').write_text(json.dumps(dict(images=images)))
    for _ in range(2):
        merge([str(tmp_path / name) for name in ('out', 'a', 'b')])
        found = {str(path.relative_to(tmp_path / 'out' / 'train')): path.read_text()
                 for path in (tmp_path / 'out').rglob('*.png')}
        assert found == {'class x/0-0.png': '1', 'class x/1-0.png': '2', 'class y/1-0.png': '3'}
    assert merged_figures(tmp_path / 'out') == dict(merged=3, sure=pytest.approx(200 / 3), recognised=0.)
    with pytest.raises(SystemExit):
        merge([str(tmp_path / 'out'), str(tmp_path / 'nothing')])
    assert 'no images in' in capsys.readouterr().err


@pytest.mark.parametrize('name', list(SCALES))
def test_claims_are_about_figures_that_the_tables_have(name):
    scale = SCALES[name]
    for table, make in tables_of(scale).items():
        made = make(scale, SEEDS)
        keys = {(entry.row, entry.column) for entry in made.entries}
        assert len(keys) == len(made.entries)
        assert all(claim.factors.keys() <= keys for claim in made.claims)
        assert all(sum(claim.factors.values()) == 0 for claim in made.claims)
        needs_none = table in ('defaults', 'recipes', 'longer', 'inversion', 'figure4', 'other_cnn')
        assert made.claims or needs_none or made.reference in {row for row, _ in keys}


def test_weights_for_diversity_are_those_that_the_table_tells():
    scale = SCALES['small']
    found = Results(scale, RESULTS / 'small', SEEDS)
    sure = {entry.cells[0]: found.figure(entry) for entry in found.tables['inversion'].entries if entry.key == 'sure'}
    for mode, chosen in (('intra', scale.intra), ('adi', scale.adi)):
        tried = {cell.argv[-len(chosen):]: figure.mean for cell, figure in sure.items()
                 if figure is not None and f'-{mode}-' in cell.name}
        if tried:
            assert chosen == [weights for weights, figure in tried.items() if figure >= 90][-1]
