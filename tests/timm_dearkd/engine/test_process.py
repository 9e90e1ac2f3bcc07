import multiprocessing
import os
import select
import signal
import subprocess
import time

import pytest
import torch.distributed as dist
from conftest import run_python, start_python

from timm_dearkd.engine.process import Ranks, init_worker, on_primary

METHODS = multiprocessing.get_all_start_methods()


def work(connection):
    init_worker(None, 0)
    connection.send(os.getpid())
    time.sleep(100)


def start(method, connection):
    worker = multiprocessing.get_context(method).Process(target=work, args=(connection,))
    worker.start()
    return worker


def ask_primary(rank, store, results):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    ranks = Ranks(rank, 2)

    def fail():
        raise ValueError('of the primary')

    found = [on_primary(ranks, lambda: f'from {rank}')]
    try:
        on_primary(ranks, fail)
    except ValueError as e:
        found.append(str(e))
    results.put(found)
    dist.destroy_process_group()


def test_all_processes_get_the_result_or_the_error_of_the_primary(tmp_path):
    context = multiprocessing.get_context('fork' if 'fork' in METHODS else 'spawn')
    results = context.Queue()
    processes = [
        context.Process(target=ask_primary, args=(rank, tmp_path / 'store', results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [['from 0', 'of the primary']] * 2
    for process in processes:
        process.join(30)


@pytest.mark.parametrize('method', METHODS)
def test_workers_end_for_their_process(method):
    """Which has not forked them itself, under some start methods; and for no other, who may signal the whole group."""
    here, there = multiprocessing.Pipe()
    worker = start(method, there)
    try:
        pid = here.recv()
        if method != 'spawn':  # where libraries start threads, which take the signal, before the worker begins
            subprocess.run(['kill', str(pid)], check=True)
            worker.join(1)
            assert worker.is_alive()
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0 or method == 'spawn' and worker.exitcode == -signal.SIGTERM
    finally:
        worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize('method', sorted(set(METHODS) - {'fork'}))  # there, PyTorch looks for the parent
def test_workers_end_when_their_process_is_killed(method, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(f"""
import multiprocessing, time
from timm_dearkd.engine.process import init_worker

def work(connection):
    init_worker(None, 0)
    connection.send('ready')
    time.sleep(100)

if __name__ == '__main__':
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context('{method}').Process(target=work, args=(there,))
    worker.start()
    here.recv()
    print(worker.pid, flush=True)
    time.sleep(100)
""")
    process = start_python(script)
    pid = int(process.stdout.readline())
    process.kill()
    ended, _, _ = select.select([process.stdout], [], [], 30)  # the worker has the same output: it closes with both
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended and process.communicate()[0] == ''


@pytest.mark.slow
def test_a_run_with_loaders_of_the_fork_server_ends(image_folder, tmp_path):
    code = ("import multiprocessing; multiprocessing.set_start_method('forkserver')\n"
            'from timm_dearkd.train import run_script; run_script()')
    result = run_python(
        '-c', code, image_folder, '--model', 'test_dearkd', '--img-size', '32', '--epochs', '1', '-b', '8', '--device',
        'cpu', '--workers', '1', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'x' / 'model_best.safetensors').exists()
