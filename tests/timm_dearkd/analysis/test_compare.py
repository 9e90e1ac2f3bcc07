import csv

import pytest
import yaml

from timm_dearkd.analysis.__main__ import main
from timm_dearkd.analysis.compare import compare_table, drawn_columns, plot_runs
from timm_dearkd.analysis.runs import open_run
from timm_dearkd.commands import run_command

pytest.importorskip('matplotlib')

HEADER = 'epoch,train_stage,train_loss,train_logit_loss,eval_loss,eval_top1,lr'
ROWS = ['0,1,3.5,2.2,,,1e-3', '1,1,3.1,2.1,2.0,20.5,1e-3', '2,2,2.1,,1.9,30.5,1e-3', '3,2,2.0,,1.8,29.5,1e-4']


@pytest.fixture()
def make_run(tmp_path):
    def make(name, rows=ROWS, header=HEADER, epochs=4, **args):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(yaml.safe_dump(dict(model='test_vit', epochs=epochs, **args)))
        if rows is not None:
            (folder / 'summary.csv').write_text('\n'.join([header, *rows][:1 + len(rows)]) + '\n')
        return str(folder)
    return make


def lines(figure):
    return {
        axes.get_title(): {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
        for axes in figure.axes if axes.get_title()}


def test_a_run_in_figures(make_run):
    run = open_run(make_run('whole', kd_model_name='cnn'))
    assert compare_table([run]) == [['whole', 'test_vit', 'cnn', 'finished', 'eval_top1', '30.5', '2', '29.5']]
    assert run.stage2_start == 2 and run.series('train_logit_loss') == ([0, 1], [2.2, 2.1])
    by_loss = open_run(make_run('by_loss', eval_metric='loss'))
    assert by_loss.best() == (3, 1.8)
    stages = make_run('stages', ['0,1,0.5,0.1', '1,2,0.75,0.2', '2,2,1.0,0.4', '3,2,1.0,0.3', '4,2,1.0,0.5'],
                      'epoch,train_stage,train_alpha,train_loss', epochs=5)
    assert open_run(stages).best() == (3, 0.3)  # as the one that is exported
    later = open_run(make_run('later', ROWS[3:], dearkd_stage1_epochs=2))  # resumed from another folder
    assert later.state == 'finished' and later.stage2_start == 2
    assert repr(run) == f'Run({str(run.folder)!r}, 4 epochs, top-1 30.5 %)'
    assert repr(open_run(make_run('going', []))).endswith("going', 0 of 4 epochs)")


def test_runs_that_are_not_like_the_others(make_run):
    """One that is being written to, one with an epoch, some with none, and one without a validation set."""
    runs = [open_run(folder) for folder in (
        make_run('_going', [*ROWS[:2], '2,2,2.1,,1.']), make_run('one', ROWS[1:2], epochs=1), make_run('empty', []),
        make_run('none', None), make_run('blind', ['0,3.5', '1,3.25'], 'epoch,train_loss', epochs=2))]
    assert [row[3:] for row in compare_table(runs)] == [
        ['2 of 4 epochs', 'eval_top1', '20.5', '1', '20.5'],
        ['finished', 'eval_top1', '20.5', '1', '20.5'],
        ['0 of 4 epochs', 'train_loss', '', '', ''],
        ['0 of 4 epochs', 'train_loss', '', '', ''],
        ['finished', 'train_loss', '3.25', '1', '3.25']]
    drawn = lines(plot_runs(runs, drawn_columns(runs)))
    assert drawn['validation top-1, %'] == {' _going': [1], 'one': [1]}
    assert drawn['training loss'] == {' _going': [0, 1], 'one': [1], 'blind': [0, 1]}
    assert drawn_columns(runs[2:4]) == []


def test_command(make_run, tmp_path, capsys):
    folders = [make_run('a$b_$'), make_run('second', ROWS[:3])]
    main(['compare', *folders, '--columns', 'eval_top1', 'lr', '--output', str(tmp_path / 'out')])
    with (tmp_path / 'out_epochs.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert [(row['run'], row['epoch']) for row in rows][3:5] == [('a$b_$', '3.0'), ('second', '0.0')]
    assert [row['eval_top1'] for row in rows[:4]] == ['', '20.5', '30.5', '29.5']
    with (tmp_path / 'out.csv').open(newline='') as f:
        assert [(row['run'], row['best']) for row in csv.DictReader(f)] == [('a$b_$', '30.5'), ('second', '30.5')]
    assert '| second | test_vit |  | 3 of 4 epochs |' in capsys.readouterr().out
    assert (tmp_path / 'out.png').stat().st_size > 5000


def test_runs_of_the_same_name_are_told_apart(make_run, tmp_path):
    for parent in ('x', 'y'):
        (tmp_path / parent).mkdir()
    runs = [open_run(make_run(name)) for name in ('x/seed0', 'y/seed0', 'other')]
    assert [row[0] for row in compare_table(runs)] == ['x/seed0', 'y/seed0', 'other']
    assert list(lines(plot_runs(runs, drawn_columns(runs)))['training loss']) == ['x/seed0', 'y/seed0', 'other']


def test_runs_without_an_epoch_have_a_table(make_run, tmp_path, capsys):
    main(['compare', make_run('empty', []), '--output', str(tmp_path / 'out')])
    assert 'no run has an epoch yet' in capsys.readouterr().out
    assert '0 of 4 epochs' in (tmp_path / 'out.csv').read_text() and not (tmp_path / 'out.png').exists()


@pytest.mark.parametrize('text', ['[]', '{"sess', '{"sessions": [], "epochs": 7}'])
def test_a_damaged_run_json_is_left_out(text, make_run, caplog):
    folder = make_run('run')
    with open(f'{folder}/run.json', 'w') as f:
        f.write(text)
    run = open_run(folder)
    assert run.num_epochs == (7 if '7' in text else 4)
    assert ('cannot be read' in caplog.text) == ('7' not in text)


@pytest.mark.parametrize('folders, message', [
    (['nowhere'], 'No folder'), (['bare'], 'args.yaml cannot be read'), (['list'], 'has no options'),
    (['whole', '--columns', 'eval_top9'], "no run has 'eval_top9'. Available: epoch, train_stage"),
])
def test_errors_are_one_line_and_status_2(folders, message, make_run, tmp_path, capsys):
    make_run('whole')
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'list').mkdir()
    (tmp_path / 'list' / 'args.yaml').write_text('- 1')
    with pytest.raises(SystemExit) as e:
        args = [str(tmp_path / arg) if arg.isalpha() else arg for arg in folders]
        run_command('analysis', main, ['compare', *args, '--output', str(tmp_path / 'out')])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / 'out.png').exists()
