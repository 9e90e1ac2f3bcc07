"""Image folders as users have them: twins in names, hidden files, depths, class maps, splits."""
import itertools
import json
import os
import pickle
import shutil
import socket
import tarfile
import unicodedata

import numpy as np
import pytest
import timm
import torch
from conftest import start_python
from PIL import Image

from timm_dearkd.engine.checkpoints import read_classes
from timm_dearkd.engine.data import (
    Classes,
    class_indices,
    class_names,
    classes_of,
    open_dataset,
    open_eval_dataset,
    open_with_classes,
)
from timm_dearkd.engine.image_folder import class_order, read_class_map
from timm_dearkd.engine.wrappers import ClassFraction

TWINS = ['01', '1', '007', 'A', 'a', 'b10', 'c']


def make_folder(root, names, count=2, value=0):
    """An image folder whose images have the place of their class's name as their grey value."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new('L', (8, 8), value + place).save(root / name / f'{i}.png')
    return str(root)


# A rank of a training run, and then a process of data_free by itself
ORDER = '''
import json, os, sys
from timm.data import create_dataset
from timm_dearkd import train
from timm_dearkd.analysis.inputs import find_images
from timm_dearkd.data_free.__main__ import main as data_free
from timm_dearkd.engine.data import class_names, open_dataset
root, tar, out = sys.argv[1:]
rank, build_datasets, trained = os.environ['RANK'], train.build_datasets, []

def watch(*args):
    datasets = build_datasets(*args)
    trained.extend((label, image.getpixel((0, 0))[0]) for image, label in datasets[0])
    return datasets

train.build_datasets = watch
train.run_script([
    root, '--val-split', '', '--model', 'test_resnet', '--img-size', '32', '--no-aug', '-b', '2', '-j', '0', '--device',
    'cpu', '--epochs', '1', '--output', out, '--experiment', 'run'])
for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
    del os.environ[name]
sys.modules['matplotlib'] = None  # no curves, which take seconds
data_free([
    f'{out}/images{rank}', '--model', f'{out}/run', '--num-images', '7', '--classes-per-batch', '7',
    '--images-per-class', '1', '--diversity', 'none', '--resolutions', '16:1:0.1', '--format', 'wds',
    '--device', 'cpu'])
print()
print(json.dumps(dict(
    found=[class_names(open_dataset('', root, 'train')), class_names(open_dataset('', tar, 'train'))],
    labels=[label for _, label in find_images([root], None, 7).samples], trained=trained,
    timm=list(create_dataset('', root).reader.class_to_idx))))
'''


def test_classes_come_in_one_order_in_every_process(tmp_path, monkeypatch):
    """In two processes in which timm's own order differs: of a folder and a tar file, in a run, and in data_free."""
    root = make_folder(tmp_path / 'data', TWINS, count=1)
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(root, arcname='.')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    group = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))  # as torchrun
    processes = []
    for rank, seed in (('0', '0'), ('1', '2')):
        for name, value in dict(**group, RANK=rank, LOCAL_RANK=rank, PYTHONHASHSEED=seed).items():
            monkeypatch.setenv(name, value)
        processes.append(start_python('-c', ORDER, root, tmp_path / 'data.tar', tmp_path))
    results = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    assert len({tuple(result['timm']) for result in results}) > 1
    for rank, result in enumerate(results):
        assert result['found'] == [TWINS, TWINS]
        assert sorted(result['labels']) == list(range(7)) and result['labels'] == results[0]['labels']
        assert sorted(result['trained']) == [[index, index] for index in range(7)]
        images = json.loads((tmp_path / f'images{rank}' / 'manifest.json').read_text())['images']
        assert {(image['target'], image['class']) for image in images} == set(enumerate(TWINS))
        with tarfile.open(tmp_path / f'images{rank}' / 'train' / 'train-000000.tar') as tar:
            written = {image['class']: int(tar.extractfile(f'{image["name"]}.cls').read()) for image in images}
        assert written == {name: index for index, name in enumerate(TWINS)}


def test_the_order_does_not_depend_on_that_of_the_names():
    assert all(class_order(names) == TWINS[:5] for names in itertools.permutations(TWINS[:5]))
    assert class_order(['m²', 'a', '10', '²', '9']) == ['9', '10', 'a', 'm²', '²']  # which int() does not read


def test_classes_of_a_resumed_run_are_those_of_its_checkpoint(tmp_path, caplog):
    """Matched by name where the order is another; other names, and swapped folders, are refused."""
    root = make_folder(tmp_path / 'data', ['cat', 'dog', 'emu'])
    (tmp_path / 'map.txt').write_text('emu\ncat\ndog\n')
    dataset = open_dataset('', root, 'train', class_map=str(tmp_path / 'map.txt'))
    began = Classes(*json.loads(json.dumps(classes_of(dataset))))  # as a file keeps them
    began = began._replace(digests={int(index): digest for index, digest in began.digests.items()})
    caplog.set_level('INFO')
    resumed = open_with_classes(began, '', root, 'train')
    assert 'matched by name' in caplog.text and class_names(resumed) == ['emu', 'cat', 'dog']
    assert {(image.getpixel((0, 0))[0], label) for image, label in resumed} == {(0, 1), (1, 2), (2, 0)}
    assert class_names(open_with_classes(Classes(), '', root, 'train')) == ['cat', 'dog', 'emu']

    shutil.move(tmp_path / 'data' / 'cat', tmp_path / 'data' / 'zcat')
    with pytest.raises(ValueError, match='New: zcat. Missing: cat. Restore the names'):
        open_with_classes(began, '', root, 'train')
    for index, name in enumerate(('zcat', 'dog', 'emu')):
        Image.effect_noise((8 + 8 * index, 9), 50).save(tmp_path / 'data' / name / '0.png')
    shutil.move(tmp_path / 'data' / 'zcat', tmp_path / 'data' / 'cat')
    began = classes_of(open_dataset('', root, 'train'))
    Image.new('L', (70, 90)).save(tmp_path / 'data' / 'emu' / '0.png')  # changed images are no swap
    open_with_classes(began, '', root, 'train')
    for old, new in (('cat', 'x'), ('dog', 'cat'), ('x', 'dog')):
        shutil.move(tmp_path / 'data' / old, tmp_path / 'data' / new)
    with pytest.raises(ValueError, match="Class 'cat' has the images that class 'dog' had"):
        open_with_classes(began, '', root, 'train')


def frames(root, **counts):
    """Class folders of images with the same names and sizes, as frames of videos have them."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new('L', (8, 8)).save(root / name / f'{i:04d}.bmp')
    return str(root)


def rename(root, **names):
    for old in names:
        (root / old).rename(root / f'{old} before')
    for old, new in names.items():
        (root / f'{old} before').rename(root / new)


def test_classes_that_look_alike_do_not_stop_a_resumed_run(tmp_path):
    root = frames(tmp_path / 'a', cat=3, dog=3, emu=2)
    open_with_classes(classes_of(open_dataset('', root, 'train')), '', root, 'train')
    root = frames(tmp_path / 'b', cat=3, dog=2)
    began = classes_of(open_dataset('', root, 'train'))
    frames(tmp_path / 'b', dog=3)  # which is now like the cats, and they are like before
    open_with_classes(began, '', root, 'train')
    shutil.rmtree(tmp_path / 'b' / 'cat')
    frames(tmp_path / 'b', cat=1)
    with pytest.raises(ValueError, match="Class 'dog' has the images that class 'cat' had"):
        open_with_classes(began, '', root, 'train')


def test_rotated_classes_are_refused(tmp_path):
    root = frames(tmp_path / 'data', ant=3, bee=3, cat=1, dog=2, emu=4)
    began = classes_of(open_dataset('', root, 'train'))
    rename(tmp_path / 'data', ant='bee', bee='ant')  # which cannot be seen
    open_with_classes(began, '', root, 'train')
    rename(tmp_path / 'data', cat='dog', dog='emu', emu='cat')
    with pytest.raises(ValueError, match="Class 'cat' has the images that class 'emu' had"):
        open_with_classes(began, '', root, 'train')


def test_files_are_looked_at_once_and_only_for_a_checkpoint_with_digests(tmp_path, monkeypatch):
    root = frames(tmp_path / 'data', cat=3, dog=2)
    (tmp_path / 'data' / 'dog' / 'link.bmp').symlink_to(tmp_path / 'nothing.bmp')  # skipped when it is read
    began = classes_of(open_dataset('', root, 'train'))
    sized, getsize = [], os.path.getsize
    monkeypatch.setattr(os.path, 'getsize', lambda path: sized.append(path) or getsize(path))
    open_with_classes(began._replace(digests={}), '', root, 'train')
    open_with_classes(Classes(), '', root, 'train')
    assert not sized
    resumed = open_with_classes(began, '', root, 'train')
    assert classes_of(resumed) == began and len(sized) == 5


def test_train_does_not_resume_with_renamed_classes(train_cli, image_folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    command = ('--model', 'test_resnet', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    result = train_cli(*command, '--stop-epoch', '1', data=root)
    assert result.returncode == 0, result.stderr
    for split in ('train', 'validation'):
        (root / split / 'rust').rename(root / split / 'a rust')
    result = train_cli(*command, data=root)
    assert result.returncode == 2
    assert 'New: a rust. Missing: rust.' in result.stderr.strip().splitlines()[-1]


def test_hidden_files_are_ignored(tmp_path):
    """As macOS leaves them, in folders, tar files and torchvision's reader."""
    root = make_folder(tmp_path / 'data', ['cat', 'dog'])
    for name in ('cat/._0.png', 'dog/.DS_Store.png', '.Trash/old/1.png'):
        (tmp_path / 'data' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / name).write_bytes(b'nothing')
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        for name in ('cat', 'dog'):
            tar.add(tmp_path / 'data' / name, arcname=name)
    for name, place in (('', root), ('', str(tmp_path / 'data.tar'))):
        dataset = open_dataset(name, place, 'train')
        assert class_names(dataset) == ['cat', 'dog']
        assert [(image.getpixel((0, 0))[0], label) for image, label in dataset] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    shutil.rmtree(tmp_path / 'data' / '.Trash')
    assert len(open_dataset('torch/image_folder', root, 'train')) == 4


def tar_of(folder):
    with tarfile.open(f'{folder}.tar', 'w') as tar:
        tar.add(folder, arcname='.')
    return f'{folder}.tar'


NFC, NFD = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))


@pytest.mark.parametrize('kind', ['', 'torch/folder', 'tar'])
def test_names_are_equal_in_every_unicode_form(kind, tmp_path):
    """A folder that was copied from macOS has the accents of its name apart."""
    assert NFC != NFD
    root = tmp_path / 'data'
    make_folder(root / 'train', ['apple', NFC, 'cafz', 'dog'])
    make_folder(root / 'validation', [NFD, 'cafz', 'dog'], value=1)

    def place(split):
        return ('', tar_of(root / split), split) if kind == 'tar' else (kind, str(root), split)

    train_set = open_dataset(*place('train'), is_training=True)
    order = ['apple', 'cafz', 'dog', NFC] if kind.startswith('torch') else ['apple', NFC, 'cafz', 'dog']
    order = class_order(order) if kind != 'torch/folder' else sorted(order)
    assert class_names(train_set) == order
    eval_set = open_eval_dataset(train_set, *place('validation'))
    expected = {(1, order.index(NFC)), (2, order.index('cafz')), (3, order.index('dog'))}
    assert {(image.getpixel((0, 0))[0], label) for image, label in eval_set} == expected
    (tmp_path / 'map.txt').write_text(f'apple\n{NFD}\n', encoding='utf-8')
    dataset = open_dataset(*place('train'), class_map=str(tmp_path / 'map.txt'))
    assert [(image.getpixel((0, 0))[0], label) for image, label in dataset] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    make_folder(root / 'train', [NFD])
    with pytest.raises(ValueError, match='two class folders .* look the same'):
        open_dataset(*place('train'))


def test_tar_files_and_torch_folders_take_class_maps_and_fractions(tmp_path, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog', 'emu'], count=4)
    (tmp_path / 'map.txt').write_text('1 cat\n0 emu\n')
    (tmp_path / 'other.txt').write_text('bird\n')
    for name, place in (('', tar_of(tmp_path / 'data')), ('torch/folder', root)):
        caplog.clear()
        dataset = open_dataset(name, place, 'train', class_map=str(tmp_path / 'map.txt'))
        assert class_names(dataset) == ['emu', 'cat']
        assert 'Skips folders that it does not name: dog.' in caplog.text
        half = ClassFraction(dataset, 0.5)
        assert [(image.getpixel((0, 0))[0], label) for image, label in half] == [(0, 1)] * 2 + [(2, 0)] * 2
        with pytest.raises(ValueError, match=r'None of the classes .* \(cat, dog, emu\) is among those .* \(bird\)'):
            open_dataset(name, place, 'train', class_map=str(tmp_path / 'other.txt'))


def test_file_names_are_those_of_timms_reader(tmp_path):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'])
    ours, timms = open_dataset('', root, 'train').reader, timm.data.create_dataset('', root).reader
    assert isinstance(ours, timm.data.readers.reader.Reader) and len(ours) == len(timms)
    for options in ({}, dict(basename=True), dict(absolute=True), dict(basename=True, absolute=True)):
        assert ours.filenames(**options) == timms.filenames(**options)
        assert ours.filename(3, **options) == timms.filename(3, **options)


@pytest.mark.parametrize('text, expected', [
    ('\ufeffcat\ndog\n', {'cat': 0, 'dog': 1}),
    ('cat\r\n\r\n  \ndog\r\n', {'cat': 0, 'dog': 1}),
    ('# animals\n\n0 dog\n2\tsea lion\n1  cat', {'dog': 0, 'sea lion': 2, 'cat': 1}),
    ('3 dogs\ncat\n', {'3 dogs': 0, 'cat': 1}),
    ('0 a\n0 b\n', {'a': 0, 'b': 0}),
], ids=['byte order mark', 'blank lines', 'indices', 'a name that begins with a number', 'two names of a class'])
def test_class_maps(text, expected, tmp_path):
    path = tmp_path / 'map.txt'
    path.write_bytes(text.encode())
    assert read_class_map(str(path), names={'3 dogs', 'cat', 'dog'}) == expected
    assert read_class_map('map.txt', str(tmp_path), {'3 dogs', 'cat', 'dog'}) == expected


@pytest.mark.parametrize('text, message', [
    ('\n0 cat\ndog\n', "Line 3 .*'dog', expected an index and a name as in line 2"),
    ('cat\ndog\ncat\n', "Line 3 .* repeats the class 'cat'"),
    ('\n# nothing\n', 'is empty'),
])
def test_class_maps_that_cannot_be_read(text, message, tmp_path):
    path = tmp_path / 'map.txt'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_map(str(path))
    with pytest.raises(FileNotFoundError, match="--class-map: no file 'nothing.txt'"):
        read_class_map('nothing.txt')


@pytest.mark.parametrize('content, message', [
    (pickle.dumps({'cat': np.int64(0)}), 'cannot be read .* Write a text file'),
    (pickle.dumps({'cat': 0.5}), "class 'cat' has the index 0.5"),
    (pickle.dumps({'cat': -1}), "class 'cat' has the index -1"),
    (pickle.dumps(['cat']), 'expected a dict'),
    (b'cat', 'cannot be read'),
], ids=['numpy', 'fraction', 'negative', 'list', 'text'])
def test_pickled_class_maps_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / 'map.pkl').write_bytes(content)
    with pytest.raises(ValueError, match=f"--class-map '.*map.pkl'.*{message}"):
        read_class_map(str(tmp_path / 'map.pkl'))


def test_indices_of_class_maps_are_plain_integers(tmp_path):
    """torch.load with weights_only reads no numpy integers, and classes are in each checkpoint."""
    root = make_folder(tmp_path / 'data', ['cat', 'dog'])
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps({'dog': True, NFD: 0}))
    assert read_class_map(str(tmp_path / 'map.pkl')) == {'dog': 1, NFC: 0}
    for name, place in (('', root), ('', tar_of(tmp_path / 'data')), ('torch/folder', root)):
        dataset = open_dataset(name, place, 'train', class_map={'cat': np.int64(1), 'dog': np.int64(0)})
        torch.save(class_indices(dataset), tmp_path / 'classes.pth')
        assert torch.load(tmp_path / 'classes.pth', weights_only=True) == {'cat': 1, 'dog': 0}


def test_a_class_map_of_other_classes_is_refused(tmp_path):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'])
    (tmp_path / 'map.txt').write_text('bird\n')
    with pytest.raises(ValueError, match=r'None of the classes .* \(cat, dog\) is among those asked for \(bird\)'):
        open_dataset('', root, 'train', class_map=str(tmp_path / 'map.txt'))


def test_splits_may_be_paths(tmp_path, monkeypatch):
    make_folder(tmp_path / 'data' / 'train', ['cat', 'dog'])
    make_folder(tmp_path / 'elsewhere' / 'test', ['cat', 'dog'], count=3)
    monkeypatch.chdir(tmp_path)
    for split, count in (('data/train', 4), (str(tmp_path / 'data' / 'train'), 4), ('elsewhere/test', 6), ('train', 4)):
        for name in ('', 'torch/image_folder'):
            assert len(open_dataset(name, 'data', split)) == count
    with pytest.raises(FileNotFoundError, match="No folder 'data/trian', neither here nor in .* There are: train"):
        open_dataset('', 'data', 'data/trian')


def test_indices_of_all_kinds_of_data_sets(image_folder):
    expected = {'blue sky': 0, 'grass': 1, 'rust': 2}
    for name in ('', 'torch/image_folder'):
        assert class_indices(open_dataset(name, str(image_folder), 'train')) == expected


def test_classes_of_other_scripts_checkpoints_are_unknown(tmp_path):
    torch.save({'classes': ['cat', 'dog'], 'state_dict': {}}, tmp_path / 'other.pth')
    assert read_classes(str(tmp_path / 'other.pth')) == Classes()
