import pytest

from distill_hooks.errors import first_line, one_line


@pytest.mark.parametrize('error, first, whole', [
    (ValueError('no file\n  in here'), 'no file', 'no file in here'),
    (KeyError(), 'KeyError', 'KeyError'),
    (RuntimeError('x' * 500), 'x' * 500, 'x' * 400),
])
def test_errors_in_a_line(error, first, whole):
    assert (first_line(error), one_line(error)) == (first, whole)
