import csv
import os

import pytest

from timm_dearkd.files import append_row, create_file, write_bytes


def test_rows_with_new_columns_keep_those_before(tmp_path):
    path = tmp_path / 'table.csv'
    for row in (dict(epoch=0, loss=1.5), dict(loss=1.25, epoch=1), dict(epoch=2, top1='9,5')):
        append_row(path, row)
    with open(path, newline='') as file:
        assert list(csv.reader(file)) == [
            ['epoch', 'loss', 'top1'], ['0', '1.5', ''], ['1', '1.25', ''], ['2', '', '9,5']]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'file'
    write_bytes(path, b'old')

    def fail(*args):
        raise OSError('no space left')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='no space'):
        write_bytes(path, b'new')
    assert path.read_bytes() == b'old' and os.listdir(path.parent) == ['file']


@pytest.mark.parametrize('has_links', [True, False])
def test_the_first_process_creates_a_file(has_links, tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'file'
    if not has_links:
        def fail(*args):
            raise OSError('not supported')

        monkeypatch.setattr(os, 'link', fail)
    create_file(path, b'first')
    create_file(path, b'second')
    if has_links:  # it may appear after the check whether it exists
        monkeypatch.setattr(type(path), 'exists', lambda path: False)
        create_file(path, b'third')
    assert path.read_bytes() == b'first' and os.listdir(path.parent) == ['file']
