import json
import math

import pytest
import timm
import torch
from PIL import Image

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.analysis.attention_map import attention_maps, head_positions
from timm_dearkd.commands import run_command


def test_parts_of_mhca_are_equation_3_in_a_slow_loop():
    """On a grid that is not square, so that rows and columns can't be mixed up."""
    model = timm.create_model('test_dearkd', img_size=(48, 80), num_classes=2).eval()  # 3x5 patches
    block = model.blocks[0]
    with torch.no_grad():
        block.attn.rpe.alpha.copy_(torch.tensor([0.7, 0.2]))
        block.attn.rpe.delta.copy_(torch.tensor([[0., 1.], [-1., 0.5]]))
    image = torch.randn(3, 48, 80)
    maps = attention_maps(model, image, layer=1, patch=(1, 2))

    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(image[None]))
        qkv = block.attn.qkv(block.norm1(tokens))[0].unflatten(1, (3, 2, -1)).double()
    query = 1 + 1 * 5 + 2
    for head in range(2):
        q = qkv[query, 0, head]
        alpha, (dy, dx) = block.attn.rpe.alpha[head].item(), block.attn.rpe.delta[head].tolist()
        content, position = [], []
        for key in range(16):
            content.append(float(q @ qkv[key, 1, head]) / math.sqrt(len(q)))
            row, column = divmod(key - 1, 5)
            y, x = row - 1, column - 2
            position.append(0. if key == 0 else -alpha * (y * y + x * x - 2 * (dy * y + dx * x)))
        for name, scores in (
                ('content', content), ('position', position), ('sum', [c + p for c, p in zip(content, position)])):
            expected = torch.tensor(scores).double().softmax(0)[1:].view(3, 5)
            torch.testing.assert_close(maps[name][head].double(), expected, atol=1e-5, rtol=1e-4)


def test_a_plain_vit_has_content_alone():
    model = timm.create_model('test_vit', num_classes=2).eval()
    maps = attention_maps(model, torch.randn(3, 160, 160), layer=2, patch=(0, 9))
    assert list(maps) == ['content'] and maps['content'].shape == (2, 10, 10)
    assert head_positions(model) == {}


def write_model(tmp_path, name, **kwargs):
    model = timm.create_model(name, num_classes=2, **kwargs)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    return model


@pytest.mark.parametrize('name', ['test_dearkd', 'test_vit'])
def test_command(name, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    model = write_model(tmp_path, name)
    Image.new('LA', (61, 37)).save(tmp_path / 'grey.png')
    main(['attention-map', str(tmp_path / 'grey.png'), '--model', name, '--checkpoint', str(tmp_path / 'weights.pth'),
          '--layer', '2', '--patch', '3', '4', '--output', str(tmp_path / 'out.v1')])
    numbers = json.loads((tmp_path / 'out.v1.json').read_text())
    assert numbers['layer'] == 2 and numbers['patch'] == [3, 4]
    assert (tmp_path / 'out.v1.png').stat().st_size > 3000
    with Image.open(tmp_path / 'grey.png') as image:
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        expected = attention_maps(model, transform(image.convert('RGB')), 2, (3, 4))
    torch.testing.assert_close({k: torch.tensor(v) for k, v in numbers['maps'].items()}, expected)
    has_mhca = name == 'test_dearkd'
    assert (tmp_path / 'out.v1_heads.png').exists() == has_mhca
    assert len(numbers['heads']) == (4 if has_mhca else 0)
    assert ('has no MHCA' in capsys.readouterr().out) != has_mhca


ERRORS = {
    'missing': (['nowhere.png'], 'No image at'),
    'broken': (['BROKEN'], 'cannot be read as an image'),
    'layer': (['IMAGE', '--layer', '7'], '--layer 7, expected 1 to 6'),
    'patch': (['IMAGE', '--patch', '0', '10'], 'a column from 0 to 9'),
    'two models': (['IMAGE', '--model', 'test_vit', 'test_dearkd'], 'expected one'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors_are_one_line_and_status_2(case, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    write_model(tmp_path, 'test_dearkd')
    Image.new('RGB', (40, 40)).save(tmp_path / 'image.png')
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    args, message = ERRORS[case]
    replaced = {'IMAGE': tmp_path / 'image.png', 'BROKEN': tmp_path / 'broken.png'}
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, [
              'attention-map', '--model', 'test_dearkd', '--checkpoint', str(tmp_path / 'weights.pth'),
              *(str(replaced.get(arg, arg)) for arg in args), '--output', str(tmp_path / 'out')])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob('out*'))
