import multiprocessing
import time

import pytest

from timm_dearkd.engine.interrupt import init_worker


def work(ready):
    init_worker(None, 0)
    ready.set()
    time.sleep(100)


@pytest.mark.parametrize('method', multiprocessing.get_all_start_methods())
def test_workers_end_when_their_process_asks_for_it(method):
    """Which has not forked them itself, under some start methods."""
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()
