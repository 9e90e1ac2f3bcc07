"""The folder of the stamps, from a stand-in of the package's."""
import pytest
from conftest import run_python
from PIL import Image

from reproduction.stamps import write_stamps


def test_files_of_all_levels_by_group(tmp_path):
    source = tmp_path / 'stamps'
    for i in range(6):
        for path in (f'animals/birds/{i}.png', f'animals/fish/{i}.png', f'medical/{i}.png', f'animals/{i}.svg'):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGBA', (3, 2), (i, 0, 0, 255)).save(source / path, format='PNG')
    write_stamps(tmp_path / 'images', source)
    found = {str(path.relative_to(tmp_path / 'images')) for path in (tmp_path / 'images').rglob('*.*')}
    assert found == {f'animals/{group}_{i}.png' for group in ('birds', 'fish') for i in range(6)}
    with Image.open(tmp_path / 'images/animals/fish_4.png') as image:
        assert image.getpixel((0, 0)) == (4, 0, 0, 255)
    assert {path.name for path in tmp_path.iterdir()} == {'stamps', 'images'}


def test_stamps_that_are_not_installed(tmp_path):
    with pytest.raises(FileNotFoundError, match='apt-get install tuxpaint-stamps-default'):
        write_stamps(tmp_path / 'images', tmp_path / 'none')
    (tmp_path / 'empty' / 'animals').mkdir(parents=True)
    result = run_python('reproduction/stamps.py', tmp_path / 'images', '--source', tmp_path / 'empty')
    assert result.returncode == 2 and 'no folder with 10 PNG files or more' in result.stderr
    assert not (tmp_path / 'images').exists()
