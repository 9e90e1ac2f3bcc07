import pytest

from distill_hooks.errors import first_line, one_line


@pytest.mark.parametrize('error, first, whole', [
    (ValueError('no file\n  in here'), 'no file', 'no file in here'),
    (KeyError(), 'KeyError', 'KeyError'),
    (RuntimeError('x' * 700), 'x' * 700, 'x' * 600),
])
def test_errors_in_a_line(error, first, whole):
    assert (first_line(error), one_line(error)) == (first, whole)


def test_an_error_of_a_command_is_whole():
    assert one_line(RuntimeError('x\n' * 700), limit=None) == ' '.join('x' * 700)
