"""What train.py refuses: in one line, with status 2, before anything is written."""
import importlib

import pytest
import torch
from conftest import SMALL

from timm_dearkd.engine.process import use_deterministic_kernels

ERRORS = {
    'image mode': (['--input-img-mode', 'L'], 'another number of channels than the model takes, 3'),
    'image mode of 4 channels': (['--in-chans', '4'], 'CMYK or RGBA for 4 channels: --input-img-mode'),
    'no image mode': (['--input-img-mode', 'RBG'], '--input-img-mode RBG is none of Pillow'),
    'betas': (['--opt-betas', '0.9', '0.9', '0.9'], '--opt-betas has 3 values, adamw takes 2'),
    'three betas': (['--opt', 'lookahead_Adan', '--opt-betas', '0.9', '0.9'], 'has 2 values, lookahead_Adan takes 3'),
    'three betas of another': (['--opt', 'bnbademamix', '--opt-betas', '0.9', '0.9'], 'bnbademamix takes 3'),
    'betas of nothing': (['--opt', 'nothing', '--opt-betas', '0.9', '0.9'], 'Optimizer nothing not found'),
    'optimizer': (['--opt', 'nothing'], 'Could not create --opt nothing'),
    'start': (['--start-epoch', '-1'], 'argument --start-epoch: -1, expected 0 or more'),
    'teacher file': (['--kd-model-name', 'README.md'], 'Give its timm name, such as resnet18, and the file'),
    'smoothing': (['--smoothing', '1.5'], 'argument --smoothing: 1.5, expected 0 or more, less than 1'),
    'scale': (['--scale', '0.5'], 'expected the least and the greatest'),
    'scale order': (['--scale', '0.5', '0.1'], '--scale is 0.5 0.1, expected the least and the greatest'),
    'flip': (['--hflip', '2'], 'argument --hflip: 2, expected 0 to 1'),
    'erasing': (['--reprob', '1.5'], 'argument --reprob: 1.5, expected 0 to 1'),
    'ratio': (['--ratio', '0', '1'], '--ratio is 0.0 1.0, expected the least and the greatest'),
    'rate': (['--lr', 'nan'], 'argument --lr: nan, expected 0 or more'),
    'base size': (['--lr-base-size', '0'], 'argument --lr-base-size: 0, expected 1 or more'),
    'temperature': (['--kd-temperature', '0'], 'argument --kd-temperature: 0, expected more than 0'),
    'evaluation batch': (['-vb', '0'], 'expected 1 or more'),
    'no mixup': (['--mixup', '-1'], 'argument --mixup: -1, expected 0 or more'),
    'crop': (['--crop-pct', '0'], 'argument --crop-pct: 0, expected more than 0'),
    'resume folder': (['--resume', 'FOLDER'], 'is a folder. Name last.pth.tar in it, or --resume auto'),
    'weights folder': (['--initial-checkpoint', 'FOLDER'], '--model local-dir:'),
    'other classes': (
        ['--model', 'test_resnet', '--num-classes', '4', '--initial-checkpoint', 'FILE'], 'go in by --pretrained-path'),
    'splits': (['--aug-splits', '2', '--no-prefetcher'], '--aug-splits needs the prefetcher'),
    'schedule': (['--sched', 'cosin'], "argument --sched: invalid choice: 'cosin'"),
    'least rate': (['--min-lr', '-1'], 'argument --min-lr: -1, expected 0 or more'),
    'decay': (['--sched', 'wsd'], 'Check --decay-epochs and --warmup-epochs'),
    'layer decay': (['--layer-decay', '0.7', '--sched', 'none'], 'Set --sched constant'),
    'plateau': (['--sched', 'plateau', '--sched-on-updates'], 'does not go with --sched-on-updates'),
    'compile mode': (['--torchcompile', '--torchcompile-mode', 'x'], "--torchcompile-mode is 'x', expected one of"),
    'graphs of a teacher': (
        ['--torchcompile', '--torchcompile-mode', 'reduce-overhead', '--kd-model-name', 'TEACHER'],
        'do not work with a teacher: they overwrite their outputs. Set --torchcompile-mode max-autotune-no-cudagraphs'),
    'graphs of parts': (
        ['--torchcompile', '--torchcompile-mode', 'max-autotune', '--grad-accum-steps', '2'],
        'do not work with --grad-accum-steps'),
    'checkpointing': (['--model', 'dla34', '--grad-checkpointing'], 'gradient checkpointing not supported'),
    'head': (
        ['--model', 'test_resnet', '--num-classes', '0', '--head-init-bias', '0'], 'a head with a weight and a bias'),
    'script of mhca': (['--torchscript'], 'not models with MHCA blocks'),
    'clip': (['--clip-grad', '-1'], 'argument --clip-grad: -1, expected more than 0'),
    'repeats': (['--aug-repeats', '0.1'], 'expected 1 or more'),
    'teacher name': (['--kd-model-name', 'resnet26x', '--kd-distill-type', 'logit'], 'nearest timm names: resnet26'),
    'other optimizer': (
        ['--model', 'test_resnet', '--opt', 'lamb', '--resume', 'FILE'], 'a run with --opt adamw, this one has lamb'),
    'naflex': (['--naflex-loader'], '--naflex-loader is not supported: NaFlex'),
    'naflex patches': (['--naflex-patch-sizes', '8', '16'], '--train-img-sizes trains at several sizes'),
    'class map': (['--kd-class-map', 'FILE'], '--kd-model-name NAME'),
    'class map file': (
        ['--kd-class-map', 'nothing.txt', '--kd-model-name', 'TEACHER'], "--kd-class-map: no file 'nothing.txt'"),
    'class map kind': (
        ['--kd-class-map', 'FILE', '--kd-model-name', 'TEACHER', '--kd-distill-type', 'feature'],
        '--kd-class-map goes with --kd-distill-type dearkd or logit or token, this run has feature'),
    'class map of a cnn': (
        ['--model', 'test_resnet', '--kd-class-map', 'FILE', '--kd-model-name', 'TEACHER'],
        'not with a teacher class. Write one index'),
    'teacher size': (
        ['--model', 'test_resnet', '--kd-model-name', 'TEACHER', '--kd-teacher-img-size', '-1'],
        'does not take images of -1x-1 pixels'),
    'flag of a vit': (
        ['--model', 'test_resnet', '--dearkd-beta', '5', '--kd-model-name', 'TEACHER'],
        '--dearkd-beta goes with --kd-distill-type dearkd, this run has logit'),
    'flag of timm': (
        ['--distill-loss-weight', '3', '--kd-model-name', 'TEACHER'],
        '--distill-loss-weight goes with --kd-distill-type logit or feature or token, this run has dearkd'),
    'temperature of hard labels': (
        ['--kd-temperature', '2', '--kd-model-name', 'TEACHER'], 'Add --dearkd-soft-labels'),
    'labels of nobody': (['-c', 'data_free'], '--dearkd-labels needs a teacher: add --kd-model-name NAME'),
    'labels and loss': (
        ['--dearkd-labels', 'teacher', '--bce-loss', '--kd-model-name', 'TEACHER'], 'does not go with --bce-loss'),
    'cutmix': (['--cutmix-minmax', '0.5', '1.5'], 'expected the least and the greatest value, of 0 to 1.'),
    'augmentation': (['--affine-aug', 'edge', '--no-aug'], '--affine-aug augments, and --no-aug does not'),
    'temperature of nobody': (['--kd-temperature', '2'], '--kd-temperature needs a teacher'),
    'sizes': (['--train-img-sizes', '32', '40'], 'Set --train-img-sizes 32'),
    'fixed size': (
        ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1', '--train-img-sizes', '32', '48'],
        'dynamic_img_size=True'),
    'batch sizes': (['--train-img-sizes', '32', '--train-batch-sizes', '8', '4'], 'Give as many'),
    'progressive': (['--train-size-schedule', 'progressive'], 'two or more --train-img-sizes'),
    'tta': (['--tta', '3'], 'argument --tta: invalid choice: 3'),
    'script': (['--torchscript', '--torchcompile', 'eager'], '--torchscript does not go with'),
    'script to evaluate': (['--torchscript', '--eval-only'], '--torchscript is for training'),
    'script of a student': (['--torchscript', '--kd-model-name', 'TEACHER'], 'Use --torchcompile'),
    'script of two heads': (
        ['--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'depth=1', '--torchscript', '--kd-model-name',
         'TEACHER', '--kd-distill-type', 'token'], '--torchscript does not go with --kd-distill-type token'),
    'split bn': (['--split-bn'], '--aug-splits'),
    'module': (['--device-modules', 'no_such_module'], 'no_such_module'),
    'seed': (['--seed', '-1'], 'argument --seed: -1, expected 0 or more'),
    'milestone': (['--save-epochs', '1', '7'], '--save-epochs is 7, expected 1 to 2'),
    'milestone of nothing': (['--save-epochs', '0', '2'], '--save-epochs is 0, expected 1 to 2'),
    'model': (['--model', 'dearkd_tny_patch16_224'], 'dearkd_tiny_patch16_224'),
    'beginning of a model': (['--model', 'dearkd-small'], 'The nearest timm names: dearkd_small_patch16_224'),
    'model of no folder': (['--model', 'output/nothing'], "--model: No folder 'output/nothing'. Give a run folder"),
    'model file': (['--model', 'FILE'], 'is a file. Give --model test_resnet --initial-checkpoint '),
    'weights twice': (
        ['--eval-only', '--model', 'FILE', '--initial-checkpoint', 'FILE'], 'weights, and another flag names others'),
    'batch size': (['--batch-size', '64'], 'Set --batch-size to 48 or less'),
    'classes': (['--num-classes', '2'], 'Set --num-classes 3'),
    'split': (['--train-split', 'trian'], "'trian'"),
    'split of a named folder': (['--dataset', 'image_folder', '--train-split', 'trian'], "'trian'"),
    'validation split of a named folder': (['--dataset', 'ImageNet', '--val-split', 'valid2'], "'valid2'"),
    'no split': (['--train-split', ''], "No split ''"),
    'no download': (['--dataset', 'torch/cifar10'], 'You can use --dataset-download to download it.'),
    'device': (['--device', 'xpu'], '--device xpu is not available here'),
    'stage': (['--dearkd-stage1-epochs', '9', '--kd-model-name', 'TEACHER'], 'from 0 to 2'),
    'layer': (['--dearkd-hooks', '4:layer9', '--kd-model-name', 'TEACHER'], "no layer 'layer9'"),
    'block': (['--dearkd-hooks', '9', '--kd-model-name', 'TEACHER'], 'Choose a block from 1 to 6'),
    'teacher classes': (['--kd-model-name', 'TEACHER', '--num-classes', '4'], 'knows 3 classes, the student 4'),
    'teacher classes of a cnn': (
        ['--model', 'test_resnet', '--kd-model-name', 'TEACHER', '--num-classes', '4'],
        'knows 3 classes, the student 4'),
    'no tokens': (['--model', 'test_convnext', '--kd-model-name', 'TEACHER', '--kd-distill-type', 'dearkd'],
                  '--kd-distill-type logit'),
    'nobody teaches': (['--dearkd-stage1-epochs', '1'], '--dearkd-stage1-epochs needs a teacher'),
    'no folder': (['--kd-model-name', 'output/cnnn'], "No folder 'output/cnnn'"),
    'no teacher': (['--kd-teacher-checkpoint', 'FILE'], '--kd-model-name NAME'),
    'checkpoint': (
        ['--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', 'nothing.pth'], "no file 'nothing.pth'"),
    'resume': (['--resume', 'nothing.pth'], "no file 'nothing.pth'"),
    'rpe': (['--model', 'test_vit', '--dearkd-rpe-drop', '0.1'], 'needs MHCA blocks'),
    'rpe mode': (['--model', 'test_vit', '--dearkd-rpe-drop-mode', 'query'], 'needs MHCA blocks'),
    'rpe rate': (['--dearkd-rpe-drop', '1.5'], 'expected a rate in [0, 1)'),
    'kwargs': (['--model-kwargs', 'foo=1'], "'foo'"),
    'kwargs form': (['--model-kwargs', 'depth'], 'KEY=VALUE'),
    'weights': (['--pretrained'], 'No weights of test_dearkd are published'),
    'device name': (['--device', 'gpu'], 'expected cpu, cuda'),
    'clip mode': (['--clip-mode', 'x'], "argument --clip-mode: invalid choice: 'x'"),
    'mixup': (['--mixup', '0.5', '--batch-size', '7'], 'Make it even'),
    'compiler': (['--torchcompile', 'x'], 'expected one of'),
    'no run': (['--eval-only', '--resume', 'auto'], 'there is no run in'),
    'other run': (['--resume', 'FILE'], 'is a run of test_resnet, this one is of test_dearkd'),
    'stop': (['--stop-epoch', '3'], 'expected 1 to 2'),
    'auto': (['--resume', 'auto', '--experiment', ''], 'needs --experiment'),
    'fraction': (['--train-fraction', '0'], 'expected a share above 0'),
    'no epochs': (['--start-epoch', '2'], 'Nothing to train'),
    'output': (['--output', '/proc/x'], "Could not make the folder '/proc/x/x'"),
    'size': (['--model', 'dearkd_nano_patch4_32', '--input-size', '3', '64', '64'], 'Conflicting input image sizes'),
    'patches': (['--img-size', '40'], 'Set --img-size 32'),
    'number': (['--epochs', 'x'], 'invalid int value'),
    'metric': (['--eval-metric', 'top2', '--epochs', '1'], "argument --eval-metric: invalid choice: 'top2'"),
    'augmix': (['--jsd-loss'], '--aug-splits'),
    'augmix of a fixed length': (
        ['--train-batches-per-epoch', '2', '--aug-splits', '2'],
        '--train-batches-per-epoch does not go with --aug-splits'),
}


def arguments(case, cnn, tmp_path):
    args, message = ERRORS[case]
    replaced = {'TEACHER': f'local-dir:{cnn}', 'FILE': cnn / 'model_best.pth.tar', 'FOLDER': cnn}
    return ['--output', tmp_path, '--experiment', 'x', *(replaced.get(a, a) for a in args)], message


def assert_error(status, err, message):
    last = err.strip().splitlines()[-1]
    assert status == 2 and 'Traceback' not in err
    assert last.startswith('train.py: error: ') and message in last


@pytest.mark.parametrize('case', ERRORS)
def test_errors_are_one_line_and_status_2(case, image_folder, cnn, tmp_path, capsys):
    train = importlib.import_module('train')
    args, message = arguments(case, cnn, tmp_path)
    with pytest.raises(SystemExit) as e:
        train.run_script([str(a) for a in (image_folder, *SMALL, *args)])
    assert_error(e.value.code, capsys.readouterr().err, message)
    assert not (tmp_path / 'x').exists()


def test_an_interruption_at_once_is_one_line(monkeypatch, capsys):
    """As by the first Ctrl-C in an evaluation, and by the second in training."""
    train = importlib.import_module('train')

    def run():
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'prepare', lambda argv: run)
    with pytest.raises(SystemExit) as e:
        train.run_script([])
    assert e.value.code == 130 and capsys.readouterr().err == 'train.py: Interrupted.\n'


def test_no_deterministic_kernel_is_one_line(monkeypatch, capsys):
    train = importlib.import_module('train')
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')

    def run():
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    monkeypatch.setattr(train, 'prepare', lambda argv: run)
    benchmark = torch.backends.cudnn.benchmark
    try:
        use_deterministic_kernels()
        with pytest.raises(SystemExit) as e:
            train.run_script([])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('train.py: error: --deterministic: put_ ') and err.count('\n') == 1


def test_one_image_for_a_batch_norm_is_one_line(image_folder, tmp_path, capsys):
    """A CNN that ends at one value per channel. A ViT, and a CNN that sees larger images, train on such batches."""
    train = importlib.import_module('train')
    args = (image_folder, *SMALL, '--output', tmp_path, '--experiment', 'x', '--model', 'test_resnet', '-b', '1')
    with pytest.raises(SystemExit) as e:
        train.run_script([str(a) for a in args])
    assert_error(e.value.code, capsys.readouterr().err, 'Set a --batch-size above 1')


@pytest.mark.slow
def test_no_compiler_is_one_line(train_cli, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    result = train_cli('--torchcompile', 'inductor', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert '--torchcompile: the model could not be compiled' in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize('case', ['model', 'number', 'layer', 'output'])
def test_errors_of_a_process(case, train_cli, cnn, tmp_path):
    args, message = arguments(case, cnn, tmp_path)
    result = train_cli(*args)
    assert_error(result.returncode, result.stderr, message)


def test_no_data_and_no_folder(train_cli, tmp_path):
    for data, message in (
            (tmp_path / 'nowhere', 'No data set at'), ('--workers=0', 'No data set given'),
            ('--dataset=photos', "Data set 'photos' needs a folder")):
        result = train_cli(data=data)
        assert result.returncode == 2 and message in result.stderr.strip().splitlines()[-1]
