"""What is kept of the cells."""
from dataclasses import replace

from reproduction import cells
from reproduction.cells import SCALES, definition, teacher_cell
from reproduction.results import read_result
from reproduction.tables import TABLES


def test_an_odd_file_is_no_result(tmp_path, capsys):
    for text in ('', '{', '[]', '3', '{"top1": 3}'):
        (tmp_path / 'x.json').write_text(text)
        assert read_result(tmp_path / 'x.json') is None
        assert 'is not a result' in capsys.readouterr().err
    assert read_result(tmp_path / 'y.json') is None and not capsys.readouterr().err


def test_a_definition_tells_teachers_apart():
    scale = SCALES['small']
    cell = TABLES['table2'](scale, [0]).entries[-1].cells[0]
    other = replace(cell, needs=(replace(teacher_cell(scale), argv=('-c', scale.recipe)),))
    assert definition(cell) != definition(other)


def test_a_definition_has_what_a_command_leaves_of_its_recipe(monkeypatch):
    cell = cells.Cell('run', 'data', ('-c', 'recipe.yaml', '--warmup-epochs', '3'), 1.)

    def define(**recipe):
        monkeypatch.setattr(cells, 'read_yaml', lambda path: recipe)
        return definition(cell)

    assert define(epochs=10, warmup_epochs=1) == define(epochs=10, warmup_epochs=2) != define(epochs=11)
