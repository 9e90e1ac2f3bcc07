import argparse
import ast
import configparser
import csv
import os
import runpy
from pathlib import Path

import pytest
import yaml
from timm.utils import ParseKwargs

from timm_dearkd.engine.options import (
    build_parser,
    find_config,
    parse_args,
    recipe_names,
    resolve_args,
)
from timm_dearkd.engine.process import TIMM_WORKERS
from timm_dearkd.train import _parse_args


def parse(*argv):
    return parse_args(argv)


@pytest.fixture
def config(tmp_path):
    def write(**options):
        path = tmp_path / 'config.yaml'
        path.write_text(yaml.safe_dump(options))
        return '-c', str(path)
    return write


# of timm 1.0.31
TABLE = list(csv.DictReader((Path(__file__).parent / 'timm_train_flags.tsv').read_text().splitlines(), delimiter='\t'))


@pytest.mark.parametrize('row', TABLE, ids=lambda row: row['flag'])
def test_flags_are_timms(row):
    """Names, types, argument counts and defaults, but for the first flags below, which are ours.

    The default of --workers depends on the CPU cores.
    """
    actions = {name: a for a in build_parser()._actions for name in (a.option_strings or [a.dest])}
    names = row['flag'].split()
    action = actions[names[0]]
    assert all(actions[name] is action for name in names)
    if names[0] in ('--kd-distill-type', '--device', '--pin-mem'):
        return
    kind = {'StoreTrue': (argparse._StoreTrueAction, argparse.BooleanOptionalAction), 'Store': argparse._StoreAction,
            'ParseKwargs': ParseKwargs}
    assert isinstance(action, kind[row['action']])
    if row['action'] == 'Store':
        assert (action.type or str).__name__ == row['type']
    if row['action'] != 'StoreTrue':
        assert str(action.nargs or '') == row['nargs']
    if names[0] == '-j':
        assert (action.default, TIMM_WORKERS) == (None, ast.literal_eval(row['default']))
    else:
        assert action.default == ast.literal_eval(row['default'])


def test_every_flag_has_a_line_of_help():
    """NaFlex' flags have none, because they are refused."""
    for action in build_parser()._actions:
        names = action.option_strings or [action.dest]
        assert action.help and len(action.help) <= 100 and '\n' not in action.help, names
        assert (action.help == argparse.SUPPRESS) == names[0].startswith('--naflex'), names


def test_the_page_of_the_options_is_current():
    docs = Path(__file__).parents[3] / 'docs'
    page = runpy.run_path(str(docs / 'generate_options.py'))['main']()
    assert page == (docs / 'options.md').read_text(encoding='utf-8'), 'Run python docs/generate_options.py.'


def test_the_command_line_wins_over_the_file(config):
    file = config(lr=1e-3, **{'weight-decay': 0.05}, mean=[0.5, 0.4], amp=True, model_kwargs=dict(depth=3), resume=None)
    args, _ = parse(*file, '--lr', '2', 'DIR')
    assert (args.lr, args.weight_decay, args.mean, args.amp, args.data) == (2., 0.05, [0.5, 0.4], True, 'DIR')
    assert args.model_kwargs == dict(depth=3) and args.resume == ''


@pytest.mark.parametrize('options', [dict(dearkd_hooks=['4']), dict(mean=[0.5]), dict(model_kwargs=dict(depth=3))])
def test_a_list_at_the_end_of_the_file_leaves_the_folder_alone(config, options):
    args, _ = parse(*config(**options), 'DIR')
    assert args.data == 'DIR' and all(getattr(args, key) == value for key, value in options.items())


@pytest.mark.parametrize('flags', [(), ('--no-dearkd-normalize-features',), ('--dearkd-normalize-features',)])
def test_arguments_are_written_as_a_file_that_reads_back(flags, tmp_path):
    args, text = parse(
        'DIR', '--model-kwargs', 'depth=3', 'x=a', '--mean', '0.5', '--opt-betas', '0.9', '0.95', '--amp',
        '--lr', '3e-4', '--dearkd-hooks', '2:1', '4:s2.b1', '--input-size', '1', '28', '28', *flags)
    path = tmp_path / 'args.yaml'
    path.write_text(text)
    again, _ = parse('-c', str(path))
    assert vars(again) == {**vars(args), 'data': None, 'data_dir': 'DIR'}
    assert again.dearkd_normalize_features == ('--no-dearkd-normalize-features' not in flags)


def test_a_tilde_is_the_home_folder(config, monkeypatch):
    """In a flag with an equals sign, in quotes and in a file, where no shell has replaced it."""
    monkeypatch.setenv('HOME', os.path.join(os.sep, 'home', 'me'))
    args, _ = parse(*config(resume='~/last.pth.tar'), '--output=~/runs', '~/photos')
    home = os.path.join(os.sep, 'home', 'me', '')
    assert (args.resume, args.output, args.data) == (f'{home}last.pth.tar', f'{home}runs', f'{home}photos')


def test_numbers_written_as_text(config):
    args, _ = parse(*config(lr='3e-4', epochs='7'))
    assert args.lr == 3e-4 and args.epochs == 7


def test_the_folder_of_the_command_line_wins_over_the_files(config):
    """In the file it is `data` or `data_dir`, and so in the args.yaml of the run."""
    for name in ('data', 'data_dir'):
        args, text = parse(*config(**{name: 'photos'}), 'other')
        assert (args.data, args.data_dir, yaml.safe_load(text)['data_dir']) == ('other', None, None)
        args, _ = parse(*config(**{name: 'photos'}), '--data-dir', 'third')
        assert args.data_dir == 'third'
        args, _ = parse(*config(**{name: 'photos'}))
        assert args.data_dir == 'photos'


def test_timms_own_arguments_ask_for_no_kind_of_distillation(config):
    """Its args.yaml has its default, logit, of whatever run."""
    assert parse(*config(kd_distill_type='logit'))[0].kd_distill_type is None
    assert parse(*config(kd_distill_type='logit', kd_model_name='resnet26'))[0].kd_distill_type == 'logit'
    assert parse(*config(kd_distill_type='token'))[0].kd_distill_type == 'token'


def test_switches_of_a_recipe_can_be_turned_off(config):
    args, _ = parse(*config(amp=True, channels_last=True), '--no-amp')
    assert args.channels_last and not args.amp


@pytest.mark.parametrize('key', ['torchcompile', 'save_images', 'amp', 'aa', 'mixup', 'resume'])
def test_false_in_the_file_switches_off(config, key):
    assert not getattr(parse(*config(**{key: False}))[0], key)
    assert parse(*config(dearkd_normalize_features=False))[0].dearkd_normalize_features is False


def test_true_in_the_file_is_the_flag_alone(config):
    for key in ('torchcompile', 'amp'):
        assert parse(*config(**{key: True}))[0] == parse(f'--{key}')[0]


@pytest.mark.parametrize('name', ['dearkd_300e', 'dearkd_300e.yaml', './recipes/dearkd_300e.yaml'])
def test_recipes_are_found_by_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'dearkd_300e').mkdir()  # a folder is no file of options
    args, text = parse('-c', name, 'DIR')
    assert (args.epochs, args.dearkd_stage1_epochs, args.opt) == (300, 250, 'adamw')
    assert text == parse('-c', str(find_config('dearkd_300e')), 'DIR')[1]


@pytest.mark.parametrize('name', ['dearkd_300e', 'recipes/dearkd_300e.yaml'])
def test_a_file_wins_over_the_recipe_of_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'recipes').mkdir()
    (tmp_path / name).write_text('epochs: 7')
    assert parse('-c', name)[0].epochs == 7


@pytest.mark.parametrize('name', ['dearkd_30e', 'recipes/other.yaml', 'mine/dearkd_300e.yaml', 'dearkd_300e.json'])
def test_an_unknown_recipe_is_one_line_with_the_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        parse('--config', name)
    assert e.value.code == 2
    assert capsys.readouterr().err == (
        f'train.py: error: --config is {name!r}, expected a YAML file or the name of a recipe: data_free, dearkd_1000e,'
        ' dearkd_300e, digits, finetune_cars, finetune_cifar10, finetune_cifar100, finetune_flowers, small_folder.\n')


def test_every_recipe_is_data_of_the_package():
    """Under the pattern that setup.cfg names."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[3] / 'setup.cfg')
    patterns = setup['options.package_data']['timm_dearkd'].split(', ')
    package = Path(__file__).parents[3] / 'timm_dearkd'
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert recipe_names() and {package / 'recipes' / f'{name}.yaml' for name in recipe_names()} <= packed


def test_unknown_keys_are_warned_about(config, caplog):
    parse(*config(learning_rate=1., dist_url=None))  # the latter as timm writes them, unset
    assert 'learning_rate' in caplog.text and 'dist_url' not in caplog.text


@pytest.mark.parametrize('options,message', [
    (dict(epochs='many'), 'epochs: invalid int value'),
    (dict(dearkd_stage2='other'), 'invalid choice'),
    (dict(amp='maybe'), 'amp is'),
    (dict(smoothing=False), 'smoothing: invalid float value'),  # it is on, and this is not how to switch it off
    (dict(dearkd_normalize_features='maybe'), 'dearkd_normalize_features is'),
    (dict(input_size=[1, 2]), 'expected 3 arguments'),
])
def test_wrong_values_are_one_line_and_status_2(config, capsys, options, message):
    with pytest.raises(SystemExit) as e:
        parse(*config(**options))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and message in err


@pytest.mark.parametrize('text', [b'lr: [', b'- just\n- a list', b'\xff\xd8\xff\xe0'])
def test_broken_files(tmp_path, capsys, text):
    path = tmp_path / 'broken.yaml'
    path.write_bytes(text)
    for file in (path, tmp_path / 'missing.yaml'):
        with pytest.raises(SystemExit) as e:
            parse('-c', str(file))
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1 and file.name in err


@pytest.mark.parametrize('flags,processes,expected', [
    ([], '1', 2), ([], '2', 1), ([], '8', 1), (['-j', '0'], '1', 0), (['-j', '3'], '1', 3), (['-j', '4'], '1', 4),
    (['--workers=4'], '2', 4)])
def test_default_workers_are_no_more_than_cores(flags, processes, expected, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
    assert resolve_args(_parse_args(['DIR', *flags])[0]).workers == expected
