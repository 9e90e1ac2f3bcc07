"""Image folders as users have them: twins in names, hidden files, depths, class maps, splits."""
import io
import itertools
import json
import shutil
import socket
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from conftest import start_python
from PIL import Image

from timm_dearkd.engine.data import (
    Classes,
    class_indices,
    class_names,
    classes_of,
    open_dataset,
    open_eval_dataset,
    open_with_classes,
    set_image_mode,
)
from timm_dearkd.engine.image_folder import class_order, read_class_map
from timm_dearkd.engine.output import read_classes

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
from timm_dearkd.engine import build_data
from timm_dearkd.engine.data import class_names, open_dataset
root, tar, out = sys.argv[1:]
rank, build_datasets, trained = os.environ['RANK'], build_data.build_datasets, []

def watch(*args):
    datasets = build_datasets(*args)
    trained.extend((label, image.getpixel((0, 0))[0]) for image, label in datasets[0])
    return datasets

build_data.build_datasets = watch
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
        Image.new('L', (8 + index, 9)).save(tmp_path / 'data' / name / '0.png')
    shutil.move(tmp_path / 'data' / 'zcat', tmp_path / 'data' / 'cat')
    began = classes_of(open_dataset('', root, 'train'))
    Image.new('L', (70, 90)).save(tmp_path / 'data' / 'emu' / '0.png')  # changed images are no swap
    open_with_classes(began, '', root, 'train')
    for old, new in (('cat', 'x'), ('dog', 'cat'), ('x', 'dog')):
        shutil.move(tmp_path / 'data' / old, tmp_path / 'data' / new)
    with pytest.raises(ValueError, match="Class 'cat' has the images that class 'dog' had"):
        open_with_classes(began, '', root, 'train')


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


def test_names_are_equal_in_every_unicode_form(tmp_path):
    """A folder that was copied from macOS has the accents of its name apart."""
    composed, decomposed = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    assert composed != decomposed
    root = tmp_path / 'data'
    make_folder(root / 'train', ['apple', composed, 'dog'])
    make_folder(root / 'validation', [decomposed, 'dog'], value=1)
    train_set = open_dataset('', str(root), 'train', is_training=True)
    eval_set = open_eval_dataset(train_set, '', str(root), 'validation')
    assert {(image.getpixel((0, 0))[0], label) for image, label in eval_set} == {(1, 1), (2, 2)}
    (tmp_path / 'map.txt').write_text(f'apple\n{decomposed}\n', encoding='utf-8')
    dataset = open_dataset('', str(root), 'train', class_map=str(tmp_path / 'map.txt'))
    assert [label for _, label in dataset] == [0, 0, 1, 1]
    make_folder(root / 'train', [decomposed])
    with pytest.raises(ValueError, match='two class folders .* look the same'):
        open_dataset('', str(root), 'train')


def deep(kind):
    """A 16-bit image as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(buffer, kind)
    return buffer.getvalue()


def test_deep_images_behind_others_are_skipped_by_name(tmp_path, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'], count=3)
    (tmp_path / 'data' / 'cat' / '1.png').write_bytes(deep('png'))
    dataset = open_dataset('', root, 'train')
    for mode in ('RGB', 'L'):
        set_image_mode(dataset, mode)
        for _ in range(2):
            values = [np.asarray(image).max() for image, _ in dataset]
            assert values == [0, 0, 0, 1, 1, 1]  # none is white
    assert len(caplog.messages) == 1
    assert 'cat/1.png' in caplog.text and 'mode I;16' in caplog.text and 'the next image takes its place' in caplog.text


def test_deep_images_of_streams_are_skipped(tmp_path, caplog):
    files = {'0.png': (tmp_path / '0.png'), '1.png': None, '2.png': (tmp_path / '2.png')}
    with tarfile.open(tmp_path / 'train-000000.tar', 'w') as tar:
        for place, name in enumerate(files):
            if files[name] is not None:
                Image.new('L', (8, 8), place).save(files[name])
            content = deep('png') if files[name] is None else files[name].read_bytes()
            for member, data in ((name, content), (name.replace('png', 'cls'), b'0')):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / '_info.json').write_text(json.dumps(
        dict(splits=dict(train=dict(name='train', num_samples=3, filenames=['train-000000.tar'], shard_lengths=[3])))))
    dataset = open_dataset('wds/', str(tmp_path), 'train', input_img_mode='L')
    assert sorted(image.getpixel((0, 0)) for image, _ in dataset) == [0, 2]
    assert len([m for m in caplog.messages if 'mode I;16' in m]) == 1


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


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'])
    Image.new('L', (64, 64)).save(tmp_path / 'data' / 'cat' / '1.png')
    dataset = open_dataset('', root, 'train')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert [label for _, label in dataset] == [0, 1, 1, 1] and 'cat/1.png' in caplog.text


def test_classes_of_other_scripts_checkpoints_are_unknown(tmp_path):
    torch.save({'classes': ['cat', 'dog'], 'state_dict': {}}, tmp_path / 'other.pth')
    assert read_classes(str(tmp_path / 'other.pth')) == Classes()
