import csv

import pytest
import timm
import torch

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis import throughput
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.commands import run_command
from timm_dearkd.engine.run_folder import save_folder


@pytest.mark.parametrize('name', ['test_vit', 'test_dearkd'])
def test_multiply_adds_are_those_counted_by_hand(name):
    model = timm.create_model(name, num_classes=7, img_size=64).eval()
    dim, tokens, hidden = model.embed_dim, 17, model.blocks[0].mlp.fc1.out_features
    block = 4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * hidden
    expected = 16 * 3 * 16 * 16 * dim + len(model.blocks) * block + 7 * dim
    assert throughput.count_macs(model, torch.zeros(1, 3, 64, 64)) == pytest.approx(expected, rel=0.02)


def test_models_take_turns_and_ratios_are_of_the_same_round(monkeypatch):
    """The machine is twice as slow in the second round. The second model is always at 4/5 of the first one's speed."""
    seconds = iter([0.01, 0.01, 0.10, 0.125, 0.20, 0.25, 0.10, 0.125])
    counts = []

    def take_time(forward, count, device):
        counts.append(count)
        return next(seconds)

    monkeypatch.setattr(throughput, '_time', take_time)
    first, second = throughput.measure_throughput(
        ['test_vit', 'test_vit2'], 2, torch.device('cpu'), img_size=32, rounds=3, seconds=0.1)
    assert counts == [1, 1] + [10] * 6
    assert first.seconds == [0.10, 0.20, 0.10] and second.seconds == [0.125, 0.25, 0.125]
    assert first.ratio == 1 and second.ratio == pytest.approx(0.8)
    assert first.images_per_second == pytest.approx(20) and second.latency == pytest.approx(0.125)
    assert first.params == sum(p.numel() for p in timm.create_model('test_vit', img_size=32).parameters())


@pytest.mark.slow
def test_every_model_and_batch_size_is_compiled_by_itself(monkeypatch):
    """More graphs than TorchDynamo keeps of a function by default (8), all of fixed shape."""
    graphs = []

    def count(graph, inputs):
        graphs.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor) and i.ndim == 4])
        assert not any(isinstance(i, torch.SymInt) for i in inputs)
        return graph.forward

    for batch_size in (1, 2, 3):
        throughput.measure_throughput(
            ['test_vit', 'test_vit2', 'test_vit3'], batch_size, torch.device('cpu'), 32, rounds=1, seconds=0.001,
            compile_backend=count)
    assert [shapes[0][0] for shapes in graphs] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_command(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    main(['throughput', 'test_vit', 'test_resnet', 'test_dearkd', '--batch-size', '1', '16', '--rounds', '2',
          '--seconds', '0.01', '--img-size', '64', '--device', 'cpu', '--output', str(tmp_path / 'out')])
    with (tmp_path / 'out.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert [(row['model'], row['batch']) for row in rows] == [
        (name, size) for size in ('1', '16') for name in ('test_vit', 'test_resnet', 'test_dearkd')]
    assert [row['ratio'] for row in rows if row['model'] == 'test_vit'] == ['1.00', '1.00']
    assert all(float(row['images/s']) > 0 and float(row['latency, ms']) > 0 for row in rows)
    out = capsys.readouterr().out
    assert sum(line.startswith('| test_') for line in out.splitlines()) == 6
    assert (tmp_path / 'out.png').stat().st_size > 3000


def test_a_run_folder_is_measured_as_it_was_trained(tmp_path):
    """Its size, patches and classes are those of its config.json, not those of its architecture."""
    pytest.importorskip('matplotlib')
    model = timm.create_model('test_dearkd', num_classes=3, img_size=32, patch_size=8)
    save_folder(model, tmp_path / 'student', data_config=dict(input_size=(3, 32, 32)))
    main(['throughput', str(tmp_path / 'student'), '--rounds', '1', '--seconds', '0.01', '--device', 'cpu'])
    with (tmp_path / 'student' / 'analysis' / 'throughput.csv').open(newline='') as f:
        row, = csv.DictReader(f)
    assert row['model'] == str(tmp_path / 'student')
    assert row['parameters, M'] == f'{sum(p.numel() for p in model.parameters()) * 1e-6:.2f}'
    assert row['GMACs'] == f'{throughput.count_macs(model, torch.zeros(1, 3, 32, 32)) * 1e-9:.2f}'


@pytest.mark.parametrize('args, message', [
    (['no_such_vit'], "Unknown model 'no_such_vit'"),
    (['CHECKPOINT'], 'is a file, expected a timm name or a run folder'),
    (['no/such/run'], "No folder 'no/such/run'"),
    (['test_vit', '--batch-size', '0'], "--batch-size: 0, expected 1"),
    (['test_vit', '--seconds', '0'], 'expected more than 0'),
    (['test_vit', '--seconds', 'nan'], 'expected more than 0'),
    (['test_vit', '--torchcompile', 'nonsense'], "--torchcompile is 'nonsense'"),
    (['test_vit', '--img-size', '33'], "'test_vit' does not take images of 33"),
])
def test_errors_are_one_line_and_status_2(args, message, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    torch.save(dict(arch='test_vit', state_dict={}), tmp_path / 'last.pth.tar')
    args = [str(tmp_path / 'last.pth.tar') if arg == 'CHECKPOINT' else arg for arg in args]
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, ['throughput', *args, '--device', 'cpu', '--output', str(tmp_path / 'out')])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
