import csv
import importlib
import os

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.analysis.inputs import ImageFiles, class_names, find_images, label_names
from timm_dearkd.analysis.predict import Prediction, mistakes_first, predict
from timm_dearkd.commands import run_command

predict_module = importlib.import_module('timm_dearkd.analysis.predict')
NAMES = ['blue sky', 'grass', 'rust']


@pytest.fixture()
def model():
    return timm.create_model('test_dearkd', num_classes=3, img_size=32, pretrained_cfg_overlay={'label_names': NAMES})


def test_against_one_image_at_a_time(model, image_folder):
    files = find_images([str(image_folder / 'validation')], NAMES)
    assert len(files) == 12
    transform = create_transform(**resolve_model_data_config(model))
    predictions = predict(model, files, topk=5, batch_size=5)
    for p, (path, label) in zip(predictions, files.samples):
        with Image.open(path) as image, torch.no_grad():
            probs = model.eval()(transform(image.convert('RGB'))[None])[0].softmax(0)
        assert p.classes == probs.argsort(descending=True).tolist()
        assert p.probs == pytest.approx(sorted(probs.tolist(), reverse=True), abs=1e-5)
        assert p.label == label == NAMES.index(path.split('/')[-2])


def test_images_of_several_splits_are_said_to_be(image_folder, caplog):
    """Their accuracy is not that of the validation images."""
    assert len(find_images([str(image_folder)], NAMES)) == 60
    assert f'has the splits train, validation. All of their images count. For those of one split, give {image_folder}' \
        in caplog.text
    caplog.clear()
    assert len(find_images([str(image_folder / 'validation')], NAMES)) == 12 and not caplog.text


def test_labels_come_from_folder_names_or_from_their_order(tmp_path, caplog):
    for name in ('b', 'a', 'x'):
        (tmp_path / name).mkdir()
        Image.new('L', (8, 8)).save(tmp_path / name / '0.png')

    def labels(names, num_classes):
        return [label for _, label in find_images([str(tmp_path)], names, num_classes).samples]

    assert labels(['x', 'b', 'c'], 3) == [None, 1, 0]  # folders a, b, x
    assert '1 of 3 folders' in caplog.text and ': a.' in caplog.text
    assert labels(None, 3) == [0, 1, 2]  # a model that was saved without names
    assert labels(None, 2) == [None, None, None]


def test_imagenet_folders_are_known_by_their_synsets():
    model = timm.create_model('test_dearkd', img_size=32)
    assert label_names(model)[281] == 'n02123045' and class_names(model)[281].startswith('tabby')
    model = timm.create_model('test_dearkd', img_size=32, num_classes=3)
    assert label_names(model) is None and class_names(model) == ['0', '1', '2']
    model.pretrained_cfg['label_names'] = ['crane', 'crane', 'cat']
    assert class_names(model) == ['crane (0)', 'crane (1)', 'cat']


def test_mistakes_come_first_and_the_surest_before_the_others():
    guesses = [(0, 0, 0.9), (1, 0, 0.4), (None, 1, 0.3), (1, 2, 0.8), (2, 2, 0.5)]
    predictions = [Prediction(i, label, [says], [prob]) for i, (label, says, prob) in enumerate(guesses)]
    assert [p.place for p in mistakes_first(predictions)] == [3, 1, 2, 4, 0]


def test_images_that_cannot_be_read_are_logged_and_skipped(model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)
    Image.new('L', (400, 400)).save(tmp_path / 'huge.png')
    Image.new('RGBA', (13, 27)).save(tmp_path / 'fine.png')
    (tmp_path / 'empty.png').touch()
    whole = (tmp_path / 'fine.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
    files = ImageFiles([(str(tmp_path / name), None) for name in ('empty.png', 'fine.png', 'cut.png', 'huge.png')])
    assert [p.place for p in predict(model, files)] == [1]
    assert all(name in caplog.text for name in ('empty.png', 'cut.png', 'huge.png'))


def predict_command(tmp_path, *args):
    """The command with a model that was saved at its own size, without names."""
    torch.save(timm.create_model('test_dearkd', num_classes=3).state_dict(), tmp_path / 'weights.pth')
    args = [*args, '--model', 'test_dearkd', '--checkpoint', tmp_path / 'weights.pth']
    run_command('analysis', main, ['predict', *map(str, args), '--output', str(tmp_path / 'out'), '--device', 'cpu'])
    with (tmp_path / 'out.csv').open(newline='') as f:
        return list(csv.DictReader(f))


def test_command(image_folder, tmp_path, capsys):
    """A single grey image of odd size beside a folder, and class names that are nobody's idea of a label."""
    pytest.importorskip('matplotlib')
    Image.fromarray(np.zeros((5, 301), np.uint8)).save(tmp_path / 'thin, $grey$.png')
    rows = predict_command(
        tmp_path, image_folder / 'validation', tmp_path / 'thin, $grey$.png', '--topk', '2', '--num-pictures', '3')
    assert len(rows) == 13 and rows[-1]['image'].endswith('thin, $grey$.png') and rows[-1]['label'] == ''
    assert [row['label'] for row in rows[:-1]] == [str(i) for i in range(3) for _ in range(4)]
    right = sum(row['label'] == row['class1'] for row in rows[:-1])
    assert f'13 images, top-1 {100 * right / 12:.2f} % of 12' in capsys.readouterr().out
    assert all(float(row['prob1']) >= float(row['prob2']) for row in rows)
    assert (tmp_path / 'out.png').stat().st_size > 1000


@pytest.mark.parametrize('flags, expected', [([], 1), (['--workers', '2'], 2)])
def test_workers_that_are_asked_for_are_started(flags, expected, image_folder, tmp_path, monkeypatch):
    """On one core, where the default is one."""
    pytest.importorskip('matplotlib')
    started = []
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0}, raising=False)
    monkeypatch.setattr(predict_module, 'DataLoader', lambda *args, num_workers, **kwargs: (
        started.append(num_workers), DataLoader(*args, **kwargs))[1])
    predict_command(tmp_path, image_folder / 'validation', '-b', '6', '--num-pictures', '1', *flags)
    assert started == [expected]


@pytest.mark.parametrize('args, message', [
    (['MISSING'], 'No file or folder'),
    (['EMPTY'], 'has no images'),
    (['BROKEN'], 'None of the 1 images can be read'),
    (['BROKEN', '--topk', '0'], "--topk: 0, expected 1 or more"),
    (['BROKEN', '--workers', '-1'], "--workers: -1, expected 0 or more"),
])
def test_errors_are_one_line_and_status_2(args, message, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken.png').touch()
    replaced = {'MISSING': tmp_path / 'missing', 'EMPTY': tmp_path / 'empty', 'BROKEN': tmp_path / 'broken.png'}
    with pytest.raises(SystemExit) as e:
        predict_command(tmp_path, *(replaced.get(arg, arg) for arg in args))
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]


def test_folders_of_any_type_and_images_too_deep(model, tmp_path, caplog):
    for name in ('a.png', 'b.webp', 'c.tif', 'd.gif', 'e.bmp'):
        Image.new('L', (40, 40), 99).save(tmp_path / name)
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / 'deep.png')
    files = find_images([str(tmp_path)])
    assert len(files) == 6 and len(predict(model, files)) == 5
    assert "deep.png' has 16 bits per channel" in caplog.text and 'Skipping it.' in caplog.text


def test_images_that_are_not_read_or_that_a_viewer_shows_differently_are_told(model, tmp_path, caplog):
    """Once, also by workers."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in 'abcd':
        Image.new('RGB', (8, 8)).save(tmp_path / f'{name}.jpg', exif=exif)
        Image.new('RGBA', (8, 8)).save(tmp_path / f'{name}.png')
    for name in ('e.heic', 'f.heic', 'g.tga'):
        (tmp_path / name).touch()
    files = find_images([str(tmp_path)])
    assert '2 .heic, 1 .tga. Convert them' in caplog.text
    assert len(predict(model, files)) == len(predict(model, files)) == 8
    assert len(caplog.messages) == 3
    assert "a.jpg' has an EXIF orientation" in caplog.text and "a.png' has transparent pixels" in caplog.text
    files.has_warned.zero_()
    assert len(predict(model, files, batch_size=4, workers=1)) == 8 and files.has_warned.all()
