import argparse
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from timm.task import ClassificationTask

from timm_dearkd.engine.checkpoints import AtomicCheckpointSaver, find_checkpoint, refuse_to_overwrite, resume_run
from timm_dearkd.engine.loop import LossMeter
from timm_dearkd.engine.process import Precision, TrainingError
from timm_dearkd.engine.run_folder import complete_export, export_model


def make_saver(folder, **kwargs):
    model = timm.create_model('test_resnet', num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return AtomicCheckpointSaver(model, optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)


def test_ranks_that_are_forgotten_count_by_recency(tmp_path):
    saver = make_saver(tmp_path, max_history=3, decreasing=True)
    for epoch, loss in ((8, 3.), (9, 1.), (10, 2.)):
        saver.save_checkpoint(epoch, loss)
    saver.restart_ranking()
    kept = []
    for epoch, loss in ((11, 5.), (12, 4.), (13, 6.)):
        assert saver.save_checkpoint(epoch, loss) == ((5., 11) if epoch == 11 else (4., 12))
        kept.append(sorted(int(path.name[11:-8]) for path in tmp_path.glob('checkpoint-*')))
    assert kept == [[9, 10, 11], [10, 11, 12], [11, 12, 13]]
    assert torch.load(tmp_path / 'model_best.pth.tar', weights_only=True)['epoch'] == 12


def save_epochs(saver, scores):
    """Checkpoints of these epochs, each with its number in the weights."""
    for epoch, score in enumerate(scores):
        torch.nn.init.constant_(saver.model.fc.bias, epoch)
        saver.save_checkpoint(epoch, score)


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='looks at what Linux says is mapped')
def test_a_resumed_run_lets_go_of_its_checkpoint(tmp_path):
    """Else the space of one that was replaced is not free before the end of the run."""
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3))
    optimizer = torch.optim.AdamW(task.trainable_module.parameters())
    task.trainable_module(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    saver = AtomicCheckpointSaver(
        task.trainable_module, optimizer, args=argparse.Namespace(model='test_resnet', opt='adamw'), task=task,
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.run_state.update(rng_states=[torch.get_rng_state()], progress=dict(
        update=5, images_per_update=4, meter=LossMeter().state_dict()))
    saver.save_recovery(1, 5)
    path = str(tmp_path / 'recovery-1-5.pth.tar')
    options = dict(model='test_resnet', opt='adamw')
    position = resume_run(path, task, options, optimizer, Precision(torch.device('cpu')), 4)
    assert (position.epoch, position.update) == (1, 5) and position.rng_states[0].equal(torch.get_rng_state())
    with open('/proc/self/maps') as f:
        assert path not in f.read()


def test_a_run_killed_before_the_best_checkpoint_was_replaced_has_it_when_resumed(tmp_path):
    """The student is exported again from it."""
    save_epochs(make_saver(tmp_path), [50., 60.])
    shutil.copy(tmp_path / 'model_best.pth.tar', tmp_path / 'before')
    saver = make_saver(tmp_path)
    saver.load_state_dict_from_checkpoint(tmp_path / 'last.pth.tar')
    torch.nn.init.constant_(saver.model.fc.bias, 2)
    saver.save_checkpoint(2, 70.)
    os.replace(tmp_path / 'before', tmp_path / 'model_best.pth.tar')
    for name in ('config.json', 'model_best.safetensors'):
        (tmp_path / name).touch()
    saver, exported = make_saver(tmp_path), []
    saver.load_state_dict_from_checkpoint(tmp_path / 'last.pth.tar')
    assert (saver.best_metric, saver.best_epoch) == (70., 2)
    assert torch.load(tmp_path / 'model_best.pth.tar', weights_only=True)['epoch'] == 2
    complete_export(str(tmp_path), lambda folder, state: exported.append(state['fc.bias'][0].item()), False)
    assert exported == [2.]


def test_only_the_newest_checkpoint_is_resumed_in_its_folder(tmp_path):
    saver = make_saver(tmp_path)
    save_epochs(saver, [50., 60., 55.])
    for name in ('last', 'checkpoint-2'):
        refuse_to_overwrite(str(tmp_path), str(tmp_path / f'{name}.pth.tar'))
    for name in ('model_best', 'checkpoint-0'):
        with pytest.raises(ValueError, match='is not the newest checkpoint of its run, last.pth.tar is. Resume it in'):
            refuse_to_overwrite(str(tmp_path), str(tmp_path / f'{name}.pth.tar'))
    torch.save(dict(weight=torch.ones(1)), tmp_path / 'weights.pth.tar')
    with pytest.raises(ValueError, match='is not the newest'):
        refuse_to_overwrite(str(tmp_path), str(tmp_path / 'weights.pth.tar'))
    refuse_to_overwrite(str(tmp_path / 'other'), str(tmp_path / 'checkpoint-0.pth.tar'))
    with pytest.raises(ValueError, match='holds a run. Resume it with --resume auto'):
        refuse_to_overwrite(str(tmp_path), '')


@pytest.mark.parametrize('name', ['last', 'model_best'])
def test_the_best_checkpoint_stays_where_the_ranks_lead_to_no_file(name, tmp_path):
    """Those of the epochs were removed by hand; the exported student stays too."""
    save_epochs(make_saver(tmp_path), [50., 90., 80.])
    for path in tmp_path.glob('checkpoint-*'):
        path.unlink()
    (tmp_path / 'config.json').touch()
    saver = make_saver(tmp_path)
    saver.load_state_dict_from_checkpoint(tmp_path / f'{name}.pth.tar')
    assert torch.load(tmp_path / 'model_best.pth.tar', weights_only=True)['epoch'] == 1 == saver.best_epoch
    assert saver.best_metric == 90. and (tmp_path / 'config.json').exists()


@pytest.mark.parametrize('hardlinks', [True, False])
def test_every_name_is_a_whole_file_at_any_moment(tmp_path, hardlinks):
    """A reader beside the writer never finds `last` or `model_best` missing or broken."""
    saver = make_saver(tmp_path, max_history=2)
    saver.can_hardlink = hardlinks
    saver.save_checkpoint(0, 0.)
    stop, problems, reads = threading.Event(), [], [0]

    def read():
        while not stop.is_set():
            for name in ('last', 'model_best'):
                try:
                    torch.load(tmp_path / f'{name}.pth.tar', weights_only=True)
                    reads[0] += 1
                except Exception as e:
                    problems.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    for epoch in range(1, 15):
        saver.save_checkpoint(epoch, float(epoch))
    stop.set()
    reader.join()
    assert not problems and reads[0] > 5
    assert torch.load(tmp_path / 'last.pth.tar', weights_only=True)['epoch'] == 14
    assert sorted(os.listdir(tmp_path)) == [
        'checkpoint-13.pth.tar', 'checkpoint-14.pth.tar', 'last.pth.tar', 'model_best.pth.tar']


def test_a_failed_write_leaves_the_files_that_were_there(tmp_path, monkeypatch):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, 1.)

    def full_disk(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(TrainingError, match='No space left on device.*--resume auto'):
        saver.save_checkpoint(1, 2.)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match='the disk is full.*--resume auto'):
        saver.save_checkpoint(1, 2.)
    monkeypatch.undo()
    for name in ('last', 'model_best'):
        assert torch.load(tmp_path / f'{name}.pth.tar', weights_only=True)['epoch'] == 0


def test_export_loads_as_it_is(tmp_path):
    model = timm.create_model('test_dearkd', num_classes=3, in_chans=1, img_size=48).eval()
    config = dict(
        input_size=(1, 48, 48), mean=(0.3,), std=(0.2,), interpolation='bilinear', crop_pct=0.8, crop_mode='center')
    export_model(model, str(tmp_path), model.state_dict(), data_config=config, label_names=['a', 'b', 'c'])
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model_best.safetensors']
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / 'model_best.safetensors').stat().st_mode & 0o777 == 0o666 & ~umask
    tensors = safetensors.torch.load_file(tmp_path / 'model_best.safetensors')
    assert all(v.equal(tensors[k]) for k, v in model.state_dict().items()) and len(tensors) == len(model.state_dict())

    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(loaded(x), model(x))
    cfg = loaded.pretrained_cfg
    assert cfg['label_names'] == ['a', 'b', 'c'] and cfg['mean'] == [0.3] and cfg['crop_pct'] == 0.8
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (1, 48, 48)


def test_the_checkpoint_furthest_on_is_found(tmp_path, caplog):
    assert find_checkpoint(str(tmp_path)) == '' == find_checkpoint(str(tmp_path / 'nowhere'))
    saver = make_saver(tmp_path, task=ClassificationTask(timm.create_model('test_resnet', num_classes=3)))

    def found():
        return os.path.basename(find_checkpoint(str(tmp_path)))

    def save_recovery(epoch, update):
        saver.run_state.update(progress=dict(update=update))
        saver.save_recovery(epoch, update)
        saver.run_state.clear()

    save_recovery(0, 5)
    assert found() == 'recovery-0-5.pth.tar'
    saver.save_checkpoint(0, 1.)
    assert found() == 'last.pth.tar'
    save_recovery(1, 9)
    save_recovery(1, 10)
    assert found() == 'recovery-1-10.pth.tar'
    assert not (tmp_path / 'recovery-0-5.pth.tar').exists()
    path = tmp_path / 'recovery-1-10.pth.tar'
    path.write_bytes(path.read_bytes()[:1000])
    assert found() == 'recovery-1-9.pth.tar' and 'recovery-1-10.pth.tar cannot be read' in caplog.text
    for path in (tmp_path / 'last.pth.tar', *tmp_path.glob('recovery-*')):
        path.unlink()  # it is the same file as that of its epoch
        path.write_bytes(b'')
    assert found() == 'model_best.pth.tar'  # the same as checkpoint-0
    (tmp_path / 'model_best.pth.tar').unlink()
    assert found() == 'checkpoint-0.pth.tar'
    for path in tmp_path.glob('*.pth.tar'):
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='No checkpoint in'):
        found()
