"""The Hub's own client against a small Hub on loopback; each user is a process of its own."""
import importlib
import json
import os
import shlex
import shutil
import socket
import sys

import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import ROOT, SMALL, run_forked
from huggingface_hub import HfApi, ModelCard, constants

import timm_dearkd  # noqa: F401
from timm_dearkd.commands import run_command

sys.path.insert(0, str(ROOT / 'tests'))
from hub_server import TOKEN, serve  # noqa: E402


@pytest.fixture(scope='module')
def run_folder(train_cli, cnn, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    teaching = ('--kd-model-name', cnn, '--dearkd-stage1-epochs', '1')
    result = train_cli(*teaching, '--output', out, '--experiment', 'student')
    assert result.returncode == 0, result.stderr
    return out / 'student'


@pytest.fixture()
def hub():
    with serve() as (state, address):
        state.address = address
        yield state


@pytest.fixture()
def user(hub, tmp_path, monkeypatch):
    """A Python process with a cache of its own."""
    for name in ('HF_HUB_OFFLINE', 'TIMM_DEARKD_HUB'):
        monkeypatch.delenv(name, raising=False)

    def run(*args, cache='cache', **environment):
        environment = {
            'HF_ENDPOINT': hub.address, 'HF_TOKEN': TOKEN, 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DOWNLOAD_TIMEOUT': '1',
            'HF_HUB_ETAG_TIMEOUT': '1', 'HF_HOME': str(tmp_path / cache), **environment}
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return run_forked(*args, fresh=('huggingface_hub', 'timm'))  # which read the variables at import
    return run


LOGITS = '''
import sys, timm, torch, timm_dearkd
model = timm.create_model(sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    logits = model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).double().flatten().tolist()
print([logits, model.pretrained_cfg['label_names']])
'''


def test_push_pull_and_offline(run_folder, hub, user):
    model = timm.create_model(f'local-dir:{run_folder}', pretrained=True).eval()
    expected = model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).flatten().tolist()

    push = ('-m', 'timm_dearkd.hub', 'push', run_folder, '--repo', 'someone/dearkd_test')
    result = user(*push, '--dry-run')
    assert result.returncode == 0 and not hub.requests, result.stderr
    folder = run_folder / 'hub'
    assert result.stdout.strip() == str(folder)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(written) == {'README.md', 'config.json', 'curves.png', 'model.safetensors'}

    hub.repos['someone/public'] = dict(private=False, files={})
    result = user(*push[:-1], 'someone/public', '--private')
    assert result.returncode == 2 and 'exists and is public' in result.stderr.strip().splitlines()[-1]
    assert not hub.repos['someone/public']['files']
    result = user(*push, '--private')
    assert result.returncode == 0 and result.stdout.strip() == f'{hub.address}/someone/dearkd_test', result.stderr
    repo = hub.repos['someone/dearkd_test']
    assert {name: file['content'] for name, file in repo['files'].items()} == written
    assert repo['private'] and repo['files']['model.safetensors']['lfs'] and not repo['files']['config.json']['lfs']

    name = 'hf-hub:someone/dearkd_test'
    pulled = user('-c', LOGITS, name, cache='other')
    assert pulled.returncode == 0, pulled.stderr
    logits, names = eval(pulled.stdout)
    assert logits == pytest.approx(expected, abs=1e-5) and names == ['blue sky', 'grass', 'rust']
    count = len(hub.requests)
    offline = user('-c', LOGITS, name, cache='other', HF_HUB_OFFLINE='1')
    assert offline.stdout == pulled.stdout and len(hub.requests) == count


def test_the_card_is_that_of_the_run(run_folder):
    from timm_dearkd.hub import prepare_folder
    prepare_folder(str(run_folder), run_folder.parent / 'card', 'someone/dearkd_test', license='mit')
    card = ModelCard.load(run_folder.parent / 'card' / 'README.md')
    assert card.data.license == 'mit' and card.data.library_name == 'timm'
    result, = card.data.eval_results
    rows = [line.split(',') for line in (run_folder / 'summary.csv').read_text().splitlines()]
    top1 = max(float(row[rows[0].index('eval_top1')]) for row in rows[1:])
    assert result.metric_value == pytest.approx(top1 / 100, abs=1e-4)
    for text in ('test_dearkd', '**Training images:** 48', '**Teacher:** test_resnet', '**Stage I:** 1 epochs',
                 'curves.png', '**Stage II:** 1 epochs, anneal', "timm.create_model('hf-hub:someone/dearkd_test'",
                 '@inproceedings'):
        assert text in card.text, text
    assert str(run_folder.parent) not in card.content  # where its author keeps things


def test_the_card_names_the_split_and_no_accuracy_of_training_images(run_folder, tmp_path):
    from timm_dearkd.hub import prepare_folder
    for name, same in (('holdout', False), ('training', True)):
        folder = shutil.copytree(run_folder, tmp_path / name)
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'val_split': '/home/me/holdout'}))
        info = json.loads((folder / 'run.json').read_text())
        info['data']['validation_is_training'] = same
        (folder / 'run.json').write_text(json.dumps(info))
        prepare_folder(str(folder), tmp_path / f'{name} card', 'someone/test')
        card = ModelCard.load(tmp_path / f'{name} card' / 'README.md')
        assert '/home/me' not in card.content and ('Best eval' in card.text) != same
        assert [result.dataset_name.split(', ')[1] for result in card.data.eval_results or ()] == (
            [] if same else ['holdout split'])
    assert 'pip install PATH_TO_CLONE' in card.text and 'pip install timm-dearkd' not in card.text


def test_no_licence_is_claimed_that_nobody_gave(run_folder, cnn, image_folder, tmp_path):
    """Not that of our code or timm's. A licence that the user gave stays with runs that start from those weights."""
    from timm_dearkd.hub import main
    run_folder, cnn = (shutil.copytree(run, tmp_path / run.name) for run in (run_folder, cnn))
    for run, options, expected in ((run_folder, [], None), (cnn, [], None), (cnn, ['--license', 'mit'], 'mit')):
        main(['push', str(run), '--repo', 'a/b', '--dry-run', *options])
        card = ModelCard.load(run / 'hub' / 'README.md')
        config = json.loads((run / 'hub' / 'config.json').read_text())
        assert card.data.license == expected and config['pretrained_cfg'].get('license') == expected
    train = importlib.import_module('train')
    train.main([str(arg) for arg in (
        image_folder, *SMALL, '--epochs', '1', '--model', f'local-dir:{cnn / "hub"}', '--pretrained', '--output',
        tmp_path, '--experiment', 'tuned')])
    assert json.loads((tmp_path / 'tuned' / 'config.json').read_text())['pretrained_cfg']['license'] == 'mit'


@pytest.mark.parametrize('name, results, shown', [
    ('resnet50.a1_in1k', {'teacher_top1': 91.234}, 'resnet50.a1_in1k, top-1 91.23 %'),
    ('hf-hub:org/cnn', None, 'hf-hub:org/cnn'),
    ('CNN', {}, 'test_resnet'), ('local-dir:CNN', {'teacher_top1': None}, 'test_resnet'),
    ('CNN/last.pth.tar', {'other': 1.}, 'test_resnet'), ('CHECKPOINTS', [], 'test_resnet'),
    ('/home/bob/secret/cnn', {'teacher_top1': 50}, 'a model whose architecture is not recorded, top-1 50.00 %'),
    ('', {}, 'none'),
])
def test_the_teacher_is_an_architecture_and_no_path(name, results, shown, cnn, tmp_path):
    from timm_dearkd.analysis.runs import Run
    from timm_dearkd.hub import _teacher
    shutil.copy(cnn / 'last.pth.tar', tmp_path)
    name = name.replace('CNN', str(cnn)).replace('CHECKPOINTS', str(tmp_path))
    assert _teacher(Run(tmp_path, {'kd_model_name': name}, info={'results': results})) == shown


def test_weights_of_a_recipe_come_from_the_users_namespace(hub, user):
    name, tag = 'dearkd_tiny_patch16_224', 'in1k_300e'
    model = timm.create_model(name)
    hub.repos[f'lab/{name}.{tag}'] = dict(private=False, files={})
    content = safetensors.torch.save(model.state_dict())
    import hashlib
    hub.repos[f'lab/{name}.{tag}']['files']['model.safetensors'] = dict(
        content=content, oid=hashlib.sha256(content).hexdigest(), lfs=True)
    code = (f"import timm, timm_dearkd; m = timm.create_model({name!r}, pretrained=True);"
            " print(m.head.weight.double().sum().item(), m.pretrained_cfg['tag'])")
    result = user('-c', code, TIMM_DEARKD_HUB='lab')
    assert result.returncode == 0, result.stderr
    total, loaded_tag = result.stdout.split()
    assert float(total) == pytest.approx(model.head.weight.double().sum().item(), rel=1e-9) and loaded_tag == tag


def test_a_local_folder_needs_no_hub(run_folder):
    """Nor the packages that it comes with, of any version."""
    code = f"""import sys, timm, timm_dearkd
timm.create_model('local-dir:{run_folder}', pretrained=True)
assert 'timm_dearkd.hub' not in sys.modules and 'timm_dearkd.analysis' not in sys.modules"""
    result = run_forked('-c', code)
    assert result.returncode == 0, result.stderr


def test_without_a_namespace_a_line_says_what_to_do(monkeypatch):
    monkeypatch.delenv('TIMM_DEARKD_HUB', raising=False)
    for name, tag in (('dearkd_tiny_patch16_224', 'in1k_300e'), ('dearkd_base_patch16_384.in1k_300e_ft', '')):
        with pytest.raises(ValueError, match=f'TIMM_DEARKD_HUB to the Hub namespace that has {name}[.]?{tag}'):
            timm.create_model(name, pretrained=True)
    with pytest.raises(ValueError, match='No weights of dearkd_nano_patch4_32 are published. Train it') as e:
        timm.create_model('dearkd_nano_patch4_32', pretrained=True)
    assert 'TIMM_DEARKD_HUB' not in str(e.value)
    assert timm.list_pretrained('*dearkd*') == []


def test_tags_have_the_configuration_of_their_recipe():
    tags = set(timm.list_models('dearkd_*', include_tags=True))
    for size in ('tiny', 'small', 'base'):
        for tag in (f'dearkd_{size}_patch16_224.in1k_300e', f'dearkd_{size}_patch16_224.in1k_1000e',
                    f'dearkd_{size}_patch16_384.in1k_300e_ft'):
            assert tag in tags
            cfg = timm.get_pretrained_cfg(tag)
            assert cfg.mean == timm.data.IMAGENET_DEFAULT_MEAN and cfg.license == 'apache-2.0'
            assert cfg.input_size[-1] == (384 if tag.endswith('ft') else 224) and cfg.crop_pct == (
                1.0 if tag.endswith('ft') else 0.9)


@pytest.mark.parametrize('words, shown', [
    (['/home/bob/photos', '--data-dir=/home/bob/photos/'], ['photos', '--data-dir=photos']),
    (['--kd-model-name', 'output/clients/acme/cnn', '-coutput/acme/r.yaml'], ['--kd-model-name', 'cnn', '-cr.yaml']),
    (['acme/photos', '--kd-model-name', 'local-dir:acme/cnn', '-c', 'acme/x.yaml'],
     ['photos', '--kd-model-name', 'local-dir:cnn', '-c', 'x.yaml']),
    (['--kd-teacher-checkpoint=acme/a.pth', '--initial-ch', 'acme/b.pth', '--resume', 'acme/c.tar', '--class-map',
      'acme/d.txt', '--kd-class-map', 'acme/e.txt', '--pretrained-path', 'acme/f.pth', '--output', 'acme/out'],
     ['--kd-teacher-checkpoint=a.pth', '--initial-ch', 'b.pth', '--resume', 'c.tar', '--class-map',
      'd.txt', '--kd-class-map', 'e.txt', '--pretrained-path', 'f.pth', '--output', 'out']),
    (['--output', 'acme/a', '--output', 'acme/b', '--model=acme/run', '--val-split', '../acme/val'],
     ['--output', 'a', '--output', 'b', '--model=run', '--val-split', 'val']),
    (['C:\\Users\\bob\\photos', '--output=acme\\out', '--class-map', 'C:/Users/bob/map.txt'],
     ['photos', '--output=out', '--class-map', 'map.txt']),
    (['acme/photos', '--pretrained-cfg-overlay', 'file=acme/a.pth', 'num_classes=3'],
     ['photos', '--pretrained-cfg-overlay', 'file=a.pth', 'num_classes=3']),
    (['~/cnn', '--wandb-tags', '../../home/bob/x'], ['cnn', '--wandb-tags', 'x']),
    (['--model-kwargs', 'base=/home/bob/x', '--dataset', 'hfds//home/bob/x', "/home/bob's/my new\nphotos"],
     ['--model-kwargs', 'base=x', '--dataset', 'hfds/x', 'my new\nphotos']),
    (['--model', 'resnet50', '--kd-model-name', 'hf-hub:org/name', '--dataset', 'torch/fashion_mnist'], None),
    (['--option-of-another-version', 'acme/x', '--epochs', 'acme', '--output=acme/out'],
     ['--option-of-another-version', 'x', '--epochs', 'acme', '--output=out']),
])
def test_commands_of_the_card_have_no_folders(words, shown):
    """With the separators of POSIX and of Windows, absolute and relative, in all forms that argparse reads."""
    from timm_dearkd.hub import _public_command
    for start in (['python', 'train.py'], ['torchrun', '--nproc_per_node', '2', '-m', 'timm_dearkd.train'],
                  ['timm-dearkd', 'train']):
        assert shlex.split(_public_command(shlex.join(start + words))) == start + (shown or words)


def test_the_card_of_a_run_that_was_resumed_from_another_folder(run_folder, tmp_path):
    """Its summary.csv has only the later epochs: here one of stage II."""
    from timm_dearkd.hub import prepare_folder
    run = tmp_path / 'run'
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns('*.tar'))
    header, *rows = (run / 'summary.csv').read_text().splitlines()
    (run / 'summary.csv').write_text('\n'.join([header, rows[-1]]) + '\n')
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, 'grad_accum_steps': 4}))
    prepare_folder(str(run), run / 'hub', 'someone/dearkd_test')
    text = (run / 'hub' / 'README.md').read_text()
    assert '**Epochs:** 2\n' in text and '**Stage I:** 1 epochs\n' in text and '**Stage II:** 1 epochs,' in text
    assert f'{4 * args["batch_size"]} images per update' in text


def test_the_card_shows_no_private_folder(run_folder, tmp_path):
    from timm_dearkd.hub import prepare_folder
    run = tmp_path / 'run'
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns('*.tar'))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({
        **args, 'data': 'clients/acme/photos', 'dataset': 'wds/', 'model': 'local-dir:output/acme/start'}))
    info = json.loads((run / 'run.json').read_text())
    info['sessions'] = [dict(command=shlex.join(['python', 'train.py', *words])) for words in (
        ['clients/acme/photos', '--kd-model-name', 'output/acme/cnn'],
        ['D:\\clients\\acme\\photos', '--output=output\\acme'])]
    (run / 'run.json').write_text(json.dumps(info))
    prepare_folder(str(run), run / 'hub', 'someone/dearkd_test')
    text = (run / 'hub' / 'README.md').read_text()
    assert '\npython train.py photos --kd-model-name cnn\npython train.py photos --output=acme\n' in text
    assert '**Model:** test_dearkd\n' in text and '**Data:** photos\n' in text
    assert 'clients' not in text and 'output/' not in text


def test_the_card_of_a_cnn_that_is_not_finished(cnn, tmp_path):
    from timm_dearkd.hub import prepare_folder
    run = tmp_path / 'run'
    shutil.copytree(cnn, run, ignore=shutil.ignore_patterns('*.tar'))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, 'epochs': 9, 'kd_model_name': "/home/bob's cnn"}))
    (run / 'run.json').unlink()
    config = json.loads((run / 'config.json').read_text())
    config['pretrained_cfg']['license'] = 'cc-by-nc-4.0'
    (run / 'config.json').write_text(json.dumps(config))
    prepare_folder(str(run), run / 'hub', 'someone/cnn')
    card = ModelCard.load(run / 'hub' / 'README.md')
    assert card.data.license == 'cc-by-nc-4.0' and 'dearkd' not in card.data.tags
    assert 'An image classifier' in card.text and '1 of 9 epochs, not finished' in card.text
    assert '**Teacher:** a model whose architecture is not recorded' in card.text and 'bob' not in card.text
    assert '@inproceedings' not in card.text


# faults of the Hub, and parts of the messages
FAULTS = [
    ({'model.safetensors': 'corrupt'}, 'model.safetensors has the hash '),
    ({'model.safetensors': 'cut'}, 'was interrupted or timed out'),
    ({'model.safetensors': 'slow'}, 'HF_HUB_DOWNLOAD_TIMEOUT sets the timeout, now 1 seconds'),
    ({'model.safetensors': 404}, 'it does not exist, or is private'),
    ({'model.safetensors': 500}, 'an internal error (500)'),
]

# Each line on standard input is a JSON list of faults, cache and command; what became of it goes to standard output
LOAD = '''
import json, sys, time, urllib.request
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.01))  # the client waits longer and longer between its tries
import timm, timm_dearkd
for faults, cache in json.loads(sys.argv[2]):
    request = urllib.request.Request(sys.argv[1] + '/set-faults', json.dumps(faults).encode(), method='POST')
    urllib.request.urlopen(request).read()
    try:
        timm.create_model('hf-hub:someone/dearkd_test', pretrained=True, cache_dir=cache)
        print(json.dumps('loaded'))
    except Exception as e:
        print(json.dumps(f'{type(e).__name__}: {e}'))
'''


@pytest.mark.slow
def test_faults_are_said_and_leave_no_broken_file(run_folder, hub, user, tmp_path):
    assert user('-m', 'timm_dearkd.hub', 'push', run_folder, '--repo', 'someone/dearkd_test').returncode == 0
    whole = {file['content'] for file in hub.repos['someone/dearkd_test']['files'].values()}
    todo = [(faults, str(tmp_path / f'faults{i}')) for i, (faults, _) in enumerate(FAULTS)]
    result = user('-c', LOAD, hub.address, json.dumps([*todo, ({}, todo[0][1]), ({}, todo[1][1])]))
    assert result.returncode == 0, result.stderr
    said = [json.loads(line) for line in result.stdout.splitlines()]
    for i, (faults, message) in enumerate(FAULTS):
        assert message in said[i] and '\n' not in said[i], (faults, said[i])
        for root, _, names in os.walk(f'{tmp_path}/faults{i}'):
            for name in names:
                path = os.path.join(root, name)
                if '/snapshots/' in path or '/blobs/' in path and not name.endswith('.incomplete'):
                    with open(path, 'rb') as f:
                        assert f.read() in whole, (faults, path)
    assert said[-2:] == ['loaded'] * 2  # the next try finds all in order


@pytest.mark.slow
@pytest.mark.parametrize('faults, message', [
    ({'create': 401}, 'you are not logged in'),
    ({'preupload': 403}, 'no permission for this (403)'),
    ({'/commit/': 500}, 'an internal error (500)'),
])
def test_a_push_that_is_refused(faults, message, run_folder, hub, user, tmp_path):
    hub.faults = faults
    (tmp_path / 'sitecustomize.py').write_text(
        'import time\npause = time.sleep\ntime.sleep = lambda seconds: pause(min(seconds, 0.01))')
    code = (f'import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); import sitecustomize; '
            'runpy.run_module("timm_dearkd.hub", run_name="__main__")')
    result = user('-c', code, 'push', run_folder, '--repo', 'someone/other')
    assert result.returncode == 2 and message in result.stderr.strip().splitlines()[-1], result.stderr
    assert not hub.repos.get('someone/other', {}).get('files')


@pytest.mark.parametrize('offline, address', [
    (True, 'https://huggingface.co'), (False, 'http://127.0.0.1:9'), (False, 'http://no-such-host.invalid')])
def test_a_hub_that_cannot_be_reached(offline, address, monkeypatch):
    """A missing connection and a slow transfer have different messages. The resolver only resolves addresses."""
    from timm_dearkd.weights import HubError, hub_errors
    resolve = socket.getaddrinfo

    def resolve_addresses(host, *args, **kwargs):
        if host != '127.0.0.1':
            raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, 'getaddrinfo', resolve_addresses)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    with pytest.raises(HubError, match='the Hub cannot be reached .*Check the network connection') as e, \
            hub_errors('a/b'):
        HfApi(endpoint=address, token=TOKEN).create_repo('a/b')
    assert 'HF_HUB_DOWNLOAD_TIMEOUT' not in str(e.value)


@pytest.mark.parametrize('args, message', [
    (['push', 'NOWHERE', '--repo', 'a/b'], 'No folder'),
    (['push', 'EMPTY', '--repo', 'a/b'], 'the run has not finished an epoch'),
    (['push', 'TIMM', '--repo', 'a/b'], "from timm's own script"),
    (['push', 'CUT', '--repo', 'a/b', '--dry-run'], 'cannot be loaded'),
    (['push', 'RUN', '--repo', 'a b/c', '--dry-run'], 'Expected ORG/NAME'),
])
def test_errors_are_one_line_and_status_2(args, message, run_folder, tmp_path, capsys):
    from timm_dearkd.hub import main
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'args.yaml').write_text(yaml.safe_dump({'model': 'test_dearkd', 'epochs': 1}))
    run = tmp_path / 'run'
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns('*.tar'))
    shutil.copytree(tmp_path / 'empty', tmp_path / 'timm')
    (tmp_path / 'timm' / 'last.pth.tar').touch()
    shutil.copytree(run, tmp_path / 'cut')
    weights = (run / 'model_best.safetensors').read_bytes()
    (tmp_path / 'cut' / 'model_best.safetensors').write_bytes(weights[:1000])
    replaced = {name: tmp_path / name.lower() for name in ('NOWHERE', 'EMPTY', 'RUN', 'TIMM', 'CUT')}
    with pytest.raises(SystemExit) as e:
        run_command('hub', main, [str(replaced.get(arg, arg)) for arg in args])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]


