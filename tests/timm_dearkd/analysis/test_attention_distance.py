import csv

import pytest
import timm
import torch

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.commands import run_command


def test_command(tmp_path, image_folder):
    pytest.importorskip('matplotlib')
    model = timm.create_model('test_dearkd', num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    main([
        'attention-distance', str(image_folder), '--model', 'test_dearkd', '--checkpoint',
        str(tmp_path / 'weights.pth'), '--num-images', '5', '--output', str(tmp_path / 'out')])
    with (tmp_path / 'out.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(model.blocks) * model.blocks[0].attn.num_heads
    size = model.patch_embed.patch_size[0]
    assert all(float(row['pixels']) == pytest.approx(size * float(row['patches']), abs=0.01 * size) for row in rows)
    assert (tmp_path / 'out.png').stat().st_size > 5000


ERRORS = {
    'folder': (['MISSING', '--model', 'test_dearkd', '--checkpoint', 'WEIGHTS'], 'No folder'),
    'empty': (['EMPTY', '--model', 'test_dearkd', '--checkpoint', 'WEIGHTS'], 'has no images'),
    'no attention': (['FOLDER', '--model', 'test_resnet', '--checkpoint', 'CNN'], 'no blocks with timm'),
    'weights of nothing': (['FOLDER', '--checkpoint', 'WEIGHTS'], '--checkpoint needs a model to measure'),
    'images of nothing': (['FOLDER', '--num-images', '3'], '--num-images needs a model to measure'),
    'count': (['FOLDER', '--model', 'test_dearkd', '--num-images', '0'], 'expected 1 or more'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors_are_one_line_and_status_2(case, image_folder, tmp_path, capsys):
    args, message = ERRORS[case]
    (tmp_path / 'empty').mkdir()
    torch.save(timm.create_model('test_dearkd', num_classes=2).state_dict(), tmp_path / 'weights.pth')
    torch.save(timm.create_model('test_resnet', num_classes=2).state_dict(), tmp_path / 'cnn.pth')
    replaced = {'MISSING': tmp_path / 'missing', 'EMPTY': tmp_path / 'empty', 'FOLDER': image_folder,
                'WEIGHTS': tmp_path / 'weights.pth', 'CNN': tmp_path / 'cnn.pth'}
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, ['attention-distance', *(str(replaced.get(a, a)) for a in args)])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
