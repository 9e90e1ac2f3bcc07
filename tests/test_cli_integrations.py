"""DearKD's models in other people's tools, by the scripts in examples/."""
import os
import re
import subprocess

import pytest
import timm
import torch
from conftest import ROOT, run_python
from PIL import Image

import timm_dearkd  # noqa: F401


@pytest.fixture(scope='module')
def run_folder(train_cli, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    result = train_cli('--output', out, '--experiment', 'student', '--epochs', '1')
    assert result.returncode == 0, result.stderr
    return out / 'student'


def test_a_backbone_for_segmentation(run_folder):
    """One training step, and then some: the head has to learn where the shapes are."""
    result = run_python('examples/segmentation.py', run_folder, '--steps', '30')
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r'loss ([0-9.]+)', result.stdout)]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]


def test_any_script_knows_the_architectures(tmp_path, run_folder):
    """As timm's validate.py does it: no import of ours, a neighbour beside the script, and arguments."""
    (tmp_path / 'neighbour.py').write_text('NAME = "dearkd_nano_patch4_32"')
    (tmp_path / 'script.py').write_text('\n'.join([
        'import sys, timm, neighbour', 'assert __name__ == "__main__"',
        'print(timm.is_model(neighbour.NAME), sys.argv[1:])',
        'print(timm.create_model(sys.argv[2], pretrained=True).num_classes)']))
    result = run_python('-m', 'timm_dearkd', tmp_path / 'script.py', '--model', f'local-dir:{run_folder}')
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"True ['--model', 'local-dir:{run_folder}']", '3']
    cases = ((tmp_path / 'none.py',), 'Commands: distill'), (('run',), 'Expected: timm-dearkd run SCRIPT')
    for args, message in cases:
        result = run_python('-m', 'timm_dearkd', *args)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1]


@pytest.mark.integrations
def test_transformers(run_folder, tmp_path, image_folder):
    """The same logits, labels and preprocessing; saved, loaded, and fine-tuned on other classes."""
    transformers = pytest.importorskip('transformers')
    folder = run_folder / 'hub'
    result = run_python('-m', 'timm_dearkd.hub', 'push', run_folder, '--repo', 'someone/it', '--dry-run')
    assert result.returncode == 0, result.stderr
    photo = next((image_folder / 'validation' / 'grass').iterdir())
    result = run_python('examples/transformers_classify.py', folder, photo)
    assert result.returncode == 0, result.stderr

    ours = timm.create_model(f'local-dir:{run_folder}', pretrained=True).eval()
    theirs = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = Image.open(photo)
    pixels = processor(image, return_tensors='pt')['pixel_values']
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(ours))
    torch.testing.assert_close(pixels[0], transform(image))
    logits = theirs(pixel_values=pixels).logits
    torch.testing.assert_close(logits, ours(pixels))
    label = theirs.config.id2label[int(logits.argmax())]
    assert f'{photo}: {label}' in result.stdout and label in ('blue sky', 'grass', 'rust')

    theirs.save_pretrained(tmp_path / 'saved')
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / 'saved').eval()
    torch.testing.assert_close(again(pixel_values=pixels).logits, logits)
    other = transformers.TimmWrapperForImageClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True)
    other(pixel_values=pixels, labels=torch.tensor([4])).loss.backward()
    assert other.timm_model.blocks[0].attn.rpe.alpha.grad.abs().sum() > 0


@pytest.mark.integrations
def test_scripts_of_a_clone_of_timm(run_folder, image_folder, tmp_path):
    """TIMM_CLONE=DIR make test-integrations"""
    clone = os.environ.get('TIMM_CLONE')
    if not clone:
        pytest.skip('TIMM_CLONE names no clone of pytorch-image-models')
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        ['sh', ROOT / 'examples' / 'timm_scripts.sh', clone, run_folder, image_folder, '--device', 'cpu'],
        cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'predictions.csv').exists()
