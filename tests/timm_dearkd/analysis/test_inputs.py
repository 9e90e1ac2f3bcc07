"""Where the tools write, and what they do not write over."""
import os
import shutil

import pytest
import timm

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.commands import run_command
from timm_dearkd.engine.run_folder import save_folder

pytest.importorskip('matplotlib')


@pytest.fixture()
def folder(tmp_path, monkeypatch, image_folder):
    """The current folder, with the folder of a run in it."""
    monkeypatch.chdir(tmp_path)
    os.symlink(image_folder, tmp_path / 'images')
    run = tmp_path / 'out' / 'run'
    save_folder(timm.create_model('test_dearkd', num_classes=3, img_size=32), run)
    (run / 'args.yaml').write_text('model: test_dearkd\nepochs: 1\n')
    (run / 'summary.csv').write_text('epoch,train_loss\n0,1.5\n')
    (run / 'attention_distance.csv').write_text('epoch,layer,head,patches,pixels\n')
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


IMAGE = 'images/validation/grass/0.png'
TOOLS = {
    'predict': (['predict', IMAGE, '--model', 'out/run', '--device', 'cpu'], {'predictions.csv', 'predictions.png'}),
    'compare': (['compare', 'out/run', 'out/run/'], {'compare.csv', 'compare_epochs.csv', 'compare.png'}),
    'attention-map': (
        ['attention-map', IMAGE, '--model', 'local-dir:out/run', '--device', 'cpu'],
        {'attention_map.json', 'attention_map.png', 'attention_map_heads.png'}),
    'attention-distance': (
        ['attention-distance', 'images/validation', '--num-images', '1', '--model', 'out/run', 'out/run/', '--device',
         'cpu'], {'attention_distance.csv', 'attention_distance.png'}),
    'throughput': (
        ['throughput', 'local-dir:out/run', '-b', '1', '--rounds', '1', '--seconds', '0.01', '--device', 'cpu'],
        {'throughput.csv', 'throughput.png'}),
}


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_write_beside_the_run_and_beside_earlier_files(tool, folder, capsys):
    args, expected = TOOLS[tool]
    before = files(folder)
    main(args)
    new = files(folder) - before
    assert new == {f'out/run/analysis/{name}' for name in expected}
    out = capsys.readouterr().out
    assert all(name in out for name in new)
    for path in new:
        (folder / path).write_bytes(b'mine')
    main(args)
    prefix = os.path.commonprefix([name.partition('.')[0] for name in new])
    numbered = {f'{prefix}-2{name.removeprefix(prefix)}' for name in new}
    out = capsys.readouterr().out
    assert files(folder) - before - new == numbered and all(name in out for name in numbered)
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, [*args, '--output', str(folder / sorted(new)[0]).rpartition('.')[0]])
    output = capsys.readouterr()
    assert e.value.code == 2 and not output.out
    assert 'exists. Add --overwrite to replace it, or set another --output.' in output.err.strip().splitlines()[-1]
    assert all((folder / path).read_bytes() == b'mine' for path in new)
    main([*args, '--overwrite'])
    assert all((folder / path).read_bytes() != b'mine' for path in new)


def test_models_without_a_folder_write_into_the_current_one(folder, capsys):
    """Also where a folder has the name of a timm model."""
    shutil.copytree(folder / 'out' / 'run', folder / 'test_vit')
    before = files(folder)
    args = ['throughput', 'test_vit', 'local-dir:out/run', '-b', '1', '--rounds', '1', '--seconds', '0.01']
    main([*args, '--device', 'cpu'])
    assert files(folder) - before == {'throughput.csv', 'throughput.png'}


def test_a_page_elsewhere_is_not_written_over(folder, capsys):
    (folder / 'mine.html').write_text('mine')
    (folder / 'heads.png').write_text('mine')
    for options in (['--output', 'mine.html'], ['--pictures', '.']):
        with pytest.raises(SystemExit):
            run_command('analysis', main, ['report', 'out/run', *options])
        assert 'exists. Add --overwrite' in capsys.readouterr().err
    assert (folder / 'mine.html').read_text() == (folder / 'heads.png').read_text() == 'mine'
    for _ in range(2):  # the second time replaces the run's own page
        main(['report', 'out/run', '--num-images', '1', '--device', 'cpu'])
    assert (folder / 'out' / 'run' / 'report.html').stat().st_size > 1000


def test_diversity_does_not_write_over_a_file(folder, capsys):
    (folder / 'figures.json').write_text('mine')
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, ['diversity', 'images/validation', '--output', 'figures.json'])
    assert e.value.code == 2 and "'figures.json' exists" in capsys.readouterr().err
    assert (folder / 'figures.json').read_text() == 'mine'
