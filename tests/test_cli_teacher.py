"""train.py with teachers of all kinds, as users run it."""
import json

import pytest
import timm
import torch
from conftest import read_summary
from timm.models import save_for_hf

from timm_dearkd.engine.data import open_dataset


@pytest.mark.parametrize('args', [
    ['--kd-distill-type', 'logit', '--in-chans', '1', '--kd-class-map', 'MAP'],
    ['--kd-distill-type', 'feature', '--kd-teacher-img-size', '128', '--amp', '--amp-dtype', 'bfloat16'],
    ['--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=24', '--kd-distill-type',
     'token', '--kd-token-distill-type', 'hard', '--in-chans', '1', '--channels-last', '--img-size', '64'],
    ['--model', 'test_resnet', '--torchscript', '--model-ema'],  # no tokens: logit is the default
], ids=['logit', 'feature', 'token', 'cnn'])
def test_timms_own_distillation(args, train_cli, cnn, tmp_path):
    """Of a teacher for colour images of 32 pixels, whatever the student gets."""
    (tmp_path / 'map.txt').write_text('0\n1\n2\n')
    args = [tmp_path / 'map.txt' if arg == 'MAP' else arg for arg in args]
    result = train_cli(
        *args, '--kd-model-name', f'local-dir:{cnn}', '--epochs', '1', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    assert float(read_summary(tmp_path / 'x')[0]['train_kd_loss' if 'token' not in args else 'train_distill_loss']) > 0
    sizes = [line for line in result.stderr.splitlines() if 'The teacher was trained at 32x32 pixels and sees' in line]
    assert len(sizes) == (1 if '--img-size' in args or '--kd-teacher-img-size' in args else 0)
    assert all(('--kd-teacher-img-size 32 resizes' in line) == ('--img-size' in args) for line in sizes)
    state = torch.load(tmp_path / 'x' / 'last.pth.tar', weights_only=False)['task_state']
    assert len(state['teacher']) == 16


def test_stages_and_labels_of_a_run_that_chooses_its_epochs(train_cli, cnn, tmp_path):
    """334 epochs for 45 images: stage I may be longer than 300. A resumed run counts all its labels."""
    for stop, flags in ((1, ()), (2, ('--resume', 'auto'))):
        result = train_cli(
            '-c', 'small_folder', '--model', 'test_dearkd', '--img-size', '32', '--kd-model-name', f'local-dir:{cnn}',
            '--batch-size', '15', '--device', 'cpu', '-j', '0', '--stop-epoch', stop, '--dearkd-stage1-epochs', '320',
            '--kd-label-cache', tmp_path / 'labels', '--output', tmp_path, '--experiment', 'x', *flags, small=False)
        assert result.returncode == 0, result.stderr
        assert 'stage I: 320 epochs' in result.stderr and 'stage II: 14 epochs' in result.stderr
        assert 'An update has 15 images: --batch-size 15 x' in result.stderr and 'stage I lasts' not in result.stderr
        results = json.loads((tmp_path / 'x' / 'run.json').read_text())['results']
        assert results['labels_read'] + results['labels_computed'] == 45 * stop


def test_distillation_of_features_takes_a_teacher_of_other_classes(train_cli, tmp_path):
    """Options of another kind have no effect, and a warning names them."""
    torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), tmp_path / 'cnn.pth')
    for name, args in (('plain', []), ('recipe', ['--dearkd-stage1-epochs', '1', '--kd-temperature', '2'])):
        result = train_cli(
            '--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', tmp_path / 'cnn.pth', '--kd-distill-type',
            'feature', '--epochs', '1', '--output', tmp_path, '--experiment', name, *args)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count('set --kd-teacher-mean and --kd-teacher-std') == 1  # the file has weights alone
        for flag in ('--dearkd-stage1-epochs', '--kd-temperature'):
            assert (f'{flag} goes with' in result.stderr) == (name == 'recipe')
    assert read_summary(tmp_path / 'plain') == read_summary(tmp_path / 'recipe')


def test_teacher_checkpoint(train_cli, cnn, tmp_path):
    """The same run from the teacher's folder, its safetensors and its training checkpoint."""
    losses = []
    for i, args in enumerate((
        ['--kd-model-name', f'local-dir:{cnn}'],
        ['--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', cnn / 'model_best.safetensors'],
        ['--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', cnn / 'model_best.pth.tar'],
        ['--kd-model-name', cnn / 'model_best.pth.tar'],
    )):
        result = train_cli(*args, '--epochs', '1', '--output', tmp_path, '--experiment', str(i))
        assert result.returncode == 0, result.stderr
        losses.append(read_summary(tmp_path / str(i))[0]['train_hidden_loss'])
    assert len(losses) == 4 and len(set(losses)) == 1


def test_a_teacher_of_more_classes(train_cli, tmp_path):
    """--kd-class-map picks the student's classes; a model of one's own is the teacher."""
    torch.manual_seed(0)
    cnn = timm.create_model('test_resnet', num_classes=7)
    torch.save(cnn.state_dict(), tmp_path / 'cnn.pth')
    (tmp_path / 'map.txt').write_text('6 sky\n0 grass\n3 rust\n')
    args = ['--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', tmp_path / 'cnn.pth', '--epochs', '1',
            '--output', tmp_path, '--experiment']
    result = train_cli(*args, 'map', '--kd-class-map', tmp_path / 'map.txt')
    assert result.returncode == 0, result.stderr
    (tmp_path / 'map.txt').write_text('0\n1\n2\n')
    with torch.no_grad():
        for tensor in (cnn.fc.weight, cnn.fc.bias):
            tensor.copy_(tensor[[6, 0, 3, 1, 2, 4, 5]])
    torch.save(cnn.state_dict(), tmp_path / 'cnn.pth')
    for name, equal in (('permuted', True), ('first three', False)):
        result = train_cli(*args, name, '--kd-class-map', tmp_path / 'map.txt')
        assert result.returncode == 0, result.stderr
        assert (read_summary(tmp_path / 'map') == read_summary(tmp_path / name)) == equal
        (tmp_path / 'map.txt').write_text('3\n4\n5\n')


@pytest.mark.parametrize('flags, equal', [
    ((), True), (('--no-dearkd-soft-labels',), True), (('--dearkd-labels', 'dataset'), False),
], ids=['soft', 'hard', 'labels of the data set'])
def test_labels_of_the_data_set_have_no_effect_with_the_recipe_data_free(
        flags, equal, train_cli, cnn, image_folder, tmp_path):
    """A class map changes the labels of the same images in the same order; the teacher's classes stay."""
    (tmp_path / 'teacher.txt').write_text('0\n1\n2\n')
    datasets, states = [], []
    for name, classes in (('as they are', 'blue sky\ngrass\nrust\n'), ('shifted', 'rust\nblue sky\ngrass\n')):
        (tmp_path / f'{name}.txt').write_text(classes)
        datasets.append(open_dataset('', str(image_folder), 'train', class_map=str(tmp_path / f'{name}.txt')))
        result = train_cli(
            '-c', 'data_free', '--kd-model-name', f'local-dir:{cnn}', '--kd-class-map', tmp_path / 'teacher.txt',
            '--class-map', tmp_path / f'{name}.txt', '--val-split', '', '--train-batches-per-epoch', '6', *flags,
            '--output', tmp_path, '--experiment', name)
        assert result.returncode == 0, result.stderr
        states.append(torch.load(tmp_path / name / 'last.pth.tar', weights_only=False)['state_dict'])
    (files, labels), (same, others) = (zip(*dataset.reader.samples) for dataset in datasets)
    assert files == same and all(label != other for label, other in zip(labels, others))
    assert all(value.equal(states[1][key]) for key, value in states[0].items()) == equal


def test_a_teacher_whose_classes_are_in_another_order_is_told(train_cli, cnn, tmp_path):
    """A map that turns the classes round; then the one that the run has written."""
    (tmp_path / 'map.txt').write_text('1\n2\n0\n')
    written = tmp_path / 'wrong' / 'kd_class_map.txt'
    agreements = []
    for name, extra in (
            ('right', []), ('wrong', ['--kd-class-map', tmp_path / 'map.txt']),
            ('mended', ['--kd-class-map', written])):
        result = train_cli('--kd-model-name', f'local-dir:{cnn}', '--epochs', '1', '--no-aug', '--output', tmp_path,
                           '--val-split', '', '--experiment', name, *extra)  # looks at training images
        assert result.returncode == 0, result.stderr
        assert ("seem to be in another order: class 'blue sky' looks like" in result.stderr) == (name == 'wrong')
        assert (f'train again with --kd-class-map {written}.' in result.stderr) == (name == 'wrong')
        agreements.append(float(read_summary(tmp_path / name)[0]['train_teacher_agreement']))
    assert written.read_text() == '0 blue sky\n1 grass\n2 rust\n'
    assert agreements[0] == agreements[2] > 0.8 and agreements[1] < 0.2


def test_a_teacher_that_guesses_is_told(train_cli, tmp_path):
    """One that was never trained, whose answer is one class or another whatever the image is."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    torch.nn.init.zeros_(model.fc.weight)
    torch.save(model.state_dict(), tmp_path / 'cnn.pth')
    result = train_cli(
        '--model', 'test_resnet', '--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', tmp_path / 'cnn.pth',
        '--epochs', '1', '--output', tmp_path, '--experiment', 'x')
    assert result.returncode == 0, result.stderr
    assert 'or in another order (--kd-class-map FILE)' in result.stderr and 'another order:' not in result.stderr


def test_a_teacher_is_matched_by_the_names_of_its_classes(train_cli, cnn, tmp_path):
    """The same run from a teacher whose classes, and with them its head, are in another order, or more."""
    def teacher(name, order, names):
        model = timm.create_model(f'local-dir:{cnn}', pretrained=True)
        weight, bias = model.fc.weight.detach(), model.fc.bias.detach()
        model.reset_classifier(len(order))
        with torch.no_grad():
            model.fc.weight.copy_(weight[order])
            model.fc.bias.copy_(bias[order])
        save_for_hf(model, tmp_path / name, safe_serialization=True, model_config=dict(label_names=names))
        return ['--kd-model-name', f'local-dir:{tmp_path / name}', '--output', tmp_path, '--experiment', f'{name} run']

    names = ['blue sky', 'grass', 'rust']
    same, turned = teacher('same', [0, 1, 2], names), teacher('turned', [2, 0, 1], ['rust', 'blue sky', 'grass'])
    more = teacher('more', [1, 1, 0, 2], ['sea', 'grass', 'blue sky', 'rust'])
    other = teacher('other', [0, 1, 2], ['a', 'b', 'c'])
    for args in (same, turned, more, other):
        result = train_cli(*args, '--epochs', '1')
        assert result.returncode == 0, result.stderr
        assert ('matched by name' in result.stderr) == (args in (turned, more))
        told = "no class 'blue sky'" in result.stderr and "'blue sky' is the teacher's 'a'" in result.stderr
        assert told == (args is other)
        (row,), (expected,) = read_summary(tmp_path / args[-1]), read_summary(tmp_path / 'same run')
        assert row['train_teacher_agreement'] == expected['train_teacher_agreement']
        assert row == expected or args is more  # whose head takes more random numbers to make
    result = train_cli(*teacher('lacks one', [0, 1, 2, 0], ['a', 'grass', 'rust', 'b']))
    assert result.returncode == 2 and "no class 'blue sky'. It knows a, grass, rust, b." in result.stderr
    table = []
    for args in (same, turned):
        result = train_cli(*args[:-1], f'{args[-1]} of logits', '--epochs', '1', '--kd-distill-type', 'logit')
        assert result.returncode == 0, result.stderr
        table.append(read_summary(tmp_path / f'{args[-1]} of logits'))
    assert table[0] == table[1]
