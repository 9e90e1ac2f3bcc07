"""train.py as users run it: in a process of its own, on a small image folder. Other teachers: test_cli_teacher.py."""
import importlib
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import yaml
from conftest import read_summary, run_process, run_python
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import save_for_hf
from timm.task import ClassificationEvaluator

import timm_dearkd  # noqa: F401
from timm_dearkd.hub import prepare_folder


def evaluate(model, data, split='validation'):
    config = resolve_model_data_config(model)
    mode = 'RGB' if config['input_size'][0] == 3 else 'L'
    loader = create_loader(
        create_dataset('', str(data), split=split, input_img_mode=mode), config['input_size'], 8, mean=config['mean'],
        std=config['std'], interpolation=config['interpolation'], crop_pct=config['crop_pct'], num_workers=0,
        device=torch.device('cpu'))
    evaluator = ClassificationEvaluator()
    model.eval()
    for images, labels in loader:
        evaluator.update(model(images), labels)
    return evaluator.compute()


@pytest.fixture(scope='module')
def run(train_cli, cnn, tmp_path_factory):
    """A DearKD run of 6 epochs, 4 of them stage I."""
    out = tmp_path_factory.mktemp('run')
    result = train_cli(
        '--kd-model-name', f'local-dir:{cnn}', '--epochs', '6', '--dearkd-stage1-epochs', '4', '--model-ema',
        '--model-ema-decay', '0.8', '--dearkd-rpe-drop', '0.1', '--mixup', '0.2', '--mixup-off-epoch', '5',
        '--drop-path', '0.1', '--log-interval', '3', '--workers', '1', '--output', out, '--experiment', 'dearkd',
        start=run_process)
    assert result.returncode == 0, result.stderr
    return out / 'dearkd', result.stderr


def test_output_folder(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert {'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'model_best.safetensors',
            'config.json'} <= names
    assert not [name for name in names if 'tmp' in name or name.endswith('.link')]
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['dearkd_stage1_epochs'] == 4 and args['model'] == 'test_dearkd'


def test_summary_has_the_stage_and_each_loss(run):
    table = read_summary(run[0])
    assert list(table[0]) == [
        'epoch', 'train_stage', 'train_alpha', 'train_loss', 'train_ce_loss', 'train_logit_loss', 'train_hidden_loss',
        'train_teacher_agreement', 'eval_loss', 'eval_top1', 'eval_top5', 'eval_teacher_top1', 'lr']
    assert [row['train_stage'] for row in table] == ['1'] * 4 + ['2'] * 2
    assert [float(row['train_alpha']) for row in table] == [0.5] * 4 + [0.75, 1.]
    assert [bool(row['train_hidden_loss']) for row in table] == [True] * 4 + [False] * 2
    assert [bool(row['train_logit_loss']) for row in table] == [True] * 5 + [False]
    for row in table:
        alpha = float(row['train_alpha'])
        parts = alpha * float(row['train_ce_loss']) + (1 - alpha) * float(
            row['train_logit_loss'] or 0) + 10 * float(row['train_hidden_loss'] or 0)
        assert float(row['train_loss']) == pytest.approx(parts, rel=1e-4)


def test_the_teacher_is_evaluated_beside_the_student(run, cnn, image_folder):
    """As timm evaluates it, and in every place that tells what the student is worth."""
    folder, log = run
    top1 = evaluate(timm.create_model(f'local-dir:{cnn}', pretrained=True), image_folder)['top1']
    assert [float(row['eval_teacher_top1']) for row in read_summary(folder)] == pytest.approx([top1] * 6)
    best = max(float(row['eval_top1']) for row in read_summary(folder))
    results = json.loads((folder / 'run.json').read_text())['results']
    assert results == dict(teacher_top1=pytest.approx(top1, abs=1e-3))
    assert f'Top-1: teacher {top1:.2f} %, student {best:.2f} %' in log
    assert log.count('Teacher: [') == 1
    assert len(re.findall(r'Epoch 0 took 0:00:\d\d. Expected end: about \d{4}-\d\d-\d\d \d\d:\d\d, in', log)) == 1


def test_every_log_line_has_the_stage_and_each_loss(run):
    lines = [line for line in run[1].splitlines() if line.startswith('Train:')]
    assert len(lines) == 1 + 6 * 2  # 6 batches an epoch, a line for every 3, and one for the run's first
    for line in lines:
        stage = 1 if int(line.split()[1]) < 4 else 2
        assert f'Stage: {stage}' in line and ' loss: ' in line and 'ce_loss: ' in line and 'LR: ' in line
        assert ('hidden_loss: ' in line) == (stage == 1)


def test_the_exported_student_is_the_best_one(run, image_folder):
    """It loads by timm with its classes and its size, holds nothing of the task, and scores what the summary says."""
    folder, _ = run
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.num_classes == 3 and model.pretrained_cfg['label_names'] == ['blue sky', 'grass', 'rust']
    assert resolve_model_data_config(model)['input_size'] == (3, 32, 32)
    assert set(model.state_dict()) == set(timm.create_model('test_dearkd', num_classes=3).state_dict())
    best = max(read_summary(folder), key=lambda row: float(row['eval_top1']))
    metrics = evaluate(model, image_folder)
    assert metrics['top1'] == pytest.approx(float(best['eval_top1']), abs=1e-3)
    assert metrics['loss'] == pytest.approx(float(best['eval_loss']), rel=1e-3)
    checkpoint = torch.load(folder / 'model_best.pth.tar', weights_only=False)
    exported = model.state_dict()
    assert all(v.equal(exported[k]) for k, v in checkpoint['state_dict_ema'].items())
    assert set(checkpoint['task_state']) == {'aligners', 'blocks', 'feature_std', 'head_dist', 'teacher'}


def test_resume_continues_the_run(run, train_cli, cnn, tmp_path):
    """From epoch 3 of a copy on: the epochs, stages and losses of the rest are in the summary, the first ones kept."""
    folder = tmp_path / 'dearkd'
    shutil.copytree(run[0], folder)
    before = read_summary(folder)
    result = train_cli(
        '-c', folder / 'args.yaml', '--resume', folder / 'last.pth.tar', '--epochs', '8', '--dearkd-stage1-epochs', '6',
        '--output', tmp_path, small=False)
    assert result.returncode == 0, result.stderr
    table = read_summary(folder)
    assert [row['epoch'] for row in table] == [str(e) for e in range(8)] and table[:6] == before
    assert [row['train_stage'] for row in table[6:]] == ['2', '2']
    optimizer = torch.load(folder / 'last.pth.tar', weights_only=False)['optimizer']
    assert {int(state['step']) for state in optimizer['state'].values()} >= {8 * 6}


def test_stop_milestones_and_automatic_resuming(train_cli, cnn, tmp_path):
    """A run that stops, goes on by itself, and is left as it is when it is done, is the run that never stopped."""
    common = ['--kd-model-name', f'local-dir:{cnn}', '--epochs', '4', '--val-interval', '3', '--save-epochs', '2',
              '--output', tmp_path, '--resume', 'auto', '--experiment']
    for _ in range(2):
        result = train_cli(*common, 'stopped', '--stop-epoch', '2')
        assert result.returncode == 0, result.stderr
    assert 'left as it is' in result.stderr
    assert [row['epoch'] for row in read_summary(tmp_path / 'stopped')] == ['0', '1']
    assert torch.load(tmp_path / 'stopped' / 'milestone-2.pth.tar', weights_only=False)['epoch'] == 1
    for name in ('stopped', 'whole'):
        result = train_cli(*common, name)
        assert result.returncode == 0, result.stderr
    stopped, whole = read_summary(tmp_path / 'stopped'), read_summary(tmp_path / 'whole')
    assert [row['lr'] for row in stopped] == [row['lr'] for row in whole]
    assert [row['train_stage'] for row in stopped] == [row['train_stage'] for row in whole]
    assert [bool(row['eval_top1']) for row in whole] == [False, True, True, True]


def test_train_fraction(train_cli, tmp_path):
    for keep, batches in (('epochs', 1), ('steps', 6)):
        result = train_cli(
            '--train-fraction', '0.25', '--fraction-keep', keep, '--epochs', '1', '--output', tmp_path,
            '--experiment', keep)
        assert result.returncode == 0, result.stderr
        assert 'Training on 12 images, 25 % of all.' in result.stderr and f'/{batches} (100%)]' in result.stderr


@pytest.mark.parametrize('args', [
    ['--batch-size', '1', '--epochs', '1'],
    ['--img-size', '48', '--no-prefetcher', '--grad-accum-steps', '4'],
    ['--in-chans', '1', '--channels-last', '--opt', 'sgd'],
    ['--amp', '--amp-dtype', 'bfloat16', '--clip-grad', '1', '--layer-decay', '0.7', '--cutmix', '1'],
    ['--kd-teacher-img-size', '64', '--dearkd-hooks', '2:1', '4:layer2', '--no-dearkd-normalize-features'],
    ['--dearkd-beta', '0', '--dearkd-stage2', 'ce', '--dearkd-stage1-epochs', '1', '--sched-on-updates'],
    ['--workers', '2', '--aug-splits', '2', '--jsd-loss', '--reprob', '0.5', '--aa', 'rand-m9-mstd0.5-inc1'],
    pytest.param(
        ['--model', 'dearkd_from', '--model-kwargs', 'base=test_vit', 'num_mhca_blocks=2', '--torchcompile', 'eager'],
        marks=pytest.mark.slow),
    ['--model-dtype', 'bfloat16', '--no-prefetcher', '--epochs', '1'],
    ['--model-ema', '--model-ema-force-cpu', '--sched', 'none', '--epochs', '1'],
    ['--recovery-interval', '2', '--save-images', '--val-interval', '2', '--checkpoint-hist', '1'],
    ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--train-batches-per-epoch', '7',
     '--train-size-schedule', 'progressive', '--variable-batch-loss-scale', 'sqrt', '--reprob', '0.3'],
    ['--aug-repeats', '3', '--drop-connect', '0.1', '--use-multi-epochs-loader', '--synchronize-step', '-j', '1'],
], ids=['batch 1', 'odd size', 'grey', 'amp', 'hooks', 'logits', 'augmix', 'from', 'dtype', 'ema on cpu', 'intervals',
        'sizes', 'repeats'])
def test_settings(args, train_cli, cnn, image_folder, tmp_path):
    """Each runs through, and what it exports scores what the summary says."""
    result = train_cli(
        '--kd-model-name', f'local-dir:{cnn}', *args, '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    evaluated = [row for row in read_summary(tmp_path / 'x') if row['eval_top1']]
    best = max(evaluated, key=lambda row: float(row['eval_top1']))
    model = timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True)
    assert ('it does not learn. Use --amp' in result.stderr) == ('--model-dtype' in args)
    low = '--amp' in args or '--model-dtype' in args  # the summary's loss was computed in bfloat16
    assert evaluate(model, image_folder)['loss'] == pytest.approx(float(best['eval_loss']), rel=0.02 if low else 1e-3)
    results = json.loads(result.stdout.split('--result\n')[1])
    assert {r['epoch'] for r in results} == {int(row['epoch']) for row in evaluated}


def test_an_earlier_checkpoint_is_resumed_in_another_folder(train_cli, tmp_path):
    """In its own folder it is refused, and nothing there changes."""
    folder = tmp_path / 'x'
    command = ('--epochs', '3', '--recovery-interval', '2', '--output', tmp_path, '--experiment')
    result = train_cli(*command, 'x')
    assert result.returncode == 0, result.stderr
    assert not list(folder.glob('recovery-*'))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}
    earlier = ('--resume', folder / 'checkpoint-0.pth.tar', '--lr', '1e-5')
    result = train_cli(*command, 'x', *earlier)
    assert result.returncode == 2 and 'Resume it in another --experiment' in result.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'} == before
    result = train_cli(*command, 'y', *earlier)
    assert result.returncode == 0, result.stderr
    assert [row['epoch'] for row in read_summary(tmp_path / 'y')] == ['1', '2']
    assert all(float(row['lr']) < 1e-5 for row in read_summary(tmp_path / 'y'))  # the rate given now


def test_going_on_with_a_checkpoint_of_another_name(run, train_cli, tmp_path):
    folder = tmp_path / 'dearkd'
    shutil.copytree(run[0], folder)
    (folder / 'last.pth.tar').rename(folder / 'kept.pth')
    for path in folder.glob('*.pth.tar'):
        path.unlink()
    command = ('-c', folder / 'args.yaml', '--output', tmp_path, '--epochs', '7', '--resume')
    result = train_cli(*command, folder / 'kept.pth', small=False)
    assert result.returncode == 0, result.stderr
    assert [row['epoch'] for row in read_summary(folder)] == [str(epoch) for epoch in range(7)]
    assert torch.load(folder / 'last.pth.tar', weights_only=False)['epoch'] == 6


def test_a_student_that_was_not_exported_is_in_the_end(run, train_cli, tmp_path):
    """As if the run had been killed between checkpoint and export, and while it wrote a row."""
    folder = tmp_path / 'dearkd'
    shutil.copytree(run[0], folder)
    weights = (folder / 'model_best.safetensors').read_bytes()
    for name in ('model_best.safetensors', 'config.json'):
        (folder / name).unlink()
    command = ('-c', folder / 'args.yaml', '--resume', 'auto', '--output', tmp_path)
    result = train_cli(*command, small=False)
    assert result.returncode == 0 and 'left as it is' in result.stderr
    assert (folder / 'model_best.safetensors').read_bytes() == weights and (folder / 'config.json').is_file()
    before = read_summary(folder)
    with (folder / 'summary.csv').open('a') as f:
        f.write('6,1,0.5')
    assert train_cli(*command, '--epochs', '7', small=False).returncode == 0
    assert read_summary(folder)[:6] == before and len(read_summary(folder)) == 7


def test_more_classes_than_folders_and_split_batch_norm(train_cli, image_folder, tmp_path):
    """The exported student loads, with a name for each class, and is in the report; what spoils short runs is said."""
    result = train_cli(
        '--model', 'test_resnet', '--num-classes', '5', '--aug-splits', '3', '--jsd-loss', '--split-bn', '--report',
        '--warmup-epochs', '5', '--model-ema', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    assert 'All of the 2 epochs are warm-up' in result.stderr and 'Set --model-ema-warmup' in result.stderr
    model = timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == [
        'blue sky', 'grass', 'rust', '(no folder, class 3)', '(no folder, class 4)']
    best = max(read_summary(tmp_path / 'x'), key=lambda row: float(row['eval_top1']))
    assert evaluate(model, image_folder)['loss'] == pytest.approx(float(best['eval_loss']), rel=1e-3)
    report = (tmp_path / 'x' / 'report.html').read_text()
    assert 'blue sky' in report and 'could not be read' not in report


def test_starting_from_an_exported_model(run, train_cli, tmp_path):
    """Its architecture, size and channels come from the folder; the weights with --pretrained, or from a file."""
    model, file = f'local-dir:{run[0]}', run[0] / 'model_best.safetensors'
    before = timm.create_model(model, pretrained=True).state_dict()
    for name, args in (('folder', ['--model', model, '--pretrained']), ('file', ['--pretrained-path', file])):
        result = train_cli(
            *args, '--lr', '0', '--warmup-lr', '0', '--epochs', '1', '--output', tmp_path, '--experiment', name)
        assert result.returncode == 0, result.stderr
        after = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).state_dict()
        changed = {k for k, v in before.items() if not v.equal(after[k])}
        assert 'with new weights' not in result.stderr
        assert changed == (set() if name == 'folder' else {'head.weight', 'head.bias'})  # timm's, for a new task


def test_an_exported_model_without_its_weights_is_said(train_cli, cnn, tmp_path):
    result = train_cli('--model', f'local-dir:{cnn}', '--epochs', '1', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    assert 'gives only the architecture. The weights are new. To load its weights, add --pretrained.' in result.stderr


def test_the_first_head_weights_of_both_heads(image_folder, tmp_path, monkeypatch):
    """A distilled ViT has two; with a scale of 0 both give their bias."""
    train = importlib.import_module('train')
    made = []
    monkeypatch.setattr(train, 'create_model', lambda *args, **kwargs: made.append(
        timm.create_model(*args, **kwargs)) or made[0])
    train.prepare([str(value) for value in (
        image_folder, '--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=24',
        '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '1', '--device', 'cpu', '--output', tmp_path,
        '--head-init-scale', '0', '--head-init-bias', '-2')])
    for head in made[0].get_classifier():
        assert head.weight.abs().sum() == 0 and (head.bias == -2).all()


@pytest.mark.parametrize('kind', ['no architecture', 'class of timm', 'torchvision'])
def test_a_model_of_the_users_own_is_trained(kind, image_folder, tmp_path, monkeypatch, capfd):
    """Its weights are saved. The log says once why no config.json is; tools and the Hub say so, too."""
    def create_model(name, num_classes, **kwargs):
        if kind == 'torchvision':
            return torchvision.models.resnet18(num_classes=num_classes)
        if kind == 'class of timm':
            return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        model = timm.create_model(name, num_classes=num_classes)
        del model.pretrained_cfg['architecture']
        return model

    train = importlib.import_module('train')
    monkeypatch.setattr(train, 'create_model', create_model)
    run = tmp_path / 'run'
    train.main([str(value) for value in (
        image_folder, '--model', 'test_resnet', '--img-size', '32', '-b', '24', '-j', '0', '--epochs', '2', '--device',
        'cpu', '--warmup-epochs', '0', '--report', '--output', tmp_path, '--experiment', 'run')])
    err = capfd.readouterr().err
    assert err.count('it has no name in timm') == 1 and f'Its weights: {run}/model_best.safetensors' in err
    weights = safetensors.torch.load_file(run / 'model_best.safetensors')
    best = torch.load(run / 'model_best.pth.tar', weights_only=False)['state_dict']
    assert set(weights) == set(best) and all(value.equal(weights[key]) for key, value in best.items())
    assert not (run / 'config.json').exists()
    assert 'timm cannot create it by name' in (run / 'report.html').read_text()
    with pytest.raises(ValueError, match='has no model: timm cannot create it by name'):
        prepare_folder(str(run), tmp_path / 'hub', 'a/b')
    exported = (run / 'model_best.safetensors').stat().st_mtime_ns
    train.main([str(value) for value in (
        image_folder, '--model', 'test_resnet', '--img-size', '32', '-b', '24', '-j', '0', '--epochs', '2', '--device',
        'cpu', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')])
    assert (run / 'model_best.safetensors').stat().st_mtime_ns == exported  # a finished run is left alone


def test_without_validation(train_cli, tmp_path):
    """--val-split '' ranks the epochs by the training loss, as timm does."""
    result = train_cli('--val-split', '', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    table = read_summary(tmp_path / 'x')
    assert not table[0]['eval_top1'] and 'Test:' not in result.stderr
    best = torch.load(tmp_path / 'x' / 'model_best.pth.tar', weights_only=False)
    assert best['metric'] == pytest.approx(min(float(row['train_loss']) for row in table))


def test_losses_of_other_weights_are_not_ranked(train_cli, cnn, tmp_path):
    """Without validation, the best is among the epochs whose loss is the last one's: in `anneal`, that epoch itself."""
    kept = {}
    for kind in ('anneal', 'ce'):
        result = train_cli(
            '--kd-model-name', f'local-dir:{cnn}', '--val-split', '', '--epochs', '5', '--dearkd-stage1-epochs', '2',
            '--dearkd-stage2', kind, '--dearkd-beta', '0', '--smoothing', '0.9', '--lr', '1e-5', '--checkpoint-hist',
            '2', '--output', tmp_path, '--experiment', kind)  # smoothing makes the labels the greater loss
        assert result.returncode == 0, result.stderr
        losses = [float(row['train_loss']) for row in read_summary(tmp_path / kind)]
        assert min(losses) in losses[:2]
        kept[kind] = torch.load(tmp_path / kind / 'model_best.pth.tar', weights_only=False)
        assert len(list((tmp_path / kind).glob('checkpoint-*'))) == 2
    assert kept['anneal']['epoch'] == 4 and kept['ce']['metric'] == pytest.approx(min(losses[2:]))


def test_stages_follow_the_length_of_the_run(train_cli, cnn, tmp_path):
    """Epochs that the learning-rate schedule appends belong to stage II; alpha ends at 1."""
    for name, args, stages in (
        ('cosine', ['--cooldown-epochs', '1'], '122'), ('step', ['--cooldown-epochs', '1', '--sched', 'step'], '12')):
        result = train_cli(
            '--kd-model-name', f'local-dir:{cnn}', '--dearkd-stage1-epochs', '1', *args, '--output', tmp_path,
            '--experiment', name)
        assert result.returncode == 0, result.stderr
        table = read_summary(tmp_path / name)
        assert ''.join(row['train_stage'] for row in table) == stages and float(table[-1]['train_alpha']) == 1.


def test_a_cnn_with_what_only_cnns_have(train_cli, image_folder, tmp_path):
    """TorchScript, BatchNorm per split; the exported model is the plain one."""
    for name, args in (('script', ['--torchscript', '--model-ema', '--model-ema-decay', '0.5']), (
            'split', ['--split-bn', '--aug-splits', '2', '--jsd-loss', '--aa', 'rand-m9'])):
        result = train_cli('--model', 'test_resnet', *args, '--output', tmp_path, '--experiment', name)
        assert result.returncode == 0, result.stderr
    best = max(read_summary(tmp_path / 'script'), key=lambda row: float(row['eval_top1']))
    model = timm.create_model(f'local-dir:{tmp_path / "script"}', pretrained=True)
    assert evaluate(model, image_folder)['loss'] == pytest.approx(float(best['eval_loss']), rel=1e-3)


def test_evaluation_alone(run, train_cli, image_folder, tmp_path):
    """The same figures from the run's folder, a checkpoint of it and timm's own loop; labels as in training."""
    folder, _ = run
    expected = evaluate(timm.create_model(f'local-dir:{folder}', pretrained=True), image_folder)
    for args in (
        ['--model', f'local-dir:{folder}'],
        ['--initial-checkpoint', folder / 'model_best.pth.tar'],
        ['--pretrained-path', folder / 'model_best.safetensors'],
        ['--resume', folder / 'model_best.pth.tar'],
        ['--initial-checkpoint', folder / 'model_best.safetensors', '--no-prefetcher', '-vb', '5'],
        # what the checkpoint was trained with, but for the number of channels that is given
        ['--initial-checkpoint', folder / 'model_best.pth.tar', '--in-chans', '3', '--head-init-bias', '-10'],
    ):
        small = '--head-init-bias' not in args
        result = train_cli('--eval-only', *args, *(() if small else ('--model', 'test_dearkd')), small=small)
        assert result.returncode == 0, result.stderr
        metrics = json.loads(result.stdout)
        assert metrics['num_images'] == 12
        for name in ('top1', 'top5', 'loss'):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4)

    other = tmp_path / 'other'  # a class that there was not in training
    shutil.copytree(image_folder, other)
    (other / 'validation' / 'rust').rename(other / 'validation' / 'snow')
    result = train_cli('--eval-only', '--initial-checkpoint', folder / 'model_best.safetensors', data=other)
    assert result.returncode == 2 and 'classes that the training set does not have: snow' in result.stderr

    less = tmp_path / 'less'  # the labels of torchvision's reader are matched by name too
    shutil.copytree(image_folder, less)
    shutil.rmtree(less / 'validation' / 'blue sky')
    by_name = [json.loads(train_cli('--eval-only', '--model', f'local-dir:{folder}', *args, data=less).stdout)
               for args in ((), ('--dataset', 'torch/folder'))]
    assert by_name[0] == by_name[1] and by_name[0]['num_images'] == 8

    save_for_hf(timm.create_model('test_vit', num_classes=2, img_size=32), tmp_path / 'two', safe_serialization=True)
    result = train_cli('--eval-only', '--model', tmp_path / 'two', data=other)
    assert result.returncode == 2 and 'The data set has 3 classes, the model 2. Move away' in result.stderr
    for args, message in (
        ([], "Split 'validation' has classes that the model does not know: snow. Move them away"),
        (['--num-classes', '4'], f'--num-classes is 4, but local-dir:{folder} knows 3 classes'),
    ):
        result = train_cli('--eval-only', '--model', f'local-dir:{folder}', *args, data=other)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    result = train_cli('--eval-only', '--val-split', '', '--model', f'local-dir:{folder}')
    assert result.returncode == 2 and 'Set --val-split' in result.stderr

    part = tmp_path / 'part'  # a folder without training images, and without one of the classes
    shutil.copytree(image_folder / 'validation', part / 'validation')
    shutil.rmtree(part / 'validation' / 'blue sky')
    result = train_cli('--eval-only', '--model', f'local-dir:{folder}', '--pretrained', data=part)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**resolve_model_data_config(model))
    images = [(path, label) for label, name in ((1, 'grass'), (2, 'rust'))
              for path in (part / 'validation' / name).iterdir()]
    with torch.no_grad():
        hits = [model(transform(Image.open(path)).unsqueeze(0)).argmax().item() == label for path, label in images]
    assert json.loads(result.stdout)['top1'] == pytest.approx(100 * sum(hits) / len(hits))


def test_a_checkpoint_is_evaluated_with_the_input_it_was_trained_with(train_cli, image_folder, tmp_path):
    result = train_cli(
        '--model', 'test_vit', '--in-chans', '1', '--mean', '0.1', '--std', '0.9', '--crop-pct', '0.7', '--epochs', '1',
        '--model-kwargs', 'qkv_bias=False', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    command = ('--eval-only', '--batch-size', '8', '--workers', '0', '--device', 'cpu')
    found = [json.loads(train_cli(*command, *args, small=False).stdout)['loss'] for args in (
        ('--model', f'local-dir:{tmp_path / "x"}'),
        ('--model', 'test_vit', '--initial-checkpoint', tmp_path / 'x' / 'model_best.pth.tar'))]
    model = timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True)
    assert found[0] == found[1] == pytest.approx(evaluate(model, image_folder)['loss'], rel=1e-4)


def test_a_plain_timm_model_is_evaluated(train_cli, image_folder, tmp_path):
    model = timm.create_model('test_vit', num_classes=3, img_size=32)
    torch.save(model.state_dict(), tmp_path / 'vit.pth')
    result = train_cli('--model', 'test_vit', '--eval-only', '--tta', '2', '--initial-checkpoint', tmp_path / 'vit.pth')
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) == {'model', 'num_images', 'top1', 'top5', 'loss'}


def test_fine_tuning_at_another_size_and_with_other_classes(run, train_cli, tmp_path):
    """Without a teacher, from the folder and from a file: position embeddings are resampled, the head is new."""
    folder, _ = run
    data = tmp_path / 'data'
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for name in 'abcd':
            (data / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f'{i}.jpg')
    before = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0, img_size=48).state_dict()
    for name, args in (
        ('folder', ['--model', f'local-dir:{folder}', '--pretrained']),
        ('file', ['--pretrained-path', folder / 'model_best.safetensors']),
        ('run', ['--pretrained-path', folder / 'model_best.pth.tar']),
    ):
        result = train_cli(
            *args, '--img-size', '48', '--layer-decay', '0.75', '--lr', '0', '--warmup-lr', '0', '--epochs', '1',
            '--output', tmp_path, '--experiment', name, data=data)
        assert result.returncode == 0, result.stderr
        model = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True)
        assert model.num_classes == 4 and resolve_model_data_config(model)['input_size'] == (3, 48, 48)
        after = model.state_dict()
        assert all(value.equal(after[key]) for key, value in before.items())


def test_trackers(train_cli, cnn, tmp_path):
    """All that a run is to be judged by, in TensorBoard's own reader."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    result = train_cli(
        '--kd-model-name', f'local-dir:{cnn}', '--log-tensorboard', '--log-interval', '3', '--output', tmp_path,
        '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    events = accumulator.EventAccumulator(str(tmp_path / 'x' / 'tensorboard')).Reload()
    tags = set(events.Tags()['scalars'])
    assert {'train/loss', 'train/ce_loss', 'train/logit_loss', 'train/hidden_loss', 'stage', 'alpha', 'lr',
            'speed/images_per_second', 'speed/teacher_share', 'mhca/alpha/block1', 'mhca/delta/block4', 'eval/top1',
            'eval/loss'} <= tags
    table = read_summary(tmp_path / 'x')
    assert [e.step for e in events.Scalars('eval/top1')] == [6, 12]
    for tag, column in (('train/loss', 'train_loss'), ('eval/loss', 'eval_loss'), ('lr', 'lr')):
        values = {e.step: e.value for e in events.Scalars(tag)}
        assert [values[6], values[12]] == pytest.approx([float(row[column]) for row in table], rel=1e-5)
    assert all(0 < e.value < 1 for e in events.Scalars('speed/teacher_share'))


def test_the_installed_module_is_the_same_script(image_folder, tmp_path):
    """`python -m timm_dearkd.train` from another folder; modules of the user's own are imported first."""
    (tmp_path / 'my_models.py').write_text(
        'import timm\n@timm.models.register_model\ndef my_vit(**kwargs):\n    kwargs.pop("pretrained", None)\n'
        '    return timm.create_model("test_vit", **kwargs)\n')
    command = [
        '-m', 'timm_dearkd.train', image_folder, '--device-modules', 'my_models', '--model', 'my_vit', '--img-size',
        '32', '-b', '8', '--epochs', '1', '-j', '0', '--device', 'cpu', '--experiment', 'x']
    result = run_python(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'output' / 'train' / 'x' / 'last.pth.tar').is_file()
    result = run_python(*command, '--epochs', 'x', cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith('train.py: error: ')


def test_arguments_are_recorded_as_given(train_cli, tmp_path):
    result = train_cli(
        '--resume', 'auto', '--output', tmp_path, '--experiment', 'x', '--epochs', '1', '--val-split', '')
    assert result.returncode == 0, result.stderr
    args = yaml.safe_load((tmp_path / 'x' / 'args.yaml').read_text())
    assert args['resume'] == 'auto' and args['num_classes'] is None and args['eval_metric'] == 'top1'


def test_the_module_can_be_driven(image_folder, cnn, tmp_path, monkeypatch):
    """As timm's script can: parser, _parse_args(), a create_model of one's own, and main(), which raises."""
    train = importlib.import_module('train')
    made = []

    def create_model(name, **kwargs):
        made.append(name)
        return timm.create_model(name, **kwargs, qk_norm=True)

    monkeypatch.setattr(train, 'create_model', create_model)
    monkeypatch.setattr('sys.argv', [
        'train.py', str(image_folder), '--model', 'test_dearkd', '--img-size', '32', '-b', '8', '--epochs', '1',
        '-j', '0', '--kd-model-name', f'local-dir:{cnn}', '--output', str(tmp_path), '--experiment', 'x',
        '--device', 'cpu'])
    assert train._parse_args()[0].batch_size == 8 and train.parser.get_default('model') == 'resnet50'
    train.main()
    assert made == ['test_dearkd']
    assert 'blocks.0.attn.q_norm.weight' in torch.load(
        tmp_path / 'x' / 'last.pth.tar', weights_only=False)['state_dict']
    with pytest.raises(ValueError, match="--model: Unknown model 'nothing'"):
        train.main([str(image_folder), '--model', 'nothing'])


def test_grey_images_in_a_folder(train_cli, tmp_path):
    """One-channel files train a three-channel model as they are."""
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for name in 'ab':
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 255, (33, 21), dtype=np.uint8)).save(folder / f'{i}.png')
    result = train_cli('--epochs', '1', '--output', tmp_path, '--experiment', 'x', data=tmp_path / 'data')
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['num_classes'] == 2


def test_images_of_four_channels(train_cli, image_folder, tmp_path):
    """The mode has to be given. The evaluation and predict take that of the run; without it, predict takes CMYK."""
    out = tmp_path / 'rgba'
    mode = ('--input-img-mode', 'RGBA')
    result = train_cli('--in-chans', '4', *mode, '--epochs', '1', '--output', tmp_path, '--experiment', 'rgba')
    assert result.returncode == 0, result.stderr
    evaluated = train_cli('--eval-only', '--model', f'local-dir:{out}')
    assert evaluated.returncode == 0, evaluated.stderr
    same = train_cli('--eval-only', '--model', out / 'last.pth.tar')
    assert json.loads(same.stdout)['loss'] == pytest.approx(json.loads(evaluated.stdout)['loss'], rel=1e-5)
    assert json.loads(same.stdout)['loss'] == pytest.approx(float(read_summary(out)[-1]['eval_loss']), rel=1e-5)
    for is_known in (True, False):
        result = run_python(
            '-m', 'timm_dearkd.analysis', 'predict', image_folder / 'validation', '--model', out, '--output',
            tmp_path / f'predictions {is_known}', '--device', 'cpu')
        assert result.returncode == 0 and ('Reads the images as CMYK' in result.stderr) != is_known, result.stderr
        top1 = float(re.search(r'top-1 ([\d.]+) % of 12', result.stdout)[1])
        assert top1 == pytest.approx(json.loads(evaluated.stdout)['top1'], abs=0.01) or not is_known
        (out / 'args.yaml').unlink(missing_ok=True)
    result = train_cli('--eval-only', '--model', f'local-dir:{out}')
    assert result.returncode == 2 and 'CMYK or RGBA for 4 channels: --input-img-mode.' in result.stderr


def test_recipes_parse(train_cli):
    train = importlib.import_module('train')
    for name, epochs, stage1, stage2 in (('dearkd_300e', 300, 250, 'anneal'), ('dearkd_1000e', 1000, 800, 'ce')):
        args, _ = train._parse_args(['-c', name, '--model', 'dearkd_tiny_patch16_224'])
        assert (args.epochs, args.dearkd_stage1_epochs, args.dearkd_stage2) == (epochs, stage1, stage2)
        assert args.batch_size * args.grad_accum_steps == 2048 and args.lr == 5e-4 and args.opt == 'adamw'
        assert (args.dearkd_rpe_drop, args.dearkd_rpe_drop_mode, args.model_kwargs) == (0.1, 'query', {})
    for name in ('cifar10', 'cifar100', 'flowers', 'cars'):
        args, _ = train._parse_args(['-c', f'finetune_{name}'])
        assert args.layer_decay == 0.75 and args.img_size == 224 and args.kd_model_name is None
