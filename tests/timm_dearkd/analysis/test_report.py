"""The report of runs that train.py makes here, as a browser's parser reads it."""
import csv
import json
import shutil
from html.parser import HTMLParser

import pytest
import timm
import torch
import yaml
from conftest import run_ranks
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_dearkd  # noqa: F401
from timm_dearkd.analysis.__main__ import main
from timm_dearkd.analysis.attention_distance import plot_over_epochs
from timm_dearkd.analysis.report import write_report
from timm_dearkd.commands import run_command
from timm_dearkd.distances import DistanceHistory, attention_distances, read_log

pytest.importorskip('matplotlib')

EVIL = '<img src=x onerror=alert(1)>&$_'


class Page(HTMLParser):
    """Tags with their attributes, text without style, and whether every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(path.read_text())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('img', 'meta', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != 'style':
            self.text.append(' '.join(data.split()))

    @property
    def words(self):
        return ' '.join(filter(None, self.text))

    def pictures(self):
        return [attrs for tag, attrs in self.tags if tag == 'img']

    def curves(self):
        return sum(tag == 'svg' for tag, _ in self.tags)


@pytest.fixture(scope='module')
def data(image_folder, tmp_path_factory):
    """The images, a class of which has the name of an attack."""
    root = tmp_path_factory.mktemp('data') / 'images & <b>'
    shutil.copytree(image_folder, root)
    for split in ('train', 'validation'):
        (root / split / 'blue sky').rename(root / split / EVIL)
    return root


@pytest.fixture(scope='module')
def dearkd_run(train_cli, cnn, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    result = train_cli(
        '--kd-model-name', cnn, '--output', out, '--experiment', '<i>run $1$', '--epochs', '3',
        '--dearkd-stage1-epochs', '2', '--track-attention-distance', '--report', data=data)
    assert result.returncode == 0, result.stderr
    assert '*** Report: ' in result.stderr
    return out / '<i>run $1$'


def test_the_page_of_a_run(dearkd_run):
    page = Page(dearkd_run / 'report.html')
    with (dearkd_run / 'summary.csv').open(newline='') as f:
        top1 = [float(row['eval_top1']) for row in csv.DictReader(f)]
    assert f'{max(top1):.2f} % best validation top-1' in page.words and f'{top1[-1]:.2f} % last' in page.words
    assert 'trained on 48 images of 3 classes' in page.words and 'for the first 2 epochs (stage I)' in page.words
    assert 'python train.py' in page.words and '--track-attention-distance' in page.words
    assert f'torch {torch.__version__}' in page.words
    # six curves, the distances and the heads
    assert page.curves() == 8 and page.words.count('stage II') >= 7 and 'block 4' in page.words
    mistakes = round(12 * (1 - max(top1) / 100))
    assert len(page.pictures()) == 12 + mistakes
    assert 'Top-1 is' in page.words and 'on 12 validation images' in page.words


def test_it_needs_nothing_else_and_runs_nothing(dearkd_run):
    page = Page(dearkd_run / 'report.html')
    assert not {'script', 'link', 'iframe', 'object', 'base'} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not any(name.startswith('on') for name in attrs), (tag, attrs)
        for name in ('src', 'href', 'xlink:href', 'data', 'action'):
            assert (attrs.get(name) or '#').startswith(('data:image/', '#')), (tag, attrs)
        assert 'url(' not in (attrs.get('style') or '') or 'url(#' in attrs['style']
    assert '@import' not in (dearkd_run / 'report.html').read_text()
    viewport = [attrs['content'] for tag, attrs in page.tags if tag == 'meta' and attrs.get('name') == 'viewport']
    assert viewport == ['width=device-width, initial-scale=1']
    assert any(attrs['alt'] == EVIL for attrs in page.pictures()) and EVIL in page.words


def test_distances_of_every_epoch_are_those_of_its_weights(dearkd_run, data):
    """The fixed batch are all 12 validation images; the last row is measured again from the exported student."""
    log, patch_size = read_log(dearkd_run)
    assert patch_size == 16
    assert list(log) == [0, 1, 2] and {len(heads) for layers in log.values() for heads in layers.values()} == {2}
    with (dearkd_run / 'summary.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    best = max(rows, key=lambda row: (float(row['eval_top1']), -int(row['epoch'])))
    model = timm.create_model(f'local-dir:{dearkd_run}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    paths = sorted((data / 'validation').rglob('*.png'))
    images = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    expected = attention_distances(model, images)
    assert torch.tensor([*log[int(best['epoch'])].values()]).sub(expected).abs().max() < 2e-3


def copy_run(run, folder, *without):
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns('*.pth.tar', 'report.html', *without))
    return folder


def read_report(folder):
    return Page(write_report(str(folder), device='cpu')).words


def test_a_run_that_still_goes_on(dearkd_run, tmp_path):
    folder = copy_run(dearkd_run, tmp_path / 'run')
    lines = (folder / 'summary.csv').read_text().splitlines()
    (folder / 'summary.csv').write_text('\n'.join([*lines[:2], lines[2][:9]]))
    (folder / 'attention_distance.csv').write_text('\n'.join([
        'epoch,layer,head,patches,pixels', '0,1,1,0.5,8', '0,1,2,0.6,9.6', '1,1,1,0.5,8', '1,1,2,0.']))
    words = read_report(folder)
    assert 'Not finished: 1 of 3 epochs.' in words and '1 / 3 epochs' in words and 'layer 1' in words
    assert list(read_log(folder).epochs) == [0]


def test_a_run_without_an_epoch(dearkd_run, tmp_path):
    missing = ('config.json', 'model_best.safetensors', 'summary.csv', 'attention_distance.csv')
    words = read_report(copy_run(dearkd_run, tmp_path / 'run', *missing))
    assert 'No finished epoch yet.' in words
    assert words.count('No model: the run has not finished an epoch') == 2
    assert 'Not recorded.' in words and '0 / 3 epochs' in words


def test_a_model_without_mhca_and_without_its_data(cnn, tmp_path):
    folder = copy_run(cnn, tmp_path / 'run', 'run.json')
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'data': str(tmp_path / 'gone')}))
    words = read_report(folder)
    assert 'The model has no MHCA.' in words and 'environment not recorded' in words
    assert 'The validation images could not be read: No data set at' in words


def test_mistakes_are_shown_with_what_they_are(dearkd_run, data, tmp_path):
    """The folders change names in a circle, so that what was right is a mistake now."""
    folder, images = copy_run(dearkd_run, tmp_path / 'run'), tmp_path / 'images'
    shutil.copytree(data, images)
    names = [EVIL, 'grass', 'rust']
    for name in names:
        (images / 'validation' / name).rename(images / 'validation' / f'was {name}')
    for name, new in zip(names, names[1:] + names[:1]):
        (images / 'validation' / f'was {name}').rename(images / 'validation' / new)
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'data': str(images)}))
    page = Page(write_report(str(folder), device='cpu'))
    top1 = float(page.words.split('Top-1 is ')[1].split(' %')[0])
    mistakes = round(12 * (1 - top1 / 100))
    assert mistakes >= 6 and len(page.pictures()) == 12 + mistakes
    table = page.words.split('label prediction images ')[1].split(' Commands and environment')[0]
    counts = [int(word) for word in table.split() if word.isdecimal()]
    assert sum(counts) == mistakes


def test_broken_weights_and_broken_images(dearkd_run, data, tmp_path):
    folder = copy_run(dearkd_run, tmp_path / 'run')
    images = tmp_path / 'images'
    shutil.copytree(data, images)
    for path in sorted((images / 'validation').rglob('*.png'))[1::2]:
        path.write_bytes(b'')
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'data': str(images)}))
    assert 'on 6 validation images; 6 cannot be read.' in read_report(folder)
    (folder / 'model_best.safetensors').write_bytes(b'cut short')
    assert 'The model could not be loaded' in read_report(folder)


def test_command(dearkd_run, tmp_path, capsys):
    main(['report', str(dearkd_run), '--output', str(tmp_path / 'page.html'), '--pictures', str(tmp_path / 'pictures'),
          '--num-images', '6', '--device', 'cpu'])
    assert capsys.readouterr().out.strip() == str(tmp_path / 'page.html')
    assert 'on 6 validation images, spread over all 12' in Page(tmp_path / 'page.html').words
    for name in ('curves', 'distances', 'heads'):
        with Image.open(tmp_path / 'pictures' / f'{name}.png') as picture:
            assert min(picture.size) > 200
    main(['attention-distance', str(dearkd_run), '--output', str(tmp_path / 'epochs')])
    assert (tmp_path / 'epochs.png').stat().st_size > 5000


@pytest.mark.parametrize('args, message', [
    (['report', 'NOWHERE'], 'No folder'),
    (['report', 'DATA'], 'args.yaml cannot be read'),
    (['report', 'RUN', '--num-images', '0'], "--num-images: 0, expected 1 or more"),
    (['attention-distance', 'CNN'], 'has no attention_distance.csv'),
])
def test_errors_are_one_line_and_status_2(args, message, dearkd_run, cnn, data, tmp_path, capsys):
    replaced = {'NOWHERE': tmp_path / 'nowhere', 'DATA': data, 'RUN': dearkd_run, 'CNN': cnn}
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, [str(replaced.get(arg, arg)) for arg in args])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_resumed_run_records_every_epoch_once(train_cli, tmp_path):
    """A run that is killed after an epoch's distances and before its checkpoint leaves rows that are made again."""
    args = ('--output', tmp_path, '--experiment', 'run', '--track-attention-distance')
    assert train_cli(*args, '--stop-epoch', '1').returncode == 0
    run = tmp_path / 'run'
    whole = (run / 'attention_distance.csv').read_text()
    (run / 'attention_distance.csv').write_text(whole + '1,1,1,9.9\n1,1,2,')
    assert train_cli(*args, '--resume', 'auto').returncode == 0
    rows = (run / 'attention_distance.csv').read_text().splitlines()
    assert len(rows) == 1 + 2 * 6 * 2 and '1,1,1,9.9' not in rows and rows[:13] == whole.splitlines()
    sessions = json.loads((run / 'run.json').read_text())['sessions']
    assert [session['epoch'] for session in sessions] == [0, 1] and '--resume auto' in sessions[1]['command']
    assert all(session['command'].startswith('python train.py ') for session in sessions)
    # it has its epochs; what is asked for now is the report
    result = train_cli(*args, '--resume', 'auto', '--report')
    assert result.returncode == 0 and (run / 'report.html').exists(), result.stderr


def test_a_report_of_two_processes(train_cli, tmp_path):
    """Written by the first one, which is in a process group then."""
    result = train_cli('--output', tmp_path, '--experiment', 'run', '--epochs', '1', '--report', start=run_ranks)
    assert result.returncode == 0, result.stderr
    words = Page(tmp_path / 'run' / 'report.html').words
    assert 'Top-1 is' in words and 'block 4' in words and 'torchrun --nproc_per_node 2 train.py' in words


def test_stage_2_is_not_shaded_in_a_figure_that_ends_before():
    history = DistanceHistory({0: {1: [0.5]}, 1: {1: [0.6]}}, 16)
    assert [len(plot_over_epochs(history, start).axes[0].patches) for start in (None, 5, 1)] == [0, 0, 1]


@pytest.mark.parametrize('args, message', [
    (['--model', 'test_resnet'], "no blocks with timm's Attention"),
    (['--val-split', ''], 'Set --val-split'),
])
def test_what_can_not_be_tracked_is_said_before_training(args, message, train_cli, tmp_path):
    result = train_cli('--output', tmp_path, '--track-attention-distance', *args)
    assert result.returncode == 2 and message in result.stderr.strip().splitlines()[-1]
