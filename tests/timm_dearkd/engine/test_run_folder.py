"""The run folder: created by one process, and locked against others until that process ends."""
import errno
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
from conftest import SMALL
from filelock import FileLock

from timm_dearkd.engine import run_folder
from timm_dearkd.engine.run_folder import RunFolder


@pytest.fixture()
def context():
    """Processes that need not import torch again, where the system can fork."""
    return multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn')


@pytest.fixture()
def short_wait(monkeypatch):
    monkeypatch.setattr(run_folder, 'WAIT_SECONDS', 0.2)


def create_unnamed(parent):
    folder = RunFolder(str(parent))
    return os.path.basename(folder.create('name'))


def test_runs_without_a_name_do_not_share_a_folder(context, tmp_path):
    """Eight processes that start in the same second."""
    with context.Pool(8) as pool:
        names = pool.map(create_unnamed, [tmp_path / 'train'] * 8, chunksize=1)
    assert sorted(names) == ['name', *(f'name-{i}' for i in range(2, 9))]


def hold(parent, connection):
    folder = RunFolder(str(parent), 'run')
    folder.create('')
    connection.send('locked')
    connection.recv()


@pytest.mark.parametrize('exists', [True, False])
def test_a_folder_is_refused_while_another_process_lives(exists, context, short_wait, tmp_path):
    """Whether it was there before the second process looked, or came in between; not after a SIGKILL."""
    second = RunFolder(str(tmp_path), 'run')
    if not exists:
        assert second.find_start('auto') == ''
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, theirs), daemon=True)
    process.start()
    assert ours.recv() == 'locked'
    before = {path.name for path in (tmp_path / 'run').iterdir()}
    message = f'run\' is in use: another process .PID {process.pid} on .* is writing into it'
    with pytest.raises(ValueError, match=message):
        second.find_start('auto') if exists else second.create('')
    second.discard()
    assert {path.name for path in (tmp_path / 'run').iterdir()} == before
    process.kill()
    process.join()
    with RunFolder(str(tmp_path), 'run') as third:
        assert third.find_start('') == '' and third.create('') == str(tmp_path / 'run')


LINGER = """import fcntl, os, signal, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
if os.fork() == 0:
    os.close(1)
    time.sleep(0.5)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='only forked processes inherit the lock')
def test_loader_processes_of_a_killed_run_do_not_block_the_next(tmp_path, caplog):
    """They inherit the lock, and live on for a while."""
    caplog.set_level('INFO')
    (tmp_path / 'run').mkdir()
    subprocess.run([sys.executable, '-c', LINGER, str(tmp_path / 'run' / '.lock')], stdout=subprocess.PIPE, check=False)
    with RunFolder(str(tmp_path), 'run') as folder:
        assert folder.find_start('') == ''
    assert 'is locked by another process. Waiting up to 10 s' in caplog.text


def test_a_run_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    """Another process has made, trained and left the folder since this one looked."""
    folder = RunFolder(str(tmp_path), 'run')
    assert folder.find_start('auto') == ''
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pth.tar').touch()
    with pytest.raises(ValueError, match='holds a run'):
        folder.create('')
    folder.discard()
    assert (tmp_path / 'run' / 'last.pth.tar').exists()


def test_a_failed_start_leaves_no_folder(tmp_path):
    folder = RunFolder(str(tmp_path), 'run')
    folder.create('')
    (tmp_path / 'run' / 'args.yaml').touch()
    folder.discard()
    assert not (tmp_path / 'run').exists()


def test_a_failed_start_leaves_no_folder_where_open_files_cannot_be_removed(monkeypatch, tmp_path):
    """As on Windows, where the lock file is open as long as the lock is held."""
    folder = RunFolder(str(tmp_path), 'run')
    folder.create('')
    (tmp_path / 'run' / 'args.yaml').touch()
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if os.path.basename(path) == run_folder.LOCK_NAME and folder._lock is not None:
            raise PermissionError(errno.EACCES, 'in use', path)
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, 'unlink', refuse)
    folder.discard()
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('error', [OSError(errno.ENOSYS, 'Function not implemented'), NotImplementedError()])
def test_a_file_system_without_locks_gets_a_warning(error, monkeypatch, tmp_path, caplog):
    def acquire(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, '_acquire', acquire)
    with RunFolder(str(tmp_path), 'run') as folder:
        assert folder.create('') == str(tmp_path / 'run')
    assert caplog.text.count('cannot be locked') == 1


def test_train_refuses_a_folder_in_use_and_evaluates_all_the_same(cnn, image_folder, short_wait, tmp_path, capsys):
    train = importlib.import_module('train')
    cnn = shutil.copytree(cnn, tmp_path / 'cnn')
    before = {path.name: path.stat().st_mtime_ns for path in cnn.iterdir()}
    command = [str(image_folder), *SMALL, '--model', 'test_resnet', '--output', str(tmp_path), '--experiment', 'cnn',
               '--resume', 'auto', '--epochs', '1']
    with RunFolder(str(tmp_path), 'cnn') as holder:
        holder.find_start('auto')
        with pytest.raises(SystemExit) as e:
            train.run_script(command)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert e.value.code == 2 and f"'{cnn}' is in use: another process (PID {os.getpid()} on " in last
        train.run_script([*command, '--eval-only'])
        assert '"top1"' in capsys.readouterr().out
    train.run_script(command)  # a finished run, which does not change
    after = {path.name: path.stat().st_mtime_ns for path in cnn.iterdir()}
    assert {**after, '.lock': 0} == {**before, '.lock': 0}
