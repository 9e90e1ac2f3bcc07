import subprocess
import sys

import pytest
import timm
import torch
from safetensors import SafetensorError

import timm_dearkd  # noqa: F401
from timm_dearkd.commands import run_command
from timm_dearkd.export import export, main

pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

SUFFIX = {'safetensors': '', 'onnx': '.onnx', 'torch-export': '.pt2'}


def make_model(**kwargs):
    """A small DearKD whose heads look somewhere else than at the start."""
    torch.manual_seed(1)
    model = timm.create_model('test_dearkd', **{'num_classes': 3, 'img_size': 64, **kwargs})
    for block in model.blocks[:4]:
        torch.nn.init.uniform_(block.attn.rpe.alpha, 0.1, 4)
        torch.nn.init.uniform_(block.attn.rpe.delta, -2, 2)
    return model.eval()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Weights at the model's own size."""
    path = tmp_path_factory.mktemp('weights') / 'dearkd.pth'
    torch.save(make_model(img_size=160).state_dict(), path)
    return path


# a process without this package, and for ONNX without PyTorch
READ = {
    'onnx': '''
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
print([session.run(None, {'images': numpy.load(path)})[0].tolist() for path in sys.argv[2:]])
''',
    'torch-export': '''
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
print([program(torch.from_numpy(numpy.load(path))).tolist() for path in sys.argv[2:]])
''',
}


@pytest.mark.slow
@pytest.mark.parametrize('kind, side', [('onnx', 96), ('torch-export', 160)])
def test_programs_run_elsewhere_with_any_batch(kind, side, checkpoint, tmp_path, capsys):
    """At the model's size and, by --img-size, at another one."""
    import numpy as np
    path = tmp_path / f'model{SUFFIX[kind]}'
    main(['test_dearkd', '--checkpoint', str(checkpoint), '--format', kind, '--output', str(path),
          *(['--img-size', str(side)] if side != 160 else [])])
    assert str(path) in capsys.readouterr().out and list(tmp_path.iterdir()) == [path]
    model = timm.create_model('test_dearkd', num_classes=3)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    model.set_input_size(side)
    batches = {str(tmp_path / f'{size}.npy'): torch.randn(size, 3, side, side) for size in (1, 5)}
    for file, images in batches.items():
        np.save(file, images.numpy())
    result = subprocess.run(
        [sys.executable, '-c', READ[kind], str(path), *batches], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for images, logits in zip(batches.values(), eval(result.stdout)):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(logits), model.eval()(images), atol=1e-4, rtol=1e-4)


def test_programs_hold_the_scores_as_a_constant(tmp_path):
    """The cheaper form: nothing is left of alpha and delta, and nothing works the scores out in a call."""
    onnx = pytest.importorskip('onnx')
    model = make_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, 'onnx', tmp_path / 'model.onnx', img_size=80)
    # the model itself stays as it is
    assert all(p.requires_grad for p in model.parameters()) and model.patch_embed.img_size == (64, 64)
    torch.testing.assert_close(model.state_dict(), expected)
    before = model(torch.ones(1, 3, 64, 64))
    torch.nn.init.zeros_(model.blocks[0].attn.rpe.alpha)
    assert not torch.allclose(model(torch.ones(1, 3, 64, 64)), before)
    graph = onnx.load(tmp_path / 'model.onnx').graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer]
    assert sum(shape[-3:] == (2, 26, 26) for shape in shapes) == 4  # a bias for each MHCA block
    biases = [onnx.numpy_helper.to_array(t) for t in graph.initializer if tuple(t.dims)[-3:] == (2, 26, 26)]
    assert min(bias.min() for bias in biases) >= -75  # further down lie denormals, at which CPUs crawl
    assert not any('rpe' in tensor.name and 'alpha' in tensor.name for tensor in graph.initializer)


@pytest.mark.parametrize('size, is_told', [(30, True), (32, False), (None, False)])
def test_pixels_that_the_model_ignores_are_told(size, is_told, tmp_path, caplog):
    model = timm.create_model('dearkd_nano_patch4_32', num_classes=3, patch_size=8)
    export(model, 'safetensors', tmp_path / 'model', size)
    assert ('ignores the last 6 rows and 6 columns. To use them, set --img-size 24 or 32.' in caplog.text) == is_told


@pytest.mark.slow
@pytest.mark.parametrize('kind', list(SUFFIX))
def test_a_copy_that_computes_something_else_is_not_kept(kind, tmp_path, monkeypatch):
    from timm_dearkd import export as module
    save, suffix = module.FORMATS[kind]

    def save_another(model, images, path):
        torch.nn.init.normal_(model.head.weight)
        return save(model, images, path)

    monkeypatch.setitem(module.FORMATS, kind, (save_another, suffix))
    path = tmp_path / f'model{suffix}'
    path.write_text('what was there before')
    with pytest.raises(ValueError, match='differs by .* from the original'):
        export(make_model(), kind, path)
    assert path.read_text() == 'what was there before' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('error', [RuntimeError, SafetensorError])
def test_errors_of_the_exporters_are_one_line(error, tmp_path, monkeypatch):
    from timm_dearkd import export as module

    def fail(model, images, path):
        path.write_bytes(b'half a file')
        raise error('no space\nleft')

    monkeypatch.setitem(module.FORMATS, 'safetensors', (fail, ''))
    with pytest.raises(ValueError, match='^no space left$'):
        export(make_model(), 'safetensors', tmp_path / 'model')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (['nothing'], "Unknown model 'nothing'"),
    (['test_dearkd', '--checkpoint', 'CHECKPOINT', '--img-size', '0'], "--img-size: 0, expected 1"),
    (['test_dearkd', '--checkpoint', 'CHECKPOINT', '--img-size', '33'], 'does not take images of --img-size 33'),
    (['test_dearkd', '--checkpoint', 'CHECKPOINT', '--output', 'FOLDER'], 'a folder with other files'),
    (['test_dearkd', '--checkpoint', 'CHECKPOINT', '--output', 'FILE'], "photo.jpg' exists. Add --overwrite"),
])
def test_errors_are_one_line_and_status_2(args, message, checkpoint, tmp_path, capsys):
    (tmp_path / 'photo.jpg').touch()
    replaced = {'CHECKPOINT': checkpoint, 'FOLDER': tmp_path, 'FILE': tmp_path / 'photo.jpg'}
    with pytest.raises(SystemExit) as e:
        run_command('export', main, [str(replaced.get(arg, arg)) for arg in args])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / 'photo.jpg').exists()
