"""`timm-dearkd`, as users call it."""
import contextlib
import itertools
import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import read_summary, run_python
from PIL import Image
from timm.data import create_dataset
from timm.task import ClassificationTask

import timm_dearkd.train
from reproduction.results import distill_figures
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.api import run_step
from timm_dearkd.cli import COMMANDS
from timm_dearkd.engine.process import TrainingError
from timm_dearkd.engine.schedule import epochs_for
from timm_dearkd.engine.wrappers import ClassFraction
from timm_dearkd.images import Images, inspect_images
from timm_dearkd.settings import choose_batch_size, choose_student, is_mirrored_alike

MODES = ('RGB', 'L', 'CMYK')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """60 JPEGs of three classes, of mixed sizes and modes."""
    root = tmp_path_factory.mktemp('flat') / 'photos'
    rng = np.random.default_rng(0)
    for channel, name in enumerate(('blue', 'green', 'red')):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 120, (30 + 5 * (i % 3), 32 + 7 * (i % 4), 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 120
            Image.fromarray(pixels).convert(MODES[i % 3]).save(root / name / f'{i}.jpg')
    return root


@pytest.fixture(scope='module')
def distilled(photos, tmp_path_factory):
    """The folder of a distillation without a teacher, and what the command printed."""
    output = tmp_path_factory.mktemp('distilled')
    result = run_python(
        '-m', 'timm_dearkd', 'distill', photos, '--output', output, '--epochs', '4', '--device', 'cpu', '-j', '0')
    assert result.returncode == 0, result.stderr
    return output, result


def copy_of(distilled, folder):
    """The runs and the split, as if they had been written to another folder."""
    shutil.copytree(distilled[0], folder, symlinks=True)
    for args in folder.glob('*/args.yaml'):
        args.write_text(args.read_text().replace(str(distilled[0]), str(folder)))
    return folder


def test_a_flat_folder_becomes_a_student(photos, distilled):
    """The CNN, the student, their table, and options that train.py reads again."""
    output, result = distilled
    images = {split: len(list((output / 'data' / split).rglob('*.jpg'))) for split in ('train', 'validation')}
    assert images == {'train': 48, 'validation': 12}
    assert "48 for training and 12 for validation" in result.stderr and 'about' in result.stderr
    args = yaml.safe_load((output / 'student' / 'args.yaml').read_text())
    assert args['epochs'] == 4 and args['img_size'] == 32 and args['kd_model_name'] == str(output / 'teacher')
    assert args['report'] and args['hflip'] in (0., 0.5) and f'--hflip={args["hflip"]}' in result.stderr
    table = [line.strip('| ').split(' | ') for line in result.stdout.splitlines() if line.startswith('| ')]
    assert [row[0] for row in table[2:]] == ['teacher', 'student']
    best = max(float(row['eval_top1']) for row in read_summary(output / 'student') if row['eval_top1'])
    assert float(table[3][2].split()[0]) == pytest.approx(best, abs=0.05)
    teacher_top1 = json.loads((output / 'student' / 'run.json').read_text())['results']['teacher_top1']
    assert float(table[2][2].split()[0]) == pytest.approx(teacher_top1, abs=0.05)
    assert distill_figures(output)['teacher_top1'] == teacher_top1  # as reproduction/ reads the folder
    assert (output / 'student' / 'report.html').is_file()


def test_the_same_call_again_returns_the_run(photos, distilled, monkeypatch):
    """In Python. Nothing is trained."""
    output, _ = distilled
    monkeypatch.setattr(timm_dearkd.train, 'prepare', None)
    run = timm_dearkd.distill(str(photos), output=str(output), epochs=4, device='cpu', workers=0)
    assert set(run.summary()) == {'teacher', 'student'}
    model = run.load_model()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert model.pretrained_cfg['label_names'] == ['blue', 'green', 'red']


@pytest.mark.parametrize('data,options,message', [
    (None, dict(), 'got data of type NoneType, expected a folder.'),
    (['photos'], dict(), 'got data of type list, expected a folder.'),
    ('photos', dict(teacher=1), 'got teacher of type int, expected a folder or a name.'),
    ('photos', dict(teacher=torch.nn.Linear(1, 1)), 'got teacher of type Linear.*save_for_hf'),
    ('photos', dict(output=['out']), 'got output of type list, expected a folder.'),
    ('photos', dict(student=torch.nn.Linear(1, 1)), 'got student of type Linear, expected a name of timm.'),
])
def test_paths_and_names_are_checked(data, options, message):
    with pytest.raises(TypeError, match=message) as error:
        timm_dearkd.distill(data, **options)
    assert len(str(error.value)) < 200 and '\n' not in str(error.value)


def test_a_switch_that_is_no_bool_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match='amp is 1, expected true or false.'):
        timm_dearkd.distill(str(photos), output=str(tmp_path / 'out'), amp=1)


def test_the_same_call_resumes_after_a_full_disk():
    """`distill` does not take --resume."""
    step = SimpleNamespace(name='student', argv=[])
    for remedy, expected in (('Resume with --resume auto.', 'Make room. The same call resumes.'), ('', 'Make room.')):
        with pytest.raises(TrainingError) as error:
            run_step(step, Mock(side_effect=TrainingError('Make room.', remedy)))
        assert str(error.value) == expected


def test_options_in_python(photos, distilled, tmp_path, monkeypatch):
    """Unknown names and wrong values raise, a file of options is read, and a switch can be off."""
    with pytest.raises(TypeError, match="'epoch'"):
        timm_dearkd.distill(str(photos), epoch=4)
    with pytest.raises(ValueError, match='--lr'):
        timm_dearkd.distill(str(photos), lr='much', output=str(tmp_path))
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    (tmp_path / 'mine.yaml').write_text('lr: 0.001\nbatch_size: 6\n')
    for options in (dict(config=tmp_path / 'mine.yaml'), dict(report=False, batch_size=6, lr=0.001)):
        with pytest.raises(ZeroDivisionError):
            timm_dearkd.distill(
                str(photos), teacher=str(distilled[0] / 'teacher'), output=str(tmp_path / 'out'), device='cpu',
                **options)
        args = timm_dearkd.train._parse_args(started[-1])[0]
        assert (args.lr, args.batch_size, args.report) == (0.001, 6, 'config' in options)
    with monkeypatch.context() as patch:
        patch.setenv('WORLD_SIZE', '2')
        with pytest.raises(ValueError, match='one process'):
            timm_dearkd.distill(str(photos))
    assert started[1][1:3] == ['-c', 'small_folder']


@pytest.mark.parametrize('options,labels,mixup', [
    ({}, 'teacher', 0.8),
    (dict(student='test_vit'), 'teacher', 0.8),
    (dict(batch_size=7), 'teacher', 0.),
    (dict(cutmix=0.5, mixup=0.1), 'teacher', 0.1),
    (dict(dearkd_labels='dataset'), 'dataset', 0.),
    (dict(kd_label_cache='labels'), 'dataset', 0.),
    (dict(bce_loss=True), 'dataset', 0.),
    (dict(kd_distill_type='logit'), 'dataset', 0.),
    (dict(dearkd_soft_labels=False), 'dataset', 0.),
    (dict(train_img_sizes=[32, 24], train_batch_sizes=[30, 15]), 'teacher', 0.),
    # what would be chosen anyway
    (dict(kd_distill_type='dearkd', bce_loss=False, aug_splits=0), 'teacher', 0.8),
    (dict(dearkd_labels='teacher'), 'teacher', 0.8),
    (dict(dearkd_soft_labels=True), 'teacher', 0.8),
    (dict(student='resnet18', img_size=32), 'dataset', 0.),  # no patches, so timm's distillation
])
def test_a_given_teacher_labels_mixed_images(options, labels, mixup, photos, distilled, tmp_path, monkeypatch):
    """Unless the user chooses the labels, or the student learns in another way than DearKD's."""
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(
            str(photos), teacher=str(distilled[0] / 'teacher'), output=str(tmp_path / 'out'), device='cpu', **options)
    args = timm_dearkd.train._parse_args(started[-1])[0]
    assert (args.dearkd_labels, args.dearkd_soft_labels, args.mixup) == (labels, labels == 'teacher', mixup)
    assert args.cutmix == (options.get('cutmix', 1.) if mixup else 0.)
    assert labels == 'dataset' or args.kd_temperature == 4. and args.mixup_prob == (0.5 if mixup else 1.)
    assert timm_dearkd.train._parse_args(['-c', str(distilled[0] / 'student' / 'args.yaml')])[0].mixup == 0.  # its own


def test_images_of_the_class_map_are_counted(photos, distilled, tmp_path, monkeypatch, caplog):
    """Two of the three classes, of 16 training images each."""
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: lambda: 1 / 0)
    (tmp_path / 'classes.txt').write_text('red\nblue\n')
    with caplog.at_level('INFO'), pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(
            str(photos), output=str(tmp_path / 'out'), device='cpu', class_map=str(tmp_path / 'classes.txt'))
    assert '32 for training and 8 for validation' in caplog.text and ' 2 classes' in caplog.text


def test_16_bit_images_are_refused(tmp_path, monkeypatch):
    """Also if they are asked for: timm's loader takes them modulo 256."""
    for name in 'ab':
        (tmp_path / 'deep' / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((9, 9), 9000 * i, dtype=np.uint16)).save(tmp_path / 'deep' / name / f'{i}.png')
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: lambda: 1 / 0)
    for options in (dict(), dict(input_img_mode='I;16', in_chans=1)):
        with pytest.raises(ValueError, match='Convert them to 8 bits'):
            timm_dearkd.distill(str(tmp_path / 'deep'), output=str(tmp_path / 'out'), device='cpu', **options)


def losses_of(folder):
    return [row['train_loss'] for row in read_summary(folder)]


def test_a_student_of_a_given_teacher(photos, distilled, tmp_path):
    """It is trained, returned by the same call again, and trained again by its args.yaml."""
    teacher = distilled[0] / 'teacher'
    call = (
        '-m', 'timm_dearkd', 'distill', photos, '--teacher', teacher, '--output', tmp_path, '--epochs', '2', '--device',
        'cpu', '-j', '0')
    results = [run_python(*call) for _ in range(2)]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert "only serve to check the order of the teacher's classes" in results[0].stderr
    assert 'trained already' in results[1].stderr
    tables = [[row.split('|')[1:4] for row in result.stdout.splitlines()[:4]] for result in results]
    assert tables[0] == tables[1] and tables[0][3][0].strip() == 'student'
    args = yaml.safe_load((tmp_path / 'student' / 'args.yaml').read_text())
    assert (args['dearkd_labels'], args['mixup'], args['batch_size'] % 2) == ('teacher', 0.8, 0)
    again = run_python(
        '-m', 'timm_dearkd', 'train', '-c', tmp_path / 'student' / 'args.yaml', '--resume', '', '--experiment', 'again')
    assert again.returncode == 0, again.stderr
    assert losses_of(tmp_path / 'again') == losses_of(tmp_path / 'student') and len(losses_of(tmp_path / 'again')) == 2


@pytest.mark.parametrize('text,options,epochs', [
    ('epochs: 3\n', {}, 3), ('epochs: 3\n', dict(epochs=4), 4), ('lr: 0.001\n', {}, 500),
    ('grad_accum_steps: 2\n', {}, 1000), ('epochs: 3\nauto_epochs: true\n', {}, 3)])
def test_epochs_of_a_file(text, options, epochs, photos, distilled, tmp_path, monkeypatch):
    """They count, and the recipe does not choose others. Two updates per epoch give 500 epochs for 1,000 updates."""
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    (tmp_path / 'mine.yaml').write_text(text)
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(
            str(photos), teacher=str(distilled[0] / 'teacher'), output=str(tmp_path / 'out'), device='cpu',
            config=tmp_path / 'mine.yaml', **options)
    args = timm_dearkd.train._parse_args(started[-1])[0]
    assert (args.epochs, args.auto_epochs, args.warmup_epochs) == (epochs, False, max(1, epochs // 20))


def test_a_grey_cnn_of_a_file_of_weights(tmp_path, monkeypatch):
    """Its architecture is one of three channels, and so is the normalisation of its configuration."""
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path / 'grey' / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'grey' / name / f'{i}.png')
    torch.save(timm.create_model('test_resnet', num_classes=2, in_chans=1).state_dict(), tmp_path / 'grey.pth')
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(
            str(tmp_path / 'grey'), 'test_resnet', output=str(tmp_path / 'out'), device='cpu',
            kd_teacher_checkpoint=str(tmp_path / 'grey.pth'))
    args = timm_dearkd.train._parse_args(started[-1])[0]
    assert args.in_chans == 1 and len(args.mean) == len(args.std) == 1
    main(['predict', str(tmp_path / 'grey'), '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'grey.pth'),
          '--output', str(tmp_path / 'p'), '--workers', '0'])
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 17


def test_the_time_is_estimated_on_the_device_of_the_run(monkeypatch):
    """The model is moved there, here to a device that computes nothing."""
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda device: None)
    monkeypatch.setattr(timm_dearkd.api, 'Precision', lambda *_: SimpleNamespace(autocast=contextlib.nullcontext))
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    args = SimpleNamespace(batch_size=4, in_chans=3, img_size=32, amp=False, epochs=2, val_interval=1)
    images = SimpleNamespace(num_validation=3, epoch_length=8)
    assert timm_dearkd.api.estimate_minutes(SimpleNamespace(args=args), task, images, torch.device('meta')) > 0


@pytest.mark.parametrize('seconds, workers, device, minutes', [
    (0.1, 2, 'cpu', 3 + 25), (0.1, 1, 'meta', 50), (0.01, 2, 'cpu', 3 + 2.5), (0.01, 0, 'meta', 3 + 5)])
def test_the_expected_time_includes_that_of_reading(seconds, workers, device, minutes, monkeypatch, caplog):
    """30,000 images. On a CPU, reading and training share the cores."""
    monkeypatch.setattr(timm_dearkd.api, 'build_task', lambda *_: None)
    monkeypatch.setattr(timm_dearkd.api, 'estimate_minutes', lambda *_: 3.)
    args = SimpleNamespace(epochs=100, val_interval=4, img_size=32, workers=workers, dearkd_labels='dataset')
    step = SimpleNamespace(name='student', args=args, describe=lambda: '')
    for side in (64, 500):
        caplog.clear()
        images = Images(280, 280, 80, 2, side, False, [], read_seconds=seconds)
        with caplog.at_level('INFO'):
            timm_dearkd.api.log_step(step, images, None, torch.device(device))
        assert f'about {minutes:.0f} min.' in caplog.text
        assert ('a shorter side of 64 pixels' in caplog.text) == (seconds == 0.1 and side == 500)


def test_the_images_may_be_moved(photos, distilled, tmp_path):
    """The split gets new links, and a finished run is returned. Another folder with the same names is refused."""
    output, moved = copy_of(distilled, tmp_path / 'out'), tmp_path / 'moved'
    shutil.copytree(photos, moved)
    with pytest.raises(ValueError, match='not a split of the images'):  # a copy, beside the images
        timm_dearkd.distill(moved, output=output, epochs=4, device='cpu', workers=0)
    split = output / 'data' / 'split.json'
    split.write_text(split.read_text().replace(str(photos), str(tmp_path / 'gone')))
    run = timm_dearkd.distill(moved, output=output, epochs=4, device='cpu', workers=0)
    assert run.folder == output / 'student'
    links = list((output / 'data').rglob('*.jpg'))
    assert len(links) == 60 and all(moved in link.resolve().parents for link in links)
    moved.rename(tmp_path / 'other')
    Image.new('RGB', (99, 99)).save(next((tmp_path / 'other').rglob('*.jpg')))
    before = {link: link.readlink() for link in links}
    with pytest.raises(ValueError, match='not a split of the images'):
        timm_dearkd.distill(tmp_path / 'other', output=output, epochs=4, device='cpu', workers=0)
    assert {link: link.readlink() for link in links} == before


def test_the_student_of_a_folder_is_not_that_of_another_one_with_equal_names_and_sizes(distilled, tmp_path):
    """Bitmaps of one size, with splits of their own. The folder may be moved, though."""
    for place, split, name in itertools.product('ab', ('train', 'validation'), 'xy'):
        folder = tmp_path / place / 'photos' / split / name
        folder.mkdir(parents=True)
        for i in range(15):
            Image.new('RGB', (8, 8), (ord(place), i, 0)).save(folder / f'{i}.bmp')
    options = dict(epochs=1, output=tmp_path / 'out', device='cpu', workers=0)
    folder = timm_dearkd.distill(tmp_path / 'a' / 'photos', **options).folder
    with pytest.raises(ValueError, match='other options: data .*a.photos → .*b.photos'):
        timm_dearkd.distill(tmp_path / 'b' / 'photos', **options)
    (tmp_path / 'a').rename(tmp_path / 'c')
    assert timm_dearkd.distill(tmp_path / 'c' / 'photos', **options).folder == folder


def test_the_cnn_sees_the_students_images(photos, tmp_path, monkeypatch):
    """The same part of them, in the same precision and with as many channels; and no mirror images."""
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    shared = dict(
        train_fraction=0.5, fraction_seed=1, in_chans=1, input_img_mode='L', deterministic=True, seed=3)
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(
            str(photos), teacher='test_resnet', output=str(tmp_path / 'out'), device='cpu', **shared)
    argv, = started
    args = timm_dearkd.train._parse_args(argv)[0]
    assert (args.model, args.hflip, args.experiment) == ('test_resnet', 0., 'teacher')
    assert {name: getattr(args, name) for name in shared} == shared


def test_a_finished_student_needs_no_teacher(photos, distilled, tmp_path, monkeypatch, caplog):
    """It is returned although the CNN's folder is gone, unless files of the last epoch are missing."""
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: lambda: 1 / 0)
    output = copy_of(distilled, tmp_path / 'out')
    (output / 'teacher').rename(tmp_path / 'moved')
    options = dict(output=str(output), device='cpu', workers=0)
    assert timm_dearkd.distill(str(photos), epochs=4, **options).summary()['student'] > 0
    with pytest.raises(ValueError, match='kd_model_name'):  # another teacher, before one is trained
        timm_dearkd.distill(str(photos), teacher=str(tmp_path / 'moved'), epochs=4, **options)
    (tmp_path / 'moved').rename(output / 'teacher')
    (output / 'student' / 'model_best.safetensors').unlink()
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(str(photos), epochs=4, **options)


def test_epochs_after_the_schedule_are_trained(photos, distilled, tmp_path, monkeypatch):
    """A student of 4 epochs and a cool-down may not be finished after 4."""
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: lambda: 1 / 0)
    output = copy_of(distilled, tmp_path / 'out')
    args = output / 'student' / 'args.yaml'
    args.write_text(args.read_text().replace('cooldown_epochs: 0', 'cooldown_epochs: 1'))
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(str(photos), output=str(output), epochs=4, cooldown_epochs=1, device='cpu', workers=0)


def test_the_size_of_a_teacher_of_weights_alone_is_a_guess(photos, tmp_path, monkeypatch, caplog):
    """Which is told. It is that of the architecture, 160 pixels."""
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'cnn.pth')
    options = dict(kd_teacher_checkpoint=str(tmp_path / 'cnn.pth'), output=str(tmp_path / 'out'), device='cpu')
    for size, told in (({}, True), (dict(kd_teacher_img_size=48), False)):
        caplog.clear()
        with pytest.raises(ZeroDivisionError):
            timm_dearkd.distill(str(photos), teacher='test_resnet', **options, **size)
        assert ('does not tell at which size the teacher was trained. It sees 160 pixels' in caplog.text) == told
        assert timm_dearkd.train._parse_args(started[-1])[0].kd_teacher_img_size == (160 if told else 48)


def test_a_teacher_in_another_order_ends_the_run_and_its_remedy_works_in_the_same_folder(cnn, image_folder, tmp_path):
    """No epoch of a student that learns the wrong answers is trained. The folder is not in the way of the next call."""
    model = timm.create_model(f'local-dir:{cnn}', pretrained=True)
    with torch.no_grad():
        for parameter in model.fc.parameters():
            parameter.copy_(parameter[[1, 2, 0]].clone())
    del model.pretrained_cfg['label_names']
    timm.models.save_for_hf(model, tmp_path / 'turned')
    student, options = tmp_path / 'out' / 'student', dict(epochs=1, device='cpu', workers=0, output=tmp_path / 'out')
    with pytest.raises(TrainingError, match=f'--kd-class-map {student}/kd_class_map.txt. The student would learn'):
        timm_dearkd.distill(image_folder, tmp_path / 'turned', **options)
    assert not list(student.glob('*.pth.tar')) and not (student / 'summary.csv').exists()
    run = timm_dearkd.distill(
        image_folder, tmp_path / 'turned', kd_class_map=student / 'kd_class_map.txt', **options)
    assert run.summary()['teacher'] > 80 and (student / 'last.pth.tar').exists()


def test_a_run_that_was_told_to_stop_early_goes_on(photos, distilled, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: lambda: 1 / 0)
    output = copy_of(distilled, tmp_path / 'out')
    args = output / 'student' / 'args.yaml'
    args.write_text(args.read_text().replace('stop_epoch: null', 'stop_epoch: 3'))
    lines = (output / 'student' / 'summary.csv').read_text().splitlines(keepends=True)
    (output / 'student' / 'summary.csv').write_text(''.join(lines[:-1]))
    with pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(str(photos), output=str(output), epochs=4, device='cpu', workers=0)


def test_the_recipe_fills_in_what_the_users_file_leaves_open(photos, distilled, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: started.append(argv) or (lambda: 1 / 0))
    for text, lr, batch in (('lr: 0.001\nbatch_size: 6\n', 0.001, 6), ('', 2e-3, 24)):
        (tmp_path / 'mine.yaml').write_text(text)
        with pytest.raises(ZeroDivisionError):
            timm_dearkd.distill(
                str(photos), teacher=str(distilled[0] / 'teacher'), output=str(tmp_path / 'out'), device='cpu',
                config=tmp_path / 'mine.yaml')
        args = timm_dearkd.train._parse_args(started[-1])[0]
        assert (args.opt, args.weight_decay, args.lr, args.batch_size) == ('adamw', 0.05, lr, batch)


def test_grey_images_are_announced_with_one_mean(tmp_path, monkeypatch, caplog):
    for name in 'ab':
        (tmp_path / 'grey' / name).mkdir(parents=True)
        for i in range(5):
            Image.new('L', (9, 9), 20 * i).save(tmp_path / 'grey' / name / f'{i}.png')
    monkeypatch.setattr(timm_dearkd.train, 'prepare', lambda argv: lambda: 1 / 0)
    with caplog.at_level('INFO'), pytest.raises(ZeroDivisionError):
        timm_dearkd.distill(str(tmp_path / 'grey'), output=str(tmp_path / 'out'), device='cpu')
    chosen = [line for line in caplog.messages if 'in chans 1' in line]
    assert len(chosen) == 2 and all('mean 0.5, std 0.5' in line for line in chosen)


def test_train_py_repeats_the_student(distilled, tmp_path):
    """From its args.yaml, with the same losses."""
    output, _ = distilled
    result = run_python(
        '-m', 'timm_dearkd', 'train', '-c', output / 'student' / 'args.yaml', '--output', tmp_path, '--resume', '',
        '--experiment', 'again', '--stop-epoch', '2')
    assert result.returncode == 0, result.stderr
    assert losses_of(output / 'student')[:2] == losses_of(tmp_path / 'again')


@pytest.mark.parametrize('args,message', [
    (['no folder'], "No folder 'no folder'"),
    (['--epochs', '4', 'PHOTOS'], 'Give the folder first'),
    (['PHOTOS', '--student', 'dearkd_smal'], "Unknown student 'dearkd_smal'. The nearest names: dearkd_small"),
    (['PHOTOS', '--kd-model-name', 'resnet18'], "does not take 'kd_model_name'. Give teacher"),
    (['PHOTOS', '--output', 'DONE', '--epochs', '4', '--lr', '1'], 'other options: lr 0.002 → 1.0'),
    (['PHOTOS', '--output', 'DONE', '--epochs', '4', '--teacher', 'CNN', '--student', 'test_vit'], 'other options'),
    (['PHOTOS', '--teacher', 'resnet999'], 'The nearest names: resnet'),
    (['PHOTOS', '--teacher', 'nowhere/cnn'], 'a run folder, hf-hub:ORG/NAME, or a name of timm.'),
    (['PHOTOS', '--kd-teacher-checkpoint', 'cnn.pth'], 'Name their architecture with --teacher'),
    (['PHOTOS', '--kd-teacher-mean', '0.5'], 'are for a trained CNN, and distill trains this one'),
    (['PHOTOS', 'photos'], 'in quotes if its name has spaces'),
    (['PHOTOS', '--img-size', '32', '33'], "Unexpected argument '33'"),
    (['PHOTOS', '--student', 'vit_tiny_patch16_224.foo'], "Unknown student 'vit_tiny_patch16_224.foo'"),
    (['PHOTOS', '--student', 'resnet18', '--img-size', '32', '--kd-distill-type', 'dearkd'], 'no content tokens'),
    (['PHOTOS', '--dearkd-hooks', '99'], '99'),
    (['ONE'], 'has one class'),
    (['SPLITS'], 'named like splits: test, train'),
    (['PHOTOS', '--student', 'resnet18', '--img-size', '32', '--teacher', 'CNN', '--kd-distill-type', 'dearkd'],
     'no content tokens'),
    (['PHOTOS', '--lr', 'much'], '--lr'),
    # before the CNN is trained, which does not take these
    (['PHOTOS', '--batch-size', '64'], '48 images, less than one batch of 64'),
    (['PHOTOS', '--opt', 'adamww'], 'adamww'),
    (['PHOTOS', '--aa', 'nonsense'], '--aa'),
    (['PHOTOS', '--teacher', 'WEIGHTS'], 'and the file: --kd-teacher-checkpoint '),
    (['PHOTOS', '--teacher', 'DONE'], 'Give one of the run folders in it: '),
    (['EMPTY'], 'No images'),
])
def test_errors_are_one_line_and_status_2(args, message, photos, distilled, tmp_path):
    (tmp_path / 'empty').mkdir()
    for folder in ('one/photos', 'splits/train', 'splits/test'):
        shutil.copytree(photos / 'red', tmp_path / folder)
    torch.save({}, tmp_path / 'weights.pth')
    places = {
        'PHOTOS': photos, 'CNN': distilled[0] / 'teacher', 'DONE': distilled[0], 'EMPTY': tmp_path / 'empty',
        'ONE': tmp_path / 'one', 'SPLITS': tmp_path / 'splits',
        'WEIGHTS': tmp_path / 'weights.pth'}
    output = () if '--output' in args else ('--output', tmp_path / 'out')
    result = run_python(
        '-m', 'timm_dearkd', 'distill', *(places.get(arg, arg) for arg in args), *output, '--device', 'cpu')
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith('timm-dearkd distill: error: ') and message in last and 'Traceback' not in result.stderr
    assert not (tmp_path / 'out' / 'student').exists() and not (tmp_path / 'out' / 'teacher').exists()


def test_digits_are_not_mirrored(tmp_path):
    """A CNN that tells left from right keeps its student from mirrored images; one that does not lets it have them."""
    class LeftOrRight(torch.nn.Module):
        pretrained_cfg = dict(
            input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1., interpolation='nearest')

        def __init__(self, direction):
            super().__init__()
            self.direction = torch.nn.Parameter(direction)

        def forward(self, x):
            score = (x.mean((1, 2)) * self.direction).sum(1)
            return torch.stack([score, -score], 1)

    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / f'{i}.png')
    paths = [str(tmp_path / f'{i}.png') for i in range(8)] + [str(tmp_path / 'missing.png')]
    odd, even = torch.linspace(-1, 1, 8), torch.ones(8)
    assert not is_mirrored_alike(LeftOrRight(odd), paths, 8, 'RGB')
    assert is_mirrored_alike(LeftOrRight(even), paths, 8, 'RGB')
    small = LeftOrRight(torch.linspace(-1, 1, 4))  # sees the images of a student of 4 pixels, in CMYK
    small.pretrained_cfg = dict(small.pretrained_cfg, input_size=(4, 8, 8), mean=(0.5,) * 4, std=(0.5,) * 4)
    assert not is_mirrored_alike(small, paths, 4, 'CMYK')


def test_help_lists_every_command_once():
    result = run_python('-m', 'timm_dearkd', '--help')
    assert result.returncode == 0
    names = [name for commands in COMMANDS.values() for name in commands]
    for name in names:
        assert sum(line.strip().startswith(f'{name} ') for line in result.stdout.splitlines()) == 1


def test_the_recipe_chooses_the_epochs_unless_they_are_given(image_folder, tmp_path):
    """`-c small_folder` of train.py: 1,000 updates of 15 images for 45 images."""
    common = (
        '-m', 'timm_dearkd', 'train', image_folder, '-c', 'small_folder', '--model', 'test_dearkd', '--img-size', '32',
        '--device', 'cpu', '-j', '0', '-b', '15', '--stop-epoch', '1', '--output', tmp_path, '--experiment')
    for name, given, epochs in (('auto', (), 334), ('given', ('--epochs', '7'), 7)):
        result = run_python(*common, name, *given)
        assert result.returncode == 0, result.stderr
        assert (f'--auto-epochs: {epochs} epochs' in result.stderr) == (name == 'auto')
        assert len(read_summary(tmp_path / name)) == 1


@pytest.mark.parametrize('command', ['distill', 'train', 'data-free', 'predict', 'push', 'export', 'run'])
def test_every_command_has_its_help(command):
    result = run_python('-m', 'timm_dearkd', command, '--help')
    assert result.returncode == 0 and 'usage:' in result.stdout


def test_an_unknown_command_is_one_line():
    result = run_python('-m', 'timm_dearkd', 'destill')
    assert result.returncode == 2
    assert "'destill'" in result.stderr and 'distill, train' in result.stderr and len(result.stderr.splitlines()) == 1


def test_batches_are_even_and_waste_few_images():
    """Mixup pairs the images of a batch up."""
    assert [choose_batch_size(count) for count in (1, 2, 23, 48, 125, 600, 1500)] == [1, 2, 22, 24, 30, 30, 30]


def test_the_share_of_a_class_is_rounded_as_in_training(tmp_path):
    """Half of 5 images is 2."""
    for split, count in (('train', 5), ('validation', 1)):
        for name in 'abcdefghij':
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new('L', (8, 8)).save(tmp_path / split / name / f'{i}.png')
    images = inspect_images(str(tmp_path), 'train', 'validation', 0.5)
    longer = inspect_images(str(tmp_path), 'train', 'validation', 0.5, keep_length=True)
    assert (images.epoch_length, longer.num_train, longer.epoch_length) == (20, 20, 50)
    kept = ClassFraction(create_dataset('', str(tmp_path), split='train'), 0.5)
    assert images.num_train == len(kept) == 20


def test_the_rate_of_the_nano_model_is_its_own():
    """Other models of timm are called nano, too."""
    images = Images(100, 100, 20, 2, 32, False, [])
    names = ('dearkd_nano_patch4_32', 'convnextv2_nano', 'vit_tiny_patch16_224')
    assert [choose_student(name, images, torch.device('cpu'))['lr'] for name in names] == [2e-3, 5e-4, 5e-4]


def test_fewer_images_get_more_epochs_and_fewer_updates():
    counts = (24, 48, 125, 600, 1500, 6000, 50000)
    epochs = [epochs_for(count, count // 24) for count in counts]
    updates = [number * (count // 24) for count, number in zip(counts, epochs)]
    assert epochs == sorted(epochs, reverse=True) and updates == sorted(updates) and updates[0] == 1000


@pytest.mark.parametrize('change', ['move', 'remove', 'replace'])
def test_a_finished_student_of_other_images_is_not_returned(change, distilled, tmp_path):
    """The splits are the folder's own. Without a change, the student is returned."""
    output = copy_of(distilled, tmp_path / 'out')
    call = dict(output=str(output), epochs=4, device='cpu', workers=0)
    assert timm_dearkd.distill(str(output / 'data'), **call).num_epochs == 4
    image = next((output / 'data' / 'validation' / 'blue').iterdir())
    if change == 'move':
        image.rename(output / 'data' / 'validation' / 'red' / 'moved.jpg')
    else:
        image.unlink()
    if change == 'replace':
        Image.new('RGB', (9, 9)).save(image)
    with pytest.raises(ValueError, match='The images in validation have changed since the run .* Set another --output'):
        timm_dearkd.distill(str(output / 'data'), **call)


def test_a_class_without_readable_images_is_refused(photos, tmp_path):
    shutil.copytree(photos, tmp_path / 'photos')
    for path in (tmp_path / 'photos' / 'red').iterdir():
        path.write_bytes(b'ftypheic')
    with pytest.raises(ValueError, match=r'No image of a class can be read: .*red.*cannot identify.*remove the class'):
        timm_dearkd.distill(str(tmp_path / 'photos'), output=str(tmp_path / 'out'), device='cpu')
