"""The check for GPUs, at its toy size, with phases that fail, and with a device that is not there."""
import json
import math
import os
import signal
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu_check  # noqa: E402
import timing  # noqa: E402
from gpu_phases import NO_CUDNN, PHASES, Phase, phase2_precision, phase3_syncs, phase4_models, report  # noqa: E402
from gpu_phases.check import Check, at_least, at_most  # noqa: E402

pytestmark = pytest.mark.gpu_check
SCRIPT = ROOT / 'benchmarks' / 'gpu_check.py'
KEYS = {
    'start': {'environment', 'toy', 'device'},
    'row': {'value', 'unit', 'expected', 'ok', 'details'},
    'data': set(),
    'skip': {'reason'},
    'status': {'status', 'seconds', 'reason'},
}


def numbers(value):
    """All numbers in nested values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_toy_runs_every_phase_and_the_report_is_a_table(tmp_path):
    folder, document = tmp_path / 'out', tmp_path / 'table.md'
    result = run_python(SCRIPT, '--toy', '--out', folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in folder.iterdir()) == [f'phase{i}.jsonl' for i in range(8)]
    for phase in PHASES:
        lines = [json.loads(text) for text in (folder / f'phase{phase.number}.jsonl').read_text().splitlines()]
        assert (lines[0]['kind'], lines[-1]['kind'], lines[-1]['status']) == ('start', 'status', 'complete')
        assert any(line['kind'] == 'row' for line in lines)
        for line in lines:
            assert {'kind', 'phase', 'variant', 'name', *KEYS[line['kind']]} <= line.keys()  # no 'error'
            assert all(math.isfinite(number) for number in numbers(line))
            assert line['kind'] != 'row' or line['value'] is not None
        assert f'### {phase.number}. {phase.title}\n\nStatus: complete' in result.stdout
    assert '**FAIL**' not in result.stdout

    refused = run_python(SCRIPT, '--report', folder)
    assert refused.returncode == 2 and 'toy run' in refused.stderr
    assert run_python(SCRIPT, '--report', folder, '--output', document).returncode == 0
    text = document.read_text()
    assert text.count('\n### ') == 8 and 'Toy size' in text
    assert '| batches that differ after resuming | 0 of 3 | <= 0 | pass |' in text


@pytest.fixture
def run_phases(tmp_path, monkeypatch):
    """Run functions as phases, by number, and return the lines."""
    def run(budget=60., **functions):
        phases = []
        for name, function in functions.items():
            module = types.ModuleType(f'gpu_phases.fake_{name}')
            module.run = function
            monkeypatch.setitem(sys.modules, module.__name__, module)
            phases.append(Phase(int(name.removeprefix('phase')), f'fake_{name}', 10, name))
        gpu_check.Runner(tmp_path, budget, True, 'cpu', {'card': 'a card'}).run(phases)
        return report.read_lines(tmp_path)
    return run


def statuses(lines):
    return [line for line in lines if line['kind'] == 'status']


def test_a_phase_that_is_cut_off_keeps_its_lines_and_leaves_no_process(run_phases, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, 'LEAST_SECONDS', 1.)

    def hang(check):
        check.row('first', 1.5)
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / 'pid').write_text(str(pid))
        time.sleep(60)

    lines = run_phases(budget=2., phase1=hang, phase2=lambda check: check.row('second', 2.))
    assert [line['name'] for line in lines if line['kind'] == 'row'] == ['first', 'second']
    assert [line['status'] for line in statuses(lines)] == ['cut off', 'complete']
    assert '| first | 1.5 |' in report.render(lines) and 'cut off (after 1 s)' in report.render(lines)
    assert not report.passes(lines)
    pid, state = int((tmp_path / 'pid').read_text()), 'R'
    for _ in range(100):  # nobody here waits for it, so it may remain as a zombie
        try:
            state = Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[0]
        except FileNotFoundError:
            state = 'gone'
        if state in ('gone', 'Z'):
            break
        time.sleep(0.05)
    assert state in ('gone', 'Z')


def test_a_phase_that_dies_keeps_its_lines_and_the_table_says_how(run_phases):
    def crash(check):
        check.row('before', 1.)
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(check):
        with check.part('a part'):
            raise RuntimeError('no kernel\nfor this')
        check.row('after', float('nan'))
        raise ValueError('a reason')

    lines = run_phases(phase1=crash, phase2=fail)
    text = report.render(lines)
    assert 'Status: died (signal 9)' in text and 'Status: died (status 1: ValueError: a reason)' in text
    assert '| before | 1 |' in text and '| after | not finite |  | **FAIL** |' in text
    assert '| a part |  |  | **error** | RuntimeError: no kernel for this |' in text


def test_phases_run_again_without_cudnn_where_that_failed(run_phases):
    def speed(check):
        check.row('cuDNN is allowed', torch.backends.cuda.cudnn_sdp_enabled())

    lines = run_phases(
        phase1=lambda check: check.data('cudnn', cudnn_failed=True), phase2=lambda check: None, phase4=speed,
        phase7=speed)
    rows = [(line['phase'], line['variant'], line['value']) for line in lines if line['kind'] == 'row']
    assert rows == [(4, '', 1.), (4, NO_CUDNN, 0.), (7, '', 1.)]
    assert f'{NO_CUDNN}\n\nStatus: complete' in report.render(lines)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # in this process


def test_a_phase_that_cudnn_kills_counts_as_its_failure(run_phases):
    def be_killed(check):
        check.data('a kernel', cudnn='started')
        os.kill(os.getpid(), signal.SIGKILL)

    lines = run_phases(phase1=be_killed, phase4=lambda check: None)
    assert [(line['phase'], line['variant']) for line in statuses(lines)] == [(1, ''), (4, ''), (4, NO_CUDNN)]
    rest = [line for line in lines if line.get('cudnn') != 'started']
    assert report.has_cudnn_failure(lines) and not report.has_cudnn_failure(rest)


def test_a_check_that_measured_nothing_fails(run_phases):
    """But for the repetitions without cuDNN, which need not fit."""
    lines = run_phases(budget=0., phase1=lambda check: check.row('first', 1.))
    assert [line['status'] for line in statuses(lines)] == ['skipped'] and not report.passes(lines)
    assert not report.passes([])
    complete = run_phases(phase2=lambda check: check.row('second', 1.))
    complete = [line for line in complete if line['phase'] == 2]
    repeated = [{**line, 'variant': NO_CUDNN, 'status': 'skipped'} for line in complete if line['kind'] == 'status']
    assert report.passes([*complete, *repeated])


def test_memory_of_a_model_is_its_own(monkeypatch, tmp_path):
    """Not that of the models beside it, nor their gradients."""
    check = Check(4, tmp_path / 'lines', device_type='cpu')
    check.toy = True
    models = phase4_models.make_models('tiny', check)
    seen = []

    def peak_memory(function):
        function()
        seen.append({name for name, model in models.items() if any(p.grad is not None for p in model.parameters())})
        return sum(map(phase4_models.bytes_of, models.values())) / 2 ** 30

    monkeypatch.setattr(check, 'peak_memory', peak_memory)
    _, memory = phase4_models.time_models(check, models, phase4_models.make_images(1, check), True, 1)
    assert seen == [{name} for name in models]
    for name, model in models.items():
        assert memory[name] == pytest.approx(phase4_models.bytes_of(model) / 2 ** 30)


def test_time_that_is_left_is_shared_by_the_seconds_of_the_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, 'LEAST_SECONDS', 0.)
    runner = gpu_check.Runner(tmp_path, 100., True, 'cpu', {})
    jobs = [gpu_check.Job(phase) for phase in PHASES[4:]]  # 125, 90, 85 and 50 s
    assert runner.share(jobs[0], jobs[1:]) == pytest.approx(100 * 125 / 350, abs=0.1)
    assert runner.share(jobs[3], []) == pytest.approx(100, abs=0.1)


def test_lines_of_a_check_that_was_killed_make_a_table(tmp_path):
    check = Check(4, tmp_path / 'phase4.jsonl')
    check.write('start', 'Models', environment={'card': 'NVIDIA H100', 'torch': '2.11'}, toy=False, device='cuda')
    check.toy = False
    check.row('training, tiny', 0.95, 'x DeiT', at_least(0.97), is_speed=True)
    check.row('error', 0.5, mark=at_most(1))
    with open(check.path, 'a') as f:
        f.write('{"kind": "row", "na')
    document = tmp_path / 'performance.md'
    document.write_text((ROOT / 'docs' / 'performance.md').read_text())
    assert gpu_check.main(['--report', str(tmp_path), '--output', str(document)]) == 0
    text = document.read_text()
    assert 'card NVIDIA H100; torch 2.11' in text and 'cut off: the check itself was stopped' in text
    assert '| training, tiny | 0.95 x DeiT | >= 0.97 | **FAIL** |' in text and '| error | 0.5 | <= 1 | pass |' in text
    assert '## How it is made' in text and 'None yet.' not in text
    gpu_check.main(['--report', str(tmp_path), '--output', str(document)])
    assert document.read_text() == text


def test_phases_of_two_cards_are_not_one_table(tmp_path):
    for number, card in enumerate(('NVIDIA H100', 'NVIDIA H200')):
        Check(number, tmp_path / f'phase{number}.jsonl').write(
            'start', '', environment={'card': card}, toy=False, device='cuda')
    with pytest.raises(ValueError, match='they differ in card'):
        report.environment_of(report.read_lines(tmp_path))


def test_missing_and_old_packages_are_named_in_one_line(monkeypatch, capsys, tmp_path):
    versions = {'timm': '1.0.19', 'torch': '2.11.0+cu130', 'pillow': '13.0'}

    def version(name):
        if name == 'safetensors':
            raise gpu_check.importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, '99')

    monkeypatch.setattr(gpu_check.importlib.metadata, 'version', version)
    assert gpu_check.missing_packages() == {
        'timm': 'timm>=1.0.31,<1.1 (1.0.19 is installed)', 'safetensors': 'safetensors>=0.4 (not installed)',
        'pillow': 'pillow>=10.1,<13 (13.0 is installed)'}
    with pytest.raises(gpu_check.Failure, match='--wheels FOLDER'):
        gpu_check.import_packages(toy=True)


def test_wheels_are_importable_here_and_in_new_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('PYTHONPATH', 'elsewhere')
    wheels, place = tmp_path / 'wheels', tmp_path / 'unpacked'
    with pytest.raises(gpu_check.Failure, match='gpu-check-wheels'):
        gpu_check.unpack_wheels(wheels, place, ['gpu-check-probe'])
    wheels.mkdir()
    with zipfile.ZipFile(wheels / 'gpu_check_probe-1.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('gpu_check_probe.py', 'VALUE = 7')
        wheel.writestr('gpu_check_probe-1.0.dist-info/METADATA', 'Name: gpu_check_probe\nVersion: 1.0\n')
    (wheels / 'scipy-1.0-cp37-cp37m-win32.whl').touch()  # not missing, so it may be anything
    gpu_check.unpack_wheels(wheels, place, ['gpu-check-probe'])
    import gpu_check_probe
    assert gpu_check_probe.VALUE == 7 and gpu_check.importlib.metadata.version('gpu_check_probe') == '1.0'
    assert os.environ['PYTHONPATH'] == f'{place}{os.pathsep}elsewhere'


def test_without_a_gpu_the_full_size_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(gpu_check, 'import_packages', lambda toy: None)
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    for argv, message in ((['--out', str(tmp_path)], 'no CUDA device'), ([], 'Give --out FOLDER')):
        with pytest.raises(SystemExit) as e:
            gpu_check.main(argv)
        assert e.value.code == 2 and message in capsys.readouterr().err


class StubEvent:
    """A CUDA event on a clock that the test moves."""
    clock = 0.

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.time = StubEvent.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time  # milliseconds


def test_times_on_cuda_are_events_in_turns(monkeypatch):
    calls = []

    def work(name, milliseconds):
        calls.append(name)
        StubEvent.clock += milliseconds

    monkeypatch.setattr(torch.cuda, 'Event', StubEvent)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    functions = {'a': lambda: work('a', 3.), 'b': lambda: work('b', 5.)}
    seconds = timing.medians(functions, 2, torch.device('cuda'), warmup=1)
    assert calls == ['a', 'b'] * 3
    assert seconds == pytest.approx({'a': 3e-3, 'b': 5e-3})


@pytest.mark.parametrize('mode', ['error', 'warn'])
def test_synchronisations_are_looked_for_between_the_log_lines(tmp_path, monkeypatch, mode):
    modes, active = [], ['default']
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', lambda m: active.__setitem__(0, m))

    class Trainer:
        num_updates = 5
        on_update = None

        def train_epoch(self, epoch):
            for update in range(1, self.num_updates + 1):
                if epoch:
                    modes.append(active[0])
                if update == 3 and active[0] == 'error':
                    raise RuntimeError(phase3_syncs.SYNC)
                if update == 3 and active[0] == 'warn':
                    phase3_syncs.warnings.warn(phase3_syncs.SYNC, stacklevel=1)
                if self.on_update is not None:
                    self.on_update(epoch, update, update == self.num_updates)

    count, where = phase3_syncs.count_syncs(Trainer(), Check(3, tmp_path / 'lines', device_type='cuda'), mode)
    assert active == ['default'] and 'test_gpu_check.py' in where
    if mode == 'warn':
        assert modes == ['default', 'warn', 'warn', 'warn', 'default'] and count == pytest.approx(1 / 3)
    else:
        assert modes == ['default', 'error', 'error'] and count == 1


def test_the_card_is_described(monkeypatch):
    properties = types.SimpleNamespace(
        name='NVIDIA H100 80GB HBM3', total_memory=80 * 2 ** 30, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)
    monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: 91900)
    card = gpu_check.describe('cuda')
    assert (card['card'], card['memory'], card['compute capability']) == ('NVIDIA H100 80GB HBM3', '80 GiB', '9.0')


def test_scores_of_the_reference_are_those_of_eq_2():
    alpha, delta = torch.tensor([1.5, -0.5], dtype=torch.float64), torch.tensor([[1., 0.], [-2., 0.5]]).double()
    scores = phase2_precision.pair_scores(alpha, delta, (2, 3))
    assert scores.shape == (2, 7, 7) and not scores[:, 0].any() and not scores[:, :, 0].any()
    for head in range(2):
        for i in range(6):
            for j in range(6):
                d1, d2 = j // 3 - i // 3, j % 3 - i % 3
                along = float(delta[head, 0]) * d1 + float(delta[head, 1]) * d2
                expected = -float(alpha[head]) * (d1 ** 2 + d2 ** 2 - 2 * along)
                assert float(scores[head, i + 1, j + 1]) == pytest.approx(expected)
