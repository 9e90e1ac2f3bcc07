"""Labels of Hugging Face data sets, read from parquet files."""
import logging
import unicodedata

import datasets
import pytest
import timm
import torch
from PIL import Image

from timm_dearkd.engine.data import class_names, open_dataset, open_eval_dataset

datasets.disable_progress_bars()

NFC, NFD = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))


def make(folder, feature=None, column='label', **splits):
    """A data set whose images have the place of their label in the list as their grey value."""
    for split, labels in splits.items():
        features = datasets.Features({'image': datasets.Image(), column: feature or datasets.Value('int64')})
        rows = {'image': [Image.new('L', (8, 8), i) for i in range(len(labels))], column: labels}
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f'{split}-0.parquet')
    return f'hfds/{folder}'


def open_split(tmp_path, name, split='train', **kwargs):
    return open_dataset(name, str(tmp_path / 'cache'), split, **kwargs)


def test_text_becomes_sorted_classes(tmp_path, caplog):
    name = make(tmp_path / 'data', datasets.Value('string'), train=['dog', 'Ant', 'cat', 'dog'], test=['dog', 'cat'])
    caplog.set_level(logging.INFO)
    train_set = open_split(tmp_path, name, is_training=True)
    assert class_names(train_set) == ['Ant', 'cat', 'dog'] and [label for _, label in train_set] == [2, 0, 1, 2]
    assert 'no class names. The sorted labels' in caplog.text and 'Ant, cat, dog.' in caplog.text
    eval_set = open_eval_dataset(train_set, name, str(tmp_path / 'cache'), 'test')
    assert [label for _, label in eval_set] == [2, 1]


@pytest.mark.parametrize('feature, train, test', [
    (datasets.Value('string'), ['cafz', NFC, 'dog'], [NFD, 'dog', 'cafz', NFC]),
    (datasets.Value('string'), ['cafz', NFD, 'dog'], [NFC, 'dog', 'cafz']),
    (None, [0, 1, 2], [1, 2, 0]),
], ids=['text', 'text, decomposed in training', 'names of integers'])
def test_labels_are_equal_in_every_unicode_form(feature, train, test, tmp_path):
    kinds = [feature or datasets.ClassLabel(names=names) for names in (['cafz', NFC, 'dog'], ['cafz', NFD, 'dog'])]
    place = {split: make(tmp_path / split, kind, **{split: labels}) for split, kind, labels in (
        ('train', kinds[0], train), ('test', kinds[1], test))}
    train_set = open_split(tmp_path, place['train'])
    eval_set = open_eval_dataset(train_set, place['test'], str(tmp_path / 'cache'), 'test')
    assert class_names(train_set) == class_names(eval_set) and NFC in class_names(train_set)
    expected = [class_names(train_set)[label] for _, label in train_set]
    assert expected == ['cafz', NFC, 'dog']
    names = test if feature else [['cafz', NFC, 'dog'][label] for label in test]
    assert [class_names(train_set)[label] for _, label in eval_set] == [unicodedata.normalize('NFC', n) for n in names]


def test_integers_without_names_become_as_many_classes(tmp_path):
    name = make(tmp_path / 'data', train=[3, 1, 3], test=[3])
    train_set = open_split(tmp_path, name)
    assert class_names(train_set) == ['1', '3'] and [label for _, label in train_set] == [1, 0, 1]
    eval_set = open_eval_dataset(train_set, name, str(tmp_path / 'cache'), 'test')
    assert [label for _, label in eval_set] == [1]


def test_class_labels_stay_as_they_are(tmp_path):
    feature = datasets.ClassLabel(names=['dog', 'cat'])
    dataset = open_split(tmp_path, make(tmp_path / 'data', feature, train=[1, 0]))
    assert class_names(dataset) == ['dog', 'cat'] and [label for _, label in dataset] == [1, 0]
    (tmp_path / 'map.txt').write_text('cat\ndog\n')
    dataset = open_split(tmp_path, f'hfds/{tmp_path / "data"}', class_map=str(tmp_path / 'map.txt'))
    assert [label for _, label in dataset] == [0, 1]


@pytest.mark.parametrize('feature, labels, message', [
    (datasets.ClassLabel(names=['dog', 'cat']), [0, -1, -1, 1], '2 of 4 images in split .train. .* have no label'),
    (datasets.Value('string'), ['a', None], '1 of 2 images'),
    (datasets.Value('float32'), [0.5, 1.5], 'of type float, expected integers or text. Set --target-key'),
], ids=['unlabelled', 'missing', 'numbers'])
def test_labels_that_are_no_classes_are_refused(feature, labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path, make(tmp_path / 'data', feature, train=labels))


def test_other_columns_and_class_maps(tmp_path):
    name = make(tmp_path / 'data', datasets.Value('string'), column='animal', train=['dog', 'cat'])
    with pytest.raises(ValueError, match="no column 'label' .* Set --target-key to the column of the labels: animal"):
        open_split(tmp_path, name)
    assert class_names(open_split(tmp_path, name, target_key='animal')) == ['cat', 'dog']
    (tmp_path / 'map.txt').write_text('dog\n')
    with pytest.raises(ValueError, match='no entry for labels .*: cat'):
        open_split(tmp_path, name, target_key='animal', class_map=str(tmp_path / 'map.txt'))


@pytest.mark.slow
def test_train_takes_them(tmp_path, train_cli):
    name = make(tmp_path / 'data', datasets.Value('string'), train=['dog', 'cat'] * 8, validation=['cat', 'dog'] * 2)
    result = train_cli(
        '--dataset', name, '--model', 'test_resnet', '--epochs', '1', '--output', tmp_path, '--experiment', 'run',
        data=tmp_path / 'cache')
    assert result.returncode == 0, result.stderr
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == ['cat', 'dog'] and model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
