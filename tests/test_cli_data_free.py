"""python -m timm_dearkd.data_free as users run it, on a small CNN."""
import csv
import json
import os
import shlex
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import run_process, run_python, run_ranks, start_forked
from PIL import Image

from timm_dearkd.commands import run_command
from timm_dearkd.data_free import __main__ as data_free
from timm_dearkd.data_free import generator
from timm_dearkd.data_free.__main__ import advise, main, run_script
from timm_dearkd.data_free.classes import match_student
from timm_dearkd.data_free.generator import GENERATOR_WEIGHTS, GeneratorInverter
from timm_dearkd.data_free.inversion import Inverter, LossWeights, Resolution, batch_targets
from timm_dearkd.data_free.options import build_parser, fill_defaults
from timm_dearkd.data_free.student import student_flags
from timm_dearkd.distances import read_log
from timm_dearkd.engine.loader import build_distance_images, build_eval_loader
from timm_dearkd.engine.process import SINGLE
from timm_dearkd.train import _parse_args

QUICK = (
    '--resolutions', '16:6:0.2', '32:6:0.1', '--classes-per-batch', '2', '--images-per-class', '3', '--device', 'cpu')
GENERATOR = ('--generator', '--resolutions', '32:2:0.01', '--bn-weight', '2')  # for behind QUICK


@pytest.fixture(scope='module')
def make(cnn):
    """The command on the CNN that knows three classes, with further arguments."""
    def run(out, *args, run=run_python, launcher=(), **kwargs):
        return run(*launcher, '-m', 'timm_dearkd.data_free', out, '--model', cnn, *QUICK, *args, **kwargs)
    return run


@pytest.fixture(scope='module')
def whole(make, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole') / 'images'
    result = make(out, '--num-images', '24', run=run_process)
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.fixture(scope='module')
def generated(make, tmp_path_factory):
    out = tmp_path_factory.mktemp('generated') / 'images'
    result = make(out, '--num-images', '24', *GENERATOR)
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.fixture(scope='module', params=['pixels', 'generator'])
def either(request):
    """A set of each kind, what the command printed, and its flags."""
    name, flags = {'pixels': ('whole', ()), 'generator': ('generated', GENERATOR)}[request.param]
    return (*request.getfixturevalue(name), flags)


@pytest.fixture
def small_pilot(monkeypatch):
    monkeypatch.setattr(generator, 'BATCH_SIZE', 12)
    monkeypatch.setattr(data_free, 'BATCH_SIZE', 12)


def pixels(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).tobytes() for p in (folder / 'train').rglob('*.png')}


def test_what_is_written(either):
    out, result, flags = either
    manifest = json.loads((out / 'manifest.json').read_text())
    images = manifest['images']
    assert len(images) == 24 and not manifest['verified'] and not manifest['failed_batches']
    assert {(image['class'], image['target']) for image in images} == {('blue sky', 0), ('grass', 1), ('rust', 2)}
    assert sorted(sum(image['target'] == target for image in images) for target in range(3)) == [6, 9, 9]
    files = {f'train/{image["class"]}/{image["name"]}.png' for image in images if image['kept']}
    assert set(pixels(out)) == files and len(files) == 24
    for key in ('model', 'seed', 'diversity', 'bn_weight', 'resolutions', 'versions'):
        assert key in manifest['settings']
    with (out / 'losses.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert {row['batch'] for row in rows} == {'0', '1', '2', '3'}
    assert {row['step'] for row in rows} == ({'2'} if flags else {'6', '12'})
    sheet = np.asarray(Image.open(out / 'samples.png'))
    assert sheet.shape == (3 * 34, 90 + 8 * 34, 3)
    first = min(image['name'] for image in images if image['target'] == 1)
    stored = np.asarray(Image.open(out / 'train' / 'grass' / f'{first}.png'))
    np.testing.assert_array_equal(sheet[34:66, 90:122], stored)  # the second row's first
    assert Image.open(out / 'losses.png').size[0] > 500
    assert manifest['seconds'] > 0
    assert '24 of 24 images kept' in result.stdout
    sure = sum(image['teacher_prob'] > 0.5 for image in images)
    assert f'gives {100 * sure / 24:.0f} % of the images a probability above 0.5' in result.stdout
    assert ('does not recognise most images' in result.stderr) == (sure < 12)
    assert not [p for p in out.rglob('*') if 'tmp' in p.name]


def test_probabilities_are_those_of_the_files(whole, cnn):
    out, _ = whole
    model = timm.create_model(f'local-dir:{cnn}', pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    for image in json.loads((out / 'manifest.json').read_text())['images'][:5]:
        array = np.asarray(Image.open(out / 'train' / image['class'] / f'{image["name"]}.png'), dtype=np.float64) / 255
        x = torch.from_numpy((array - config['mean']) / config['std']).permute(2, 0, 1).float().unsqueeze(0)
        with torch.no_grad():
            assert model(x).softmax(1)[0, image['target']].item() == pytest.approx(image['teacher_prob'], abs=1e-3)


def test_killed_and_resumed(either, make, tmp_path):
    whole, _, flags = either
    out = tmp_path / 'images'
    process = make(out, '--num-images', '24', *flags, run=start_forked)
    while not (out / 'batches' / '000000.json').exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / 'manifest.json').exists()
    result = make(out, '--num-images', '24', *flags, '--resume')
    assert result.returncode == 0, result.stderr
    assert 'Pilot' not in result.stderr
    assert pixels(out) == pixels(whole)
    assert (out / 'losses.csv').read_text() == (whole / 'losses.csv').read_text()


def test_two_processes_make_the_same_images(either, make, tmp_path):
    whole, _, flags = either
    result = make(tmp_path / 'images', '--num-images', '24', *flags, run=run_ranks)
    assert result.returncode == 0, result.stderr
    assert pixels(tmp_path / 'images') == pixels(whole)
    settings, same = (json.loads((folder / 'settings.json').read_text()) for folder in (tmp_path / 'images', whole))
    assert settings == same


def test_the_pilot_of_a_generator_is_in_the_settings(generated):
    out, result = generated
    settings = json.loads((out / 'settings.json').read_text())
    assert settings['bn_norm'] == 'averaged' and settings['diversity'] == 'none' and settings['bn_weight'] == 2.
    assert 'Pilot: --bn-weight 2. ' in result.stderr
    assert ('Images are mirrored' in result.stderr) == settings['mirror'] == ('--hflip 0' not in result.stdout)


@pytest.mark.parametrize('diversity, scaled', [('intra', ('ep', 'triplet')), ('adi', ('adi',))])
def test_a_generator_resumed_for_more_images(diversity, scaled, cnn, tmp_path, caplog, small_pilot):
    """A small set is one batch. More images have batches of the same size, the first of which is kept."""
    caplog.set_level('INFO')
    out = tmp_path / 'images'
    student = ['--student', 'test_resnet', '--student-checkpoint', str(cnn / 'last.pth.tar')]
    argv = [str(out), '--model', str(cnn), *GENERATOR, '--device', 'cpu', '--diversity', diversity,
            *(student if diversity == 'adi' else ())]
    main([*argv, '--num-images', '12'])
    settings, first = json.loads((out / 'settings.json').read_text()), pixels(out)
    chosen = ', '.join(f'--{name}-weight {settings[f"{name}_weight"]:g}' for name in scaled)
    assert f'Pilot: --bn-weight 2, {chosen}. ' in caplog.text
    for name in scaled:
        scale = settings[f'{name}_weight'] / getattr(LossWeights(), name)
        assert any(scale == pytest.approx(tried) for tried in generator.PILOT_SCALES)
    assert len(first) == 12 and 'rounded up' not in caplog.text
    caplog.clear()
    main([*argv, '--num-images', '24', '--resume'])
    assert 'Pilot' not in caplog.text and 'rounded up' not in caplog.text
    assert len(pixels(out)) == 24 and first.items() <= pixels(out).items()
    again = json.loads((out / 'settings.json').read_text())
    assert again == {**settings, 'num_images': 24} and settings['images_per_class'] == 4


def test_train_reads_them(whole, train_cli, cnn, tmp_path):
    out, _ = whole
    result = train_cli(
        '--kd-model-name', cnn, '--val-split', '', '--output', tmp_path, '--experiment', 'x', data=out)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['label_names'] == ['blue sky', 'grass', 'rust']


@pytest.mark.slow
def test_shards_hold_the_same_images(whole, make, train_cli, tmp_path):
    pytest.importorskip('webdataset')
    out = tmp_path / 'images'
    result = make(out, '--num-images', '24', '--format', 'wds')
    assert result.returncode == 0, result.stderr
    dataset = timm.data.create_dataset('wds/', root=str(out), split='train', batch_size=1)
    read = sorted((label, image.tobytes()) for image, label in dataset)
    names = sorted(path.name for path in (whole[0] / 'train').iterdir())
    assert read == sorted((names.index(name.split('/')[1]), content) for name, content in pixels(whole[0]).items())
    assert (out / 'samples.png').read_bytes() == (whole[0] / 'samples.png').read_bytes()
    command = shlex.split(result.stdout.split('Train on them: timm-dearkd train ')[1].splitlines()[0])
    result = train_cli(
        *command[1:], '--val-split', 'train', '--epochs', '1', '--batch-size', '8', '--workers', '2',
        '--track-attention-distance', '--report', '--output', tmp_path, '--experiment', 'x', data=out)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['label_names'] == names
    assert read_log(tmp_path / 'x').epochs.keys() == {0} and 'could not be' not in result.stderr
    assert '24 validation images' in (tmp_path / 'x' / 'report.html').read_text()


def test_looking_at_a_stream_leaves_it_as_it_was(whole, make, tmp_path):
    """The workers of the validation share its images, which one that had begun before would not."""
    pytest.importorskip('webdataset')
    result = make(tmp_path, '--num-images', '24', '--format', 'wds')
    assert result.returncode == 0, result.stderr
    args, _ = _parse_args([
        '--data-dir', str(tmp_path), '--dataset', 'wds/', '--val-split', 'train', '--workers', '2',
        '--track-attention-distance', '--model', 'test_vit', '--img-size', '32'])
    model = timm.create_model('test_vit', img_size=32)
    config = timm.data.resolve_model_data_config(model)
    eval_set = timm.data.create_dataset('wds/', root=str(tmp_path), split='train', batch_size=4)
    images = build_distance_images(args, eval_set, config, model, torch.device('cpu'))
    assert len(images) == 24
    loader = build_eval_loader(args, eval_set, config, torch.device('cpu'), SINGLE)
    assert sum(len(labels) for _, labels in loader) == 24


@pytest.mark.parametrize('flags', [(), GENERATOR], ids=['pixels', 'generator'])
def test_a_verifier_keeps_what_it_believes(flags, make, cnn, tmp_path):
    """Its probability of the stored image is in the manifest, and decides."""
    result = make(
        tmp_path / 'images', '--num-images', '12', '--verifier', 'test_resnet', '--verifier-checkpoint',
        cnn / 'last.pth.tar', '--min-prob', '0.34', '--diversity', 'none', *flags)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / 'images' / 'manifest.json').read_text())
    assert manifest['verified']
    for image in manifest['images']:
        assert image['verifier_prob'] == pytest.approx(image['teacher_prob'], abs=2e-3)
        assert image['kept'] == (image['verifier_prob'] >= 0.34)
    assert len(pixels(tmp_path / 'images')) == sum(image['kept'] for image in manifest['images'])


def test_some_classes_and_a_competitor(make, train_cli, cnn, tmp_path):
    """The class map brings the CNN's classes to the student."""
    out = tmp_path / 'images'
    result = make(
        out, '--num-images', '7', '--classes', '0', '2', '--diversity', 'adi', '--student', 'test_resnet',
        '--student-checkpoint', cnn / 'last.pth.tar')
    assert result.returncode == 0, result.stderr
    assert '--num-images 7 is rounded up to 12' in result.stderr
    assert '12 of 12 images kept (7 requested, in whole batches)' in result.stdout
    assert (out / 'kd_class_map.txt').read_text() == '0 blue sky\n2 rust\n'
    assert f'--kd-class-map {out}/kd_class_map.txt' in result.stdout
    result = train_cli(
        '--kd-model-name', cnn, '--kd-class-map', out / 'kd_class_map.txt', '--val-split', '', '--epochs', '1',
        '--output', tmp_path, '--experiment', 'x', data=out)
    assert result.returncode == 0, result.stderr


ERRORS = {
    'model': (['--model', 'resnet26x'], 'nearest timm names'),
    'class': (['--classes', '1', '3'], 'class 3, but the CNN has classes 0 to 2'),
    'class form': (['--classes', 'x'], "'x', expected an index"),
    'range': (['--classes', '2-1'], 'whose end is before'),
    'form': (['--resolutions', '32:5'], "'32:5' is not SIZE:STEPS:LR"),
    'without intra': (
        ['--diversity', 'none', '--margin', '2'],
        '--margin 2.0 has an effect only with --diversity intra. Remove --margin, or run the command with'),
    'no intra': (['--generator', '--ep-weight', '0.1'], '--ep-weight 0.1 has an effect only with --diversity intra'),
    'without adi': (['--adi-temperature', '3'], '--adi-temperature 3.0 has an effect only with --diversity adi'),
    'a student without adi': (['--student', 'test_vit'], '--student test_vit has an effect only with --diversity adi'),
    'weights of no student': (
        ['--diversity', 'adi', '--student-checkpoint', 'FOUR'], 'has an effect only with --student NAME'),
    'mean': (['--mean', '0.5', '0.5'], '--mean has 2 values, expected 1, or 3 for its channels'),
    'percent': (['--verifier', 'test_vit', '--min-prob', '10'], '--min-prob: 10, expected 0 to 1'),
    'without verifier': (['--min-prob', '0'], '--min-prob 0.0 has an effect only with --verifier NAME'),
    'jitter of a generator': (['--generator', '--jitter', '2'], '--jitter 2 has an effect only without --generator'),
    'two sizes': (['--img-size', '32'], '--img-size 32 has an effect only without --resolutions'),
    'no image': (['--num-images', '0'], 'expected 1 or more'),
    'no images': (['--images-per-class', '0'], 'expected 1 or more'),
    'compile': (['--torchcompile', 'gcc'], "--torchcompile is 'gcc', expected one of"),
    'jitter': (['--jitter', '-1'], 'expected 0 or more'),
    'betas': (['--betas', '0.9', '1.5'], "argument --betas: 1.5, expected 0 or more, less than 1"),
    'beta': (['--betas', 'x', '0.9'], "argument --betas: invalid float value: 'x'"),
    'weights': (['--model', 'resnet18'], 'Name a trained checkpoint of it'),
    'student classes': (
        ['--diversity', 'adi', '--student', 'test_vit', '--student-checkpoint', 'FOUR'],
        '--student has 4 classes, the CNN 3'),
    'size of the student': (
        ['--diversity', 'adi', '--student', 'levit_128s', '--student-checkpoint', 'LEVIT'],
        '--student does not take images of 16 pixels'),
    'verifier classes': (
        ['--verifier', 'test_vit', '--verifier-checkpoint', 'FOUR'], '--verifier has 4 classes, the CNN 3'),
    'channels': (['--model', 'test_resnet', '--checkpoint', 'FIVE'], 'takes 5 channels'),
    'no norm': (
        ['--model', 'test_vit', '--checkpoint', 'VIT', '--resolutions', '160:5:0.1'], 'has no BatchNorm layers'),
    'student': (['--diversity', 'adi'], "'adi' needs a student"),
    'names': (['--class-names', 'NAMES'], 'has 1 names, expected 3'),
    'generator': (['--generator'], '--generator has one phase'),
    'other run': (['OTHER', '--resume', '--seed', '1'], 'made with another seed'),
    'again': (['OTHER'], 'Add --resume'),
    'before the pilot': (['OTHER', '--generator', '--resolutions', '32:50:0.005'], 'Add --resume'),
    'not empty': (['FULL'], 'not a data set of this command'),
    'a file': (['FILE'], 'is not a writable folder'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors_are_one_line_and_status_2(case, whole, cnn, tmp_path, capsys):
    args, message = ERRORS[case]
    (tmp_path / 'names.txt').write_text('one\n')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').write_text('')
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), tmp_path / 'vit.pth')
    torch.save(timm.create_model('test_vit', num_classes=4).state_dict(), tmp_path / 'four.pth')
    if case == 'size of the student':
        torch.save(timm.create_model('levit_128s', num_classes=3).state_dict(), tmp_path / 'levit.pth')
    torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=5).state_dict(), tmp_path / 'five.pth')
    replaced = {'FIVE': tmp_path / 'five.pth', 'FOUR': tmp_path / 'four.pth', 'VIT': tmp_path / 'vit.pth',
                'NAMES': tmp_path / 'names.txt', 'OTHER': whole[0], 'FULL': tmp_path / 'full',
                'FILE': tmp_path / 'full' / 'file', 'LEVIT': tmp_path / 'levit.pth'}
    args = [str(replaced.get(a, a)) for a in args]
    if args[0].startswith('--'):
        args = [str(tmp_path / 'new'), *args]
    before = pixels(whole[0])
    with pytest.raises(SystemExit) as e:
        run_script([args[0], '--model', str(cnn), *QUICK, '--num-images', '24', *args[1:]])
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and 'data-free: error: ' in err[-1] and message in err[-1]
    assert 'Pilot' not in ' '.join(err)
    assert pixels(whole[0]) == before and not (tmp_path / 'new').exists()


def test_a_grey_cnn_and_a_class_without_images(tmp_path, capsys, caplog):
    """The class map has the classes that there are folders of; train.py takes what the command says."""
    caplog.set_level('INFO')
    grey = timm.create_model('test_resnet', in_chans=1, num_classes=3)
    torch.save(grey.state_dict(), tmp_path / 'grey.pth')
    out = tmp_path / 'images'
    main([
        str(out), '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'grey.pth'), '--mean', '0.25', *QUICK,
        '--num-images', '6'])
    assert 'The network gets images with the mean [0.25] and the deviation [0.5]' in caplog.text
    assert json.loads((out / 'settings.json').read_text())['normalisation'][0] == [0.25]
    said = capsys.readouterr().out
    present = sorted(path.name for path in (out / 'train').iterdir())
    assert len(present) == 2 and '1 of 3 classes have no image' in caplog.text
    assert (out / 'kd_class_map.txt').read_text() == ''.join(f'{name} {name}\n' for name in present)
    assert all(Image.open(path).mode == 'L' for path in (out / 'train').rglob('*.png'))
    command = shlex.split(said.split('timm-dearkd ')[1])
    assert command[command.index('-c'):][:4] == ['-c', 'data_free', '--model', 'dearkd_nano_patch4_32']
    assert command[command.index('--kd-teacher-mean') + 1] == '0.25' and '--kd-teacher-std' not in command
    result = run_python(
        '-m', 'timm_dearkd', *command, '--epochs', '1', '--train-batches-per-epoch', '2', '--device', 'cpu', '--output',
        tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('flags, total', [((), 24), (GENERATOR, 4)], ids=['pixels', 'generator'])
def test_progress_without_a_terminal(flags, total, cnn, tmp_path, caplog, monkeypatch, small_pilot):
    caplog.set_level('INFO')
    argv = ['--model', str(cnn), *QUICK, '--num-images', '12', *flags]
    main([str(tmp_path / 'fewer'), *argv])
    assert f'of {total} steps.' not in caplog.text  # a minute has not passed
    monkeypatch.setattr(data_free, 'LOG_INTERVAL', 0.)
    main([str(tmp_path / 'images'), *argv])
    steps = [int(text.split()[0]) for text in caplog.messages if f'of {total} steps.' in text]
    assert steps == sorted(steps) and steps[-1] == total


@pytest.mark.parametrize('size,model,student_size,patch,teacher_size', [
    (8, 'dearkd_nano_patch4_32', 32, 4, 8),
    (33, 'dearkd_nano_patch4_32', 32, 4, None),
    (64, 'dearkd_nano_patch4_32', 64, 8, None),
    (100, 'dearkd_nano_patch4_32', 96, 12, None),
    (192, 'dearkd_tiny_patch16_224', 224, 16, None),
    (384, 'dearkd_tiny_patch16_224', 224, 16, 384),
])
def test_the_student_sees_images_of_about_the_size_that_the_cnn_knows(size, model, student_size, patch, teacher_size):
    args, _ = _parse_args(['DATA', *shlex.split(student_flags(size))])
    shape = dict(img_size=args.img_size) if args.img_size else {}
    student = timm.create_model(args.model, **shape, **args.model_kwargs)
    assert args.model == model and args.kd_teacher_img_size == teacher_size
    assert student.patch_embed.img_size == (student_size,) * 2 and student.patch_embed.patch_size == (patch,) * 2


@pytest.mark.parametrize('num_classes, num_images', [(3, 500), (10, 8640), (100, 600), (200, 8000), (1000, 50000)])
def test_a_generator_makes_images_of_all_classes(num_classes, num_images):
    """Batches are as large as the classes allow, and they are about as many images as were asked for."""
    args = build_parser().parse_args(['out', '--model', 'cnn', '--generator', '--num-images', str(num_images)])
    fill_defaults(args)
    args.classes_per_batch = 20
    per_class = data_free._images_per_class(args, num_classes, {})
    size = per_class * min(20, num_classes)
    num_batches = -(-num_images // size)
    found = torch.cat(batch_targets(num_batches, range(num_classes), 20, per_class, 0))
    assert len(found.unique()) == num_classes and num_images <= len(found) < 1.5 * num_images and size <= 1920


def test_classes_without_images_are_told_before_any_is_made(make, tmp_path):
    result = make(tmp_path / 'images', '--num-images', '6')
    assert result.returncode == 0, result.stderr
    assert '1 of 3 classes get no image. Set --num-images 12 or more' in result.stderr
    assert '1 of 3 classes have no image.' in result.stderr


def test_a_run_is_resumed_with_the_same_networks_from_elsewhere(make, cnn, tmp_path):
    """Weights are compared, not names."""
    (tmp_path / 'moved').symlink_to(cnn)
    for args in (('--num-images', '6'), ('--num-images', '12', '--resume', '--model', tmp_path / 'moved')):
        result = make(tmp_path / 'images', *args)
        assert result.returncode == 0, result.stderr
    result = make(tmp_path / 'images', '--resume', '--num-images', '12', '--verifier', tmp_path / 'moved')
    assert result.returncode == 2 and 'verifier, weights. Choose another OUT' in result.stderr


def test_a_competitor_trained_on_some_classes(cnn, tmp_path):
    """Its classes are found by their names."""
    student = timm.create_model('test_resnet', num_classes=2)
    (tmp_path / 'run').mkdir()
    torch.save(student.state_dict(), tmp_path / 'run' / 'pytorch_model.bin')
    cfg = dict(architecture='test_resnet', num_classes=2, pretrained_cfg=dict(
        student.pretrained_cfg, num_classes=2, label_names=['rust', 'blue sky']))
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(cfg, default=str))
    student = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert match_student(student, ['blue sky', 'grass', 'rust']) == [2, 0]
    main([
        str(tmp_path / 'images'), '--model', str(cnn), *QUICK, '--num-images', '6', '--diversity', 'adi',
        '--student', f'local-dir:{tmp_path / "run"}'])


@pytest.mark.parametrize('flags, culprit', [
    (('--tv-weight', '1000'), '--tv-weight'),
    (('--ep-weight', '1e6'), '--ep-weight and --triplet-weight'),
])
def test_images_of_no_class_are_reported(flags, culprit, make, tmp_path):
    result = make(tmp_path / 'images', '--num-images', '12', *flags)
    assert result.returncode == 0, result.stderr
    assert 'does not recognise most images' in result.stderr and f'Lower {culprit}, or' in result.stderr


@pytest.mark.parametrize('kind, weights, advice', [
    (Inverter, LossWeights(bn=10.), 'Lower --bn-weight (or try --bn-norm relative), or take more steps.'),
    (Inverter, LossWeights(bn=10., bn_norm='relative'), 'Lower --bn-weight, or take more steps.'),
    (GeneratorInverter, GENERATOR_WEIGHTS, 'Lower --bn-weight, or omit --generator and set --bn-norm relative.'),
    (GeneratorInverter, replace(GENERATOR_WEIGHTS, bn=0.), 'Omit --generator and set --bn-norm relative.'),
])
def test_advice_is_about_the_options_of_the_run(kind, weights, advice):
    model = timm.create_model('test_resnet', num_classes=3)
    inverter = kind(model, (0.5,) * 3, (0.2,) * 3, [Resolution(32, 4, 0.1)], weights, 'none')
    assert advise(inverter, [dict(batch=0, step=4, ce=2., bn=1., tv=2., l2=3.)]).endswith(f'CNNs. {advice}')


def test_a_batch_that_is_lost(make, tmp_path):
    """Tried once more, then reported and skipped."""
    result = make(tmp_path / 'images', '--num-images', '6', '--bn-weight', 'nan')
    assert result.returncode == 0, result.stderr
    assert 'Trying another seed' in result.stderr and 'Skipping the batch' in result.stderr
    assert json.loads((tmp_path / 'images' / 'manifest.json').read_text())['failed_batches'] == [0]
    assert '0 of 0 images kept, 1 batches failed' in result.stdout


@pytest.mark.slow
def test_a_compiler_that_fails_and_an_interruption_are_one_line(make, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setenv('CXX', 'no-such-compiler')
        patch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
        result = make(tmp_path / 'images', '--num-images', '6', '--torchcompile')
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert '--torchcompile: the model could not be compiled' in result.stderr.strip().splitlines()[-1]

    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        run_command('data_free', main, hint='Add --resume.')
    assert e.value.code == 130 and capsys.readouterr().err == 'data_free: Interrupted. Add --resume.\n'


@pytest.mark.slow
def test_a_full_disk(make, tmp_path):
    import resource
    result = make(
        tmp_path / 'images', '--num-images', '6',
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)))
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert 'File too large' in result.stderr.splitlines()[-1]
    assert not [p for p in (tmp_path / 'images').rglob('*') if 'tmp' in p.name]
