import os
import shutil

import pytest
from filelock import FileLock

from timm_dearkd.engine.image_folder import scan_folder
from timm_dearkd.images import prepare_splits, split_images


@pytest.fixture
def flat(image_folder, tmp_path):
    """Classes of 16, 2 and 1 images, with the same file names in each."""
    root = tmp_path / 'flat'
    for name, count in (('blue sky', 16), ('grass', 2), ('rust', 1)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            shutil.copy(image_folder / 'train' / name / f'{i}.png', root / name)
    return root


def files(folder):
    return {split: {str(p.relative_to(folder / split)) for p in (folder / split).rglob('*.png')}
            for split in ('train', 'validation')}


def test_a_fifth_of_each_class_is_for_validation(flat, tmp_path):
    """Every image is in one split, with its own content; another seed draws others; nothing is copied."""
    split_images(scan_folder(str(flat)), tmp_path / 'a')
    split_images(scan_folder(str(flat)), tmp_path / 'b', seed=1)
    first, second = files(tmp_path / 'a'), files(tmp_path / 'b')
    assert first['train'] | first['validation'] == {str(p.relative_to(flat)) for p in flat.rglob('*.png')}
    assert not first['train'] & first['validation'] and first != second
    counts = {name: sum(path.startswith(name) for path in first['validation']) for name in os.listdir(flat)}
    assert counts == {'blue sky': 3, 'grass': 1, 'rust': 0}
    for split, paths in first.items():
        for path in paths:
            assert (tmp_path / 'a' / split / path).samefile(flat / path)


def test_the_same_images_keep_their_split_and_others_are_refused_after_a_run(flat, tmp_path):
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    before = files(tmp_path / 'split')
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert files(tmp_path / 'split') == before
    shutil.copy(flat / 'rust' / '0.png', flat / 'rust' / 'new.png')
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert set.union(*files(tmp_path / 'split').values()) - set.union(*before.values()) == {'rust/new.png'}
    (tmp_path / 'student').mkdir()
    (tmp_path / 'student' / 'args.yaml').write_text('')  # of a run that ended before its first checkpoint
    shutil.copy(flat / 'rust' / '0.png', flat / 'rust' / 'newer.png')
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    after = files(tmp_path / 'split')
    (flat / 'rust' / 'new.png').unlink()
    lock = FileLock(tmp_path / 'student' / '.lock')  # of a run in its first epoch
    with lock, pytest.raises(ValueError, match='not a split of the images'):
        split_images(scan_folder(str(flat)), tmp_path / 'split')
    (tmp_path / 'student' / 'last.pth.tar').touch()
    with pytest.raises(ValueError, match='not a split of the images.*another --output'):
        split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert files(tmp_path / 'split') == after and 'rust/newer.png' in set.union(*after.values())


@pytest.mark.parametrize('place', ['.', '..', '../..', 'inside', '../beside'])
def test_nothing_is_removed_or_overwritten(flat, tmp_path, place):
    """The split would be the images themselves, lie inside or around them, or replace a folder that exists."""
    (tmp_path / 'beside').mkdir()
    (tmp_path / 'beside' / 'results.csv').write_text('precious')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match='inside the images|not a split of the images'):
        split_images(scan_folder(str(flat)), flat / place)
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_files_beside_the_links_of_a_split_are_kept(flat, tmp_path):
    for place, content in (('split.json', '{"train": ["a"]}'), ('data/split.json', None)):
        folder = tmp_path / place.replace('.', '_') / 'data'
        if content:
            folder.mkdir(parents=True)
            (folder / 'split.json').write_text(content)
        else:
            split_images(scan_folder(str(flat)), folder)
            (folder / 'train' / 'grass' / 'mine.png').write_bytes(b'mine')
            shutil.copy(flat / 'rust' / '0.png', flat / 'rust' / 'new.png')
        before = sorted(folder.rglob('*'))
        with pytest.raises(ValueError, match='not a split of the images'):
            split_images(scan_folder(str(flat)), folder)
        assert sorted(folder.rglob('*')) == before


def test_an_interrupted_split_leaves_nothing(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'symlink', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        split_images(scan_folder(str(flat)), tmp_path / 'out' / 'data')
    assert not list((tmp_path / 'out').iterdir())


def test_images_are_copied_where_links_are_not_allowed(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'symlink', lambda *_: (_ for _ in ()).throw(OSError('no right')))
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    copy = next((tmp_path / 'split' / 'train').rglob('*.png'))
    assert not copy.is_symlink() and copy.read_bytes() == (flat / copy.parent.name / copy.name).read_bytes()


def test_a_folder_without_a_validation_split(flat, tmp_path, caplog):
    """`train` alone is split, and other folders are named; `val` alone is refused; a class may be called train."""
    caplog.set_level('INFO')
    root = tmp_path / 'root'
    shutil.copytree(flat, root / 'train')
    (root / 'test').mkdir()
    assert prepare_splits(str(root), str(tmp_path / 'a')) == str(tmp_path / 'a' / 'data')
    assert len(files(tmp_path / 'a' / 'data')['train']) == 15 and 'Ignored: test.' in caplog.text
    shutil.move(root / 'train', root / 'val')
    with pytest.raises(ValueError, match="split 'val'"):
        prepare_splits(str(root), str(tmp_path / 'b'))
    shutil.move(flat / 'rust', flat / 'train')
    prepare_splits(str(flat), str(tmp_path / 'c'))
    assert {path.name for path in (tmp_path / 'c' / 'data' / 'train').iterdir()} == {'blue sky', 'grass', 'train'}


def test_types_and_classes_that_the_user_names(flat, tmp_path, caplog):
    """Other types and classes are left out; a class map allows folders in class folders."""
    for path in sorted(flat.rglob('*.png'))[::2]:
        path.rename(path.with_suffix('.ppm'))
    prepare_splits(str(flat), str(tmp_path / 'a'), input_key='.ppm')
    found = [path.name for path in (tmp_path / 'a' / 'data').rglob('*.p*')]
    assert sorted(found) == sorted(path.name for path in flat.rglob('*.ppm')) and not caplog.text
    shutil.copytree(flat / 'grass', flat / 'blue sky' / 'grass')
    (tmp_path / 'classes.txt').write_text('blue sky\ngrass\n')
    prepare_splits(str(flat), str(tmp_path / 'b'), str(tmp_path / 'classes.txt'), '.png;.ppm')
    data = tmp_path / 'b' / 'data'
    linked = [path.resolve() for path in data.glob('*/grass/*')]  # two of each folder
    assert len(linked) == len(set(linked)) == 4 and all(path.parent.name == 'grass' for path in linked)
    assert {path.parent.name for path in data.glob('*/*/*')} == {'blue sky', 'grass'} and 'rust' in caplog.text


@pytest.mark.parametrize('change,message', [
    (lambda root: shutil.move(root / 'rust', root / 'grass' / 'rust'), 'folders in class folders'),
    (lambda root: (root / 'empty').mkdir(), 'has no images'),
    (lambda root: shutil.copy(root / 'rust' / '0.png', root), 'itself'),
    (lambda root: [path.unlink() for path in [*root.rglob('*.png')] if path.name != '0.png'], 'No class.*two images'),
    (shutil.rmtree, 'No folder'),
    (lambda root: [shutil.copytree(root / 'rust', root / x / 'rust') for x in ('train', 'Val')], "'Val' to 'val'"),
], ids=['nested', 'empty', 'loose image', 'one image each', 'no folder', 'capitals'])
def test_folders_that_are_no_classes_are_refused(flat, tmp_path, change, message):
    """As train.py refuses them, and before anything is written."""
    change(flat)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        prepare_splits(str(flat), str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()
