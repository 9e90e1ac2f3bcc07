import logging
import os
import shutil
from argparse import Namespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from timm.optim import create_optimizer_v2
from torch.utils.data import ChainDataset

import timm_dearkd  # noqa: F401
from distill_hooks import DearKDTask, TwoStageSchedule
from timm_dearkd import train
from timm_dearkd.engine import label_cache
from timm_dearkd.engine.label_cache import (
    IMAGE_OPTIONS,
    MISSING,
    LabelCache,
    build_label_cache,
    open_label_folder,
)
from timm_dearkd.engine.loop import Stepper, Trainer
from timm_dearkd.engine.options import build_parser
from timm_dearkd.engine.process import Precision, TrainingError

CPU = torch.device('cpu')
BATCHES = [(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 5)
           for i in range(3)]


def make_task(num_classes=5, **schedule):
    torch.manual_seed(0)
    student = timm.create_model('test_dearkd', num_classes=num_classes, img_size=32)
    cnn = timm.create_model('test_resnet', num_classes=num_classes)
    return DearKDTask(student, cnn, TwoStageSchedule(4, 2, **schedule), hooks='2', verbose=False)


def run(folder=None, **schedule):
    """Four epochs of `BATCHES`, and which parts of the teacher ran for each of them: 'map', 'whole' or nothing."""
    task = make_task(**schedule)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=1e-3)
    trainer = Trainer(task, BATCHES, Stepper(task, optimizer), Precision(CPU))
    if folder is not None:
        trainer.labels = task.label_store = LabelCache(folder, task, len(BATCHES), 8, CPU)
    parts = []
    task.teacher.register_forward_hook(
        lambda module, args, output: parts.append('map' if output[0] is None else 'whole'))
    ran = {}
    for epoch in range(4):
        task.set_epoch(epoch)
        losses = trainer.train_epoch(epoch)
        ran[epoch], parts[:] = list(parts), []
    return task, losses, ran


def test_soft_labels_are_not_stored():
    """A stored label, which is hard, would be taken for logits."""
    task = make_task()
    task.soft_temperature, task.label_store = 4., MagicMock()
    images = torch.randn(task.teacher.num_classes, *BATCHES[0][0].shape[1:])
    result = task(images, torch.zeros(len(images), dtype=torch.long))
    assert result['loss'].isfinite() and not task.label_store.mock_calls


def test_a_run_that_reads_its_labels_is_the_run_that_computes_them(tmp_path):
    """Bit for bit. In stage I it needs the maps alone, apart from the batch that is checked; in stage II, nothing."""
    plain, losses, ran = run()
    assert ran == {0: ['whole'] * 3, 1: ['whole'] * 3, 2: ['whole'] * 3, 3: []}
    for expected in (ran, {0: ['whole', 'map', 'map'], 1: ['map'] * 3, 2: [], 3: []}):
        task, found, parts = run(tmp_path)
        assert parts == expected and found == losses
        for a, b in zip(task.trainable_module.parameters(), plain.trainable_module.parameters()):
            assert a.equal(b)
    assert '64 read (89 %), 8 computed' in task.label_store.describe()
    cnn = timm.create_model('test_resnet', num_classes=5).eval()
    cnn.load_state_dict(plain.teacher.model.state_dict())
    answers = torch.stack([cnn(plain.teacher.prepare_input(images)).argmax(1) for images, _ in BATCHES])
    for epoch in range(3):
        assert np.load(tmp_path / f'epoch{epoch:04}-rank0.npy').tolist() == answers.tolist()
    assert sorted(os.listdir(tmp_path)) == [f'epoch{epoch:04}-rank0.npy' for epoch in range(3)]
    _, _, parts = run(tmp_path, alpha=0.2, beta=0., stage2='ce')  # other weights and stages, the same labels
    assert parts == {0: ['whole'], 1: [], 2: [], 3: []}


def make_cache(folder, num_batches=4, width=6, stage=1, **kwargs):
    task = Namespace(weights=Namespace(stage=stage), get_eval_model=lambda: Namespace(num_classes=5))
    return LabelCache(folder, task, num_batches, width, CPU, **kwargs)


def logits_of(labels):
    return 10 * torch.nn.functional.one_hot(torch.tensor(labels), 5).float()


def fill(cache, epoch, batches, first=0):
    """Take batches, and put the labels of those that are not known. Returns the known ones."""
    cache.set_epoch(epoch, first)
    known = {}
    for place, labels in enumerate(batches, first):
        taken = cache.take(len(labels))
        if taken is None:
            cache.put(logits_of(labels))
        else:
            known[place] = taken.tolist()
    cache.save()
    return known


LABELS = [[0, 1, 2, 3, 4, 0], [1, 1], [4, 3, 2, 1], [2, 0]]  # batches of several sizes


def test_an_epoch_that_was_cut_off_is_completed(tmp_path):
    """What is there is read, from any place of the epoch, and only the rest is computed."""
    assert fill(make_cache(tmp_path), 1, LABELS[:2]) == {}
    resumed = make_cache(tmp_path)
    assert fill(resumed, 1, LABELS[2:3], first=2) == {} and resumed.num_computed == 4
    cache = make_cache(tmp_path)
    assert fill(cache, 1, LABELS) == dict(enumerate(LABELS[:3])) and (cache.num_read, cache.num_computed) == (12, 2)
    assert fill(make_cache(tmp_path), 1, LABELS[1:], first=1) == {1: LABELS[1], 2: LABELS[2], 3: LABELS[3]}


def test_two_runs_that_fill_one_folder(tmp_path):
    one, other = make_cache(tmp_path), make_cache(tmp_path)
    other.set_epoch(1, 2)
    fill(one, 1, LABELS[:2])
    for labels in LABELS[2:]:
        assert other.take(len(labels)) is None
        other.put(logits_of(labels))
    other.save()
    assert fill(make_cache(tmp_path), 1, LABELS) == dict(enumerate(LABELS))


@pytest.mark.parametrize('stage', [1, 2])
def test_one_batch_in_200_is_checked_in_stage_1(stage, tmp_path):
    labels = [[0, 1]] * 150
    for epoch in range(5):
        fill(make_cache(tmp_path, 150, 2), epoch, labels)
    places = []
    for epoch in range(5):
        known = fill(make_cache(tmp_path, 150, 2, stage), epoch, labels)
        places += [150 * epoch + batch for batch in set(range(150)) - set(known)]
    assert places == ([0, 200, 400, 600] if stage == 1 else [])


def test_labels_that_are_not_the_teachers_stop_the_run(tmp_path):
    """Classes with almost equal logits may be exchanged, as a change of dtype does."""
    fill(make_cache(tmp_path), 0, LABELS)
    close = logits_of(LABELS[0])
    close[0] = torch.tensor([4.9, 5., -1., 0., 1.])  # 0 in the file
    cache = make_cache(tmp_path)
    cache.set_epoch(0)
    assert cache.take(6) is None
    cache.put(close)
    cache.save()
    close[0, 0] = 4.
    close[1] = float('nan')
    cache.set_epoch(0)
    assert cache.take(6) is None
    cache.put(close)
    with pytest.raises(TrainingError, match=r'--kd-label-cache .*: 2 of 12 labels are not the answers.*\(epoch 0\).'):
        cache.save()
    assert fill(make_cache(tmp_path), 0, LABELS)[3] == LABELS[3]


def test_answers_that_are_not_finite_are_not_kept(tmp_path):
    cache = make_cache(tmp_path)
    cache.set_epoch(0)
    assert cache.take(6) is None
    logits = logits_of(LABELS[0])
    logits[2, 1] = float('inf')
    cache.put(logits)
    cache.save()
    known = np.load(tmp_path / 'epoch0000-rank0.npy')[0] != MISSING
    assert known.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize('content', ['truncated', 'zip', 'header', 'other shape', 'other type', 'too many classes'])
def test_a_file_that_is_none_is_computed_again(content, tmp_path, caplog):
    fill(make_cache(tmp_path), 1, LABELS)
    path = tmp_path / 'epoch0001-rank0.npy'
    if content == 'truncated':
        path.write_bytes(path.read_bytes()[:-3])
    elif content == 'zip':
        path.write_bytes(b'PK\3\4' + path.read_bytes())
    elif content == 'header':
        path.write_bytes(path.read_bytes().replace(b'shape', b'sh\'pe'))
    else:
        np.save(path, dict(zip(['other shape', 'other type', 'too many classes'], [
            np.zeros((4, 5), np.uint16), np.zeros((4, 6), np.int64), np.full((4, 6), 5, np.uint16)]))[content])
    assert fill(make_cache(tmp_path), 1, LABELS) == {}
    assert 'epoch0001-rank0.npy has no labels of this run' in caplog.text
    assert fill(make_cache(tmp_path), 1, LABELS) == dict(enumerate(LABELS))


def test_labels_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    def fail(path, content):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(label_cache, 'write_bytes', fail)
    cache = make_cache(tmp_path)
    for epoch in (0, 1):
        fill(cache, epoch, LABELS)
    assert caplog.text.count('cannot be written') == 1 and 'No space left on device' in caplog.text


def test_every_option_of_the_images_is_compared():
    """A new flag of these groups must be named in `IMAGE_OPTIONS`, or here."""
    others = {
        'Data': 'data data_dir train_split val_split train_num_samples val_num_samples dataset_download class_map'
                ' target_key dataset_trust_remote_code workers pin_mem use_multi_epochs_loader worker_seeding',
        'Several image sizes': 'variable_batch_loss_scale',
        # input_size, mean, std and interpolation are compared as they are resolved
        'Input': 'img_size in_chans input_size crop_pct mean std interpolation validation_batch_size',
        'Augmentation': 'train_interpolation',
        'Loss and mixing': 'jsd_loss bce_loss bce_sum bce_target_thresh bce_pos_weight smoothing'}
    groups = {group.title: {action.dest for action in group._group_actions} for group in build_parser()._action_groups}
    for title, names in others.items():
        assert groups[title] - set(names.split()) <= set(IMAGE_OPTIONS), title
    assert set(IMAGE_OPTIONS) <= set().union(*groups.values())


@pytest.fixture
def prepare(image_folder, cnn, tmp_path):
    """Prepare a run of train.py up to the first step."""
    def call(*args, data=image_folder, teacher=cnn):
        train.prepare([str(arg) for arg in (
            data, *SMALL, '--kd-model-name', teacher, '--output', tmp_path / 'runs', '--kd-label-cache',
            tmp_path / 'labels', *args)])
    return call


def test_a_folder_knows_what_its_labels_belong_to(prepare, image_folder, cnn, tmp_path, caplog):
    prepare()
    with caplog.at_level(logging.INFO):
        prepare(  # these leave the images as they are
            '--epochs', '9', '--lr', '1', '--dearkd-beta', '1', '--dearkd-alpha', '0.1', '--dearkd-stage1-epochs', '1',
            '--workers', '1', '--model', 'dearkd_nano_patch4_32', '--drop-path', '0.1', '--smoothing', '0', '--amp',
            '--amp-dtype', 'bfloat16', '--dearkd-hooks', '1:1', '--grad-accum-steps', '2')
    assert 'has labels of 0 of 9 epochs' in caplog.text
    differences = (
        r'batch_size 8 → 4, seed 42 → 7, no_aug False → True, mixup 0.0 → 0.8, input_size \[3, 32, 32\] → \[3, 48, 48'
        r'\], train_interpolation random → bicubic')
    with pytest.raises(ValueError, match=f"^--kd-label-cache '.*/labels' has the labels of other images or of another"
                                         f' teacher: {differences}. Name another folder, or restore these options.$'):
        prepare('--seed', '7', '--mixup', '0.8', '-b', '4', '--img-size', '48', '--no-aug')
    with pytest.raises(ValueError, match='teacher: reprob 0.0 → 0.1, erasing_device None → cpu. Name'):
        prepare('--reprob', '0.1')
    other = shutil.copytree(image_folder, tmp_path / 'other')
    prepare(data=f'{other}/')  # the same files in another place
    (other / 'train' / 'rust' / '3.png').write_bytes((other / 'train' / 'rust' / '2.png').read_bytes() + b' ')
    with pytest.raises(ValueError, match=r'teacher: image_files 48 \(\d+ bytes, .*\) → 48 \(\d+ bytes, '):
        prepare(data=other)
    state = torch.load(cnn / 'last.pth.tar', weights_only=False)['state_dict']
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='teacher: teacher [0-9a-f]+ → [0-9a-f]+. Name'):
        prepare('--kd-teacher-checkpoint', tmp_path / 'other.pth')
    assert os.listdir(tmp_path / 'labels') == ['labels.json']


@pytest.mark.parametrize('args,message', [
    (['--kd-distill-type', 'logit'], '--kd-label-cache goes with --kd-distill-type dearkd, this run has logit'),
    (['--dearkd-alpha', '1'], '--kd-label-cache: this run uses no labels of the teacher.'),
    (['--dearkd-soft-labels'], '--kd-label-cache keeps hard labels.'),
    (['--kd-model-name', 'a'], "Unknown model 'a'"),
])
def test_runs_without_hard_labels_are_refused(args, message, prepare, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(*args)
    assert not (tmp_path / 'labels').exists()


def test_what_cannot_be_cached(tmp_path):
    task = make_task()
    args = Namespace(kd_label_cache=str(tmp_path / 'labels'), dataset='wds/cars')
    with pytest.raises(ValueError, match='the order of the stream wds/cars depends on the workers'):
        build_label_cache(args, Namespace(task=task), ChainDataset([]), {})
    task.get_eval_model().num_classes = 65536
    with pytest.raises(ValueError, match='--kd-label-cache takes up to 65535 classes, the teacher has 65536'):
        build_label_cache(args, Namespace(task=task), [], {})
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match="--kd-label-cache '.*file' cannot be used"):
        open_label_folder(str(tmp_path / 'file'), {})
    (tmp_path / 'file').unlink()
    for content in ('', '[1]', '{"images": []}'):
        (tmp_path / 'labels.json').write_text(content)
        with pytest.raises(ValueError, match='labels.json. cannot be read. Remove the folder'):
            open_label_folder(str(tmp_path), {})
    (tmp_path / 'labels.json').rename(tmp_path / 'photo.png')
    with pytest.raises(ValueError, match='has other files and no labels.json. Name another folder'):
        open_label_folder(str(tmp_path), {})
