"""What the page shows, without a browser and without gradio."""
import socket
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.analysis.app import Viewer, open_viewer
from timm_dearkd.analysis.inputs import ImageFiles
from timm_dearkd.analysis.predict import predict
from timm_dearkd.commands import run_command
from timm_dearkd.engine.run_folder import save_folder

NAMES = ['blue sky', 'grass', 'rust']
HALF = (0.5, 0.5, 0.5)


@pytest.fixture()
def run(tmp_path):
    """A student, and a teacher that has another normalisation and the classes in another order."""
    student = timm.create_model('test_dearkd', num_classes=3, img_size=32, pretrained_cfg_overlay=dict(
        label_names=NAMES, input_size=(3, 32, 32), mean=HALF, std=HALF))
    teacher = timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay=dict(label_names=NAMES[::-1]))
    torch.nn.init.normal_(teacher.fc.weight)
    save_folder(student, tmp_path / 'run')
    save_folder(teacher, tmp_path / 'cnn')
    write_options(tmp_path / 'run', kd_model_name=tmp_path / 'cnn')
    return tmp_path / 'run'


def write_options(folder, **options):
    lines = [f'{name}: {value}' for name, value in {'model': 'test_dearkd', 'epochs': 1, **options}.items()]
    (folder / 'args.yaml').write_text('\n'.join(lines))


def write_images(folder):
    """Files of many modes, a photo that its EXIF turns, and one of odd size."""
    pixels = np.random.default_rng(0).integers(0, 256, (41, 57, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    files = []
    for mode, ending in (('RGBA', 'png'), ('P', 'gif'), ('CMYK', 'jpg'), ('LA', 'png'), ('L', 'tif'), ('1', 'bmp')):
        files.append(str(folder / f'{mode}.{ending}'))
        source = image.convert('RGB') if mode in ('P', 'CMYK') else image
        source.convert(mode).save(files[-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    files.append(str(folder / 'turned.jpg'))
    image.convert('RGB').save(files[-1], exif=exif)
    return files


@pytest.mark.parametrize('in_chans', [1, 3])
def test_classes_are_those_of_predict(in_chans, tmp_path):
    model = timm.create_model('test_dearkd', num_classes=3, img_size=48, in_chans=in_chans, pretrained_cfg_overlay=dict(
        input_size=(in_chans, 48, 48), mean=HALF[:in_chans], std=HALF[:in_chans])).eval()
    viewer, files = Viewer(model, 'model'), write_images(tmp_path)
    expected = predict(model, ImageFiles([(path, None) for path in files], 'L' if in_chans == 1 else 'RGB'))
    assert len(expected) == len(files)
    for path, prediction in zip(files, expected):
        answer, teacher = viewer.classify(viewer.read(path))
        assert list(answer) == [str(index) for index in prediction.classes] and not teacher
        assert list(answer.values()) == pytest.approx(prediction.probs, abs=1e-5)


def test_the_teacher_answers_as_on_its_own(run, tmp_path):
    (path, *_) = write_images(tmp_path)
    viewer = open_viewer(str(run))
    message, student, teacher, picture, attention, patch, image = viewer.show(path)
    assert message == 'RGBA.png' and sorted(student) == NAMES and patch == (1, 1) and image.shape == (3, 32, 32)
    assert picture.size == attention.size == (448, 448)
    assert viewer.facts == 'test_dearkd, 3 classes, 32 x 32 pixels.' and viewer.title == 'run'

    cnn = timm.create_model(f'local-dir:{tmp_path / "cnn"}', pretrained=True).eval()
    config = {**resolve_model_data_config(viewer.student), 'mean': cnn.pretrained_cfg['mean'],
              'std': cnn.pretrained_cfg['std']}
    with Image.open(path) as file, torch.no_grad():
        probs = cnn(create_transform(**config)(file.convert('RGB'))[None])[0].softmax(0)
    assert teacher == pytest.approx(dict(zip(NAMES[::-1], probs.tolist())), abs=1e-4)
    assert max(teacher.values()) > 0.4  # else the order of the classes would not show


def test_a_teacher_of_features_answers_its_own_classes(run, tmp_path):
    """The other kinds of distillation need the student's classes."""
    names = ['a', 'b', 'c', 'd']
    teacher = timm.create_model('test_resnet', num_classes=4, pretrained_cfg_overlay=dict(label_names=names))
    save_folder(teacher, tmp_path / 'other')
    for kind, expected in (('feature', names), ('logit', [])):
        write_options(run, kd_model_name=tmp_path / 'other', kd_distill_type=kind)
        _, answer = open_viewer(str(run)).classify(torch.zeros(3, 32, 32))
        assert sorted(answer) == expected


def test_the_picture_shows_where_a_patch_looks():
    """Heads that look one patch to the right, and one up, on a grid of 3x5."""
    model = timm.create_model('test_dearkd', img_size=(48, 80), num_classes=2).eval()
    with torch.no_grad():
        model.blocks[0].attn.rpe.alpha.fill_(9.)
        model.blocks[0].attn.rpe.delta.copy_(torch.tensor([[0., 1.], [-1., 0.]]))
    viewer, image = Viewer(model, 'model'), torch.zeros(3, 48, 80)
    for head, expected in ((0, {(1, 3), (0, 2)}), (1, {(1, 3)}), (2, {(0, 2)})):
        picture = np.asarray(viewer.attention(image, (1, 2), 1, head)).astype(int)
        height, width = picture.shape[0] // 3, picture.shape[1] // 5
        centers = picture[height // 2::height, width // 2::width]
        red = centers[..., 0] - centers[..., 2] > 100
        assert set(zip(*map(list, np.nonzero(red)))) == expected
        assert picture[height, 2 * width].tolist() == picture[2 * height - 1, 3 * width - 1].tolist() == [0, 255, 255]
    picture = viewer.picture(image)
    assert picture.size == (400, 240)
    for x, y, patch in ((0, 0, (0, 0)), (399, 239, (2, 4)), (160, 80, (1, 2)), (239, 159, (1, 2)), (240, 160, (2, 3))):
        assert viewer.patch_at(image, x, y) == patch


def test_a_file_that_is_no_image_gives_a_message(run, tmp_path):
    viewer = open_viewer(str(run))
    (tmp_path / 'notes.txt').write_text('no picture')
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / 'deep.png')
    for name, reason in (('notes.txt', 'cannot be read as an image ('), ('deep.png', 'has 16 bits per channel')):
        message, *others = viewer.show(str(tmp_path / name))
        assert message.startswith(f"'{name}' {reason}") and str(tmp_path) not in message
        assert others == [None] * 6


def test_models_without_a_teacher(run, tmp_path, caplog):
    (path, *_) = write_images(tmp_path)
    cases = (
        ({}, 'No teacher: the model was trained without one.', ''),
        ({'kd_model_name': tmp_path / 'nowhere'}, 'No teacher: it could not be loaded', 'No folder'),
        (dict(kd_model_name=tmp_path / 'cnn', kd_class_map=tmp_path / 'map'), 'No teacher: it could not', 'Class map'))
    for options, note, reason in cases:
        write_options(run, **options)
        viewer = open_viewer(str(run))
        assert note in viewer.facts and str(tmp_path) not in viewer.facts and reason in caplog.text
        assert viewer.show(path)[2] == {}
    cnn = open_viewer(str(tmp_path / 'cnn'))
    assert 'not the folder of a run' in cnn.facts
    _, answer, teacher, picture, *others = cnn.show(path)
    assert sorted(answer) == NAMES and picture and others[:2] == [None, None]


def test_two_classes_of_one_name_are_both_shown():
    model = timm.create_model('test_dearkd', num_classes=3, img_size=32, pretrained_cfg_overlay=dict(
        label_names=['crane', 'grass', 'crane']))
    answer, _ = Viewer(model.eval(), 'model').classify(torch.zeros(3, 32, 32))
    assert sorted(answer) == ['crane (0)', 'crane (2)', 'grass'] and sum(answer.values()) == pytest.approx(1)


def test_errors_are_one_line_and_status_2(run, capsys, monkeypatch):
    def error(*args):
        with pytest.raises(SystemExit) as e:
            run_command('analysis', main, ['app', str(run), *args])
        assert e.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert "needs gradio 6, from 6.31 (found: none): pip install -e '.[app]'" in error()
    for version in ('5.49.1', '6.9.0', '7.0.0'):
        monkeypatch.setitem(sys.modules, 'gradio', types.SimpleNamespace(__version__=version))
        assert f'(found: {version})' in error()
    monkeypatch.setitem(sys.modules, 'gradio', types.SimpleNamespace(__version__='6.31.0'))
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        assert f'Cannot listen on 127.0.0.1, port {port} (Address already in use). Set another' in error(
            '--port', str(port))
    assert 'Cannot listen on 192.0.2.1 (' in error('--host', '192.0.2.1')  # an address for documentation
    assert 'port 70000' in error('--port', '70000')
