import pytest
import timm
import torch
from timm.models import save_for_hf

from distill_hooks import DearKDTask, TwoStageSchedule
from timm_dearkd.engine.checkpoints import Position
from timm_dearkd.engine.distillation import build_task, load_teacher, log_changed_stages
from timm_dearkd.train import _parse_args


def test_a_teacher_on_a_cpu_is_stored_in_its_fast_layout(cnn):
    """Its answers are those of timm's model."""
    args, _ = _parse_args(['DIR', '--model', 'test_vit', '--kd-model-name', f'local-dir:{cnn}'])
    student = timm.create_model('test_vit', num_classes=3, img_size=32)
    config = dict(input_size=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    task = build_task(args, student, config, torch.device('cpu'), soft_targets=False)
    weight = task.teacher.model.get_submodule('layer1.0.conv1').weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    model = timm.create_model(f'local-dir:{cnn}', pretrained=True).eval()
    images = torch.randn(4, 3, 32, 32)
    expected = model(task.teacher.prepare_input(images))
    torch.testing.assert_close(task.teacher(images)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('before, now, position, level, message', [
    # a finished run of 10 epochs, 8 of them in stage I, gets more
    (['--epochs', '10'], ['--epochs', '24'], Position(10), 'WARNING',
     'in stage II at epoch 9. With --epochs 24, stage I lasts 20 epochs (was 8), so epochs 10 to 19 are in stage I'
     ' again. To keep the stages, set --dearkd-stage1-epochs 8.'),
    (['--epochs', '10'], ['--epochs', '10', '--dearkd-stage1-epochs', '10'], Position(8, 3), 'WARNING',
     'in stage II at epoch 8. With --dearkd-stage1-epochs 10, stage I lasts 10 epochs (was 8), so epochs 8 to 9'),
    (['--epochs', '10'], ['--epochs', '12'], Position(10), 'INFO', 'With --epochs 12, stage I lasts 10 epochs (was 8)'),
    (['--epochs', '10'], ['--epochs', '24'], Position(8), 'INFO', 'stage I lasts 20 epochs (was 8). To keep'),
    (['--epochs', '24'], ['--epochs', '10'], Position(2), 'INFO', 'With --epochs 10, stage I lasts 8 epochs (was 20).'),
    (['--epochs', '10'], ['--epochs', '24', '--dearkd-stage1-epochs', '8'], Position(10), '', ''),
])
def test_stages_that_change_when_a_run_is_resumed(before, now, position, level, message, caplog):
    teacher = ['DIR', '--kd-model-name', 'test_resnet']
    options, args = vars(_parse_args([*teacher, *before])[0]), _parse_args([*teacher, *now])[0]
    caplog.set_level('INFO')
    stage1_epochs = TwoStageSchedule(args.epochs, args.dearkd_stage1_epochs).stage1_epochs
    log_changed_stages(args, stage1_epochs, position._replace(options=options), position.epoch)
    assert [record.levelname for record in caplog.records] == [level] * bool(level)
    assert message in caplog.text
    if '(was 20)' in message:  # which 10 epochs have no room for
        assert 'To keep' not in caplog.text


@pytest.mark.parametrize('names, outputs, expected', [
    (['cat', 'fox', 'owl'], 3, [0, 2, 3]),
    (['cat', 'fox', 'owl'], 4, [0, 2, 3, 1]),  # --num-classes 4: the last output has no folder
    (['cat', 'fox', '(no folder, class 2)'], 3, [0, 2, 1]),  # as in config.json
    (['cat', 'dog', 'fox'], 4, None),
    (['cat', 'dog', 'fox', 'owl'], 4, None),
])
def test_classes_are_matched_by_name_also_beside_unused_outputs(names, outputs, expected, tmp_path):
    cnn = timm.create_model('test_resnet', num_classes=4)
    save_for_hf(cnn, tmp_path / 'cnn', model_config=dict(label_names=['cat', 'dog', 'fox', 'owl']))
    student = timm.create_model('test_dearkd', num_classes=outputs)
    config = dict(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, 64, 64))
    teacher = load_teacher(student, config, dict(kd_model_name=f'local-dir:{tmp_path / "cnn"}'), names)
    assert (None if teacher.class_map is None else teacher.class_map.tolist()) == expected


@pytest.mark.parametrize('names, refused', [
    (['cat', 'dog', 'fox', 'yak'], False), (['hen', 'ewe', 'kid', 'yak'], False),
    (['cat', 'fox', 'owl', 'yak'], True), (['yak', 'dog', 'fox', 'cat'], True),
])
def test_unknown_classes_are_matched_by_index_unless_a_known_one_has_moved(names, refused, tmp_path, caplog):
    cnn = timm.create_model('test_resnet', num_classes=4)
    save_for_hf(cnn, tmp_path / 'cnn', model_config=dict(label_names=['cat', 'dog', 'fox', 'owl']))
    student = timm.create_model('test_dearkd', num_classes=4)
    config = dict(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, 64, 64))
    options = dict(kd_model_name=f'local-dir:{tmp_path / "cnn"}')
    if refused:
        with pytest.raises(ValueError, match="The teacher knows no class 'yak'. It knows cat, dog.*--kd-class-map"):
            load_teacher(student, config, options, names)
    else:
        assert load_teacher(student, config, options, names).class_map is None
        assert 'matched by their index' in caplog.text


def test_a_teacher_with_one_output_is_refused():
    student, cnn = timm.create_model('test_dearkd', num_classes=2), timm.create_model('test_resnet', num_classes=1)
    with pytest.raises(ValueError, match='one output, expected one per class.*the two logits 0 and z'):
        DearKDTask(student, cnn, TwoStageSchedule(2))


@pytest.mark.parametrize('given', [{}, dict(kd_teacher_mean=[0.2], kd_teacher_std=[0.3, 0.4, 0.5])])
def test_the_normalisation_of_a_teacher_whose_file_has_weights_alone(given, tmp_path):
    """The teacher sees the pixels normalised as it was trained."""
    cnn = timm.create_model('test_resnet', num_classes=3).eval()
    torch.save(cnn.state_dict(), tmp_path / 'cnn.pth')
    student = timm.create_model('test_dearkd', num_classes=3)
    config = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), input_size=(3, 64, 64))
    options = dict(kd_model_name='test_resnet', kd_teacher_checkpoint=str(tmp_path / 'cnn.pth'), **given)
    teacher = load_teacher(student, config, options)
    pixels = torch.rand(2, 3, 64, 64)
    mean = given.get('kd_teacher_mean', cnn.pretrained_cfg['mean'])
    std = given.get('kd_teacher_std', cnn.pretrained_cfg['std'])
    expected = cnn((pixels - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1))
    logits, _ = teacher((pixels - 0.5) / 0.25, with_features=False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='--kd-teacher-std has 2 values, expected 1, or 3 for its channels'):
        load_teacher(student, config, dict(options, kd_teacher_std=[0.3, 0.4]))
