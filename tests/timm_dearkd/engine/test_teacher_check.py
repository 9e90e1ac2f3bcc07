import pytest
import timm
import torch

from distill_hooks import DearKDTask, FeatureTask, LogitTask, Teacher, TokenTask, TwoStageSchedule, load_class_map
from distill_hooks.answers import ClassOrder
from timm_dearkd.engine.checkpoints import Position
from timm_dearkd.engine.loop import Validator
from timm_dearkd.engine.process import Precision, StopRequest, TrainingError
from timm_dearkd.engine.run_folder import read_run_info
from timm_dearkd.engine.teacher_check import TeacherCheck, TeacherResult, evaluate_teacher

LABELS = torch.arange(24) % 3
IMAGES = LABELS.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).float()  # which show their label


class Answers(torch.nn.Module):
    """A teacher that knows the label, and gives some class for each."""
    num_classes, in_chans = 3, 3

    def __init__(self, given, names=None):
        super().__init__()
        self.register_buffer('logits', torch.eye(3)[given])
        self.pretrained_cfg = dict(label_names=names, input_size=(3, 32, 32))

    def forward_features(self, x):
        return self.logits[x.mean((1, 2, 3)).round().long() % 3]

    def forward_head(self, x, pre_logits=False):
        return x

    def forward(self, x):
        return self.forward_features(x)


def make_task(kind, teacher):
    student = timm.create_model(
        'deit_tiny_distilled_patch16_224', num_classes=3, img_size=32, depth=1, embed_dim=24)
    if kind == 'dearkd':
        return DearKDTask(student, teacher, TwoStageSchedule(2, beta=0.), verbose=False)
    kwargs = dict(student_feature_dim=24, teacher_feature_dim=3) if kind == 'feature' else {}
    return dict(logit=LogitTask, token=TokenTask, feature=FeatureTask)[kind](
        student, teacher, criterion=torch.nn.CrossEntropyLoss(), verbose=False, **kwargs)


def make_validator(task, count=24, batch_size=5):
    loader = list(zip(IMAGES[:count].split(batch_size), LABELS[:count].split(batch_size)))
    return Validator(task, loader, Precision(torch.device('cpu')))


def check(kind, teacher, folder, batch_size=5):
    """Return the accuracy that is recorded."""
    task = make_task(kind, teacher)
    teacher_check = TeacherCheck(
        task, str(folder), make_validator(task, batch_size=batch_size), names=['cat', 'Dog', 'emu'])
    teacher_check.evaluate(Position(), StopRequest())
    assert read_run_info(folder)['results'] == dict(teacher_top1=teacher_check.top1)
    return teacher_check.top1


@pytest.mark.parametrize('kind', ['dearkd', 'logit', 'token'])
def test_a_teacher_in_another_order_is_told_before_training(tmp_path, caplog, kind):
    """The warning comes with the map that mends it."""
    path = tmp_path / 'kd_class_map.txt'
    assert check(kind, Teacher(Answers([0, 1, 2])), tmp_path) == 100 and not path.exists()
    assert 'another order' not in caplog.text
    assert check(kind, Teacher(Answers([1, 0, 2])), tmp_path) == 33.333
    (told,) = [r.getMessage() for r in caplog.records if 'in another order' in r.getMessage()]
    assert "class 'cat' looks like its class 1, class 'Dog' looks like its class 0." in told
    assert 'the label of 100.0 % of the images, now of 33.3 %' in told
    assert f'--kd-class-map {path}' in told and path.read_text() == '1 cat\n0 Dog\n2 emu\n'
    mended = Teacher(Answers([1, 0, 2]), class_map=load_class_map(str(path)))
    caplog.clear()
    assert check(kind, mended, tmp_path) == 100 and 'another order' not in caplog.text


@pytest.mark.parametrize('batch_size', [1, 2, 24])
def test_the_batch_size_does_not_matter(batch_size, tmp_path, caplog):
    assert check('logit', Teacher(Answers([1, 2, 0])), tmp_path, batch_size=batch_size) == 0
    assert 'in another order' in caplog.text


def test_the_map_that_a_teacher_has_is_part_of_the_order(tmp_path):
    """A wrong map gives a map in classes of the teacher."""
    for class_map in ([0, 1, 2], [1, 2, 0]):
        assert check('logit', Teacher(Answers([2, 0, 1]), class_map=class_map), tmp_path) == 0
    assert (tmp_path / 'kd_class_map.txt').read_text() == '2 cat\n0 Dog\n1 emu\n'


@pytest.mark.parametrize('given,names,expected', [
    ([0, 1, 2], None, 100.),
    ([0, 1, 2], ['cat', 'Dog', 'emu'], 100.),
    ([0, 1, 2], ['fox', 'yak', 'elk'], None),
    ([1, 0, 2], ['Dog', 'cat', 'emu'], None),
    ([1, 0, 2], None, None),
])
def test_a_teacher_of_features_is_compared_only_in_the_same_order(given, names, expected, tmp_path, caplog):
    assert check('feature', Teacher(Answers(given, names)), tmp_path) == expected
    assert not caplog.messages and not (tmp_path / 'kd_class_map.txt').exists()


@pytest.mark.parametrize('start, img_size, num_evaluations', [
    (Position(), None, 1),
    (Position(1, options=dict(kd_teacher_img_size=None)), None, 0),
    (Position(1, options=dict(kd_teacher_img_size=None)), 48, 1)])
def test_a_resumed_run_knows_the_accuracy_of_its_teacher(start, img_size, num_evaluations, tmp_path, caplog):
    """It evaluates the teacher again if the image size has changed."""
    task = make_task('logit', Teacher(Answers([0, 1, 2])))
    validator = make_validator(task)
    TeacherCheck(task, str(tmp_path), validator).record(TeacherResult(50.))
    caplog.set_level('INFO')
    teacher_check = TeacherCheck(task, str(tmp_path), validator, img_size=img_size)
    assert teacher_check.top1 == 50.
    teacher_check.evaluate(start, StopRequest())
    assert caplog.text.count('Teacher: ') == num_evaluations
    assert teacher_check.top1 == (100. if num_evaluations else 50.)
    assert read_run_info(tmp_path)['results'] == dict(teacher_top1=teacher_check.top1)


def test_a_teacher_in_another_order_is_warned_of_once(tmp_path, caplog):
    """The warning after the first epoch, of a teacher that guesses, would name a vaguer remedy."""
    task = make_task('logit', Teacher(Answers([1, 2, 0])))
    for order in (ClassOrder([1, 2, 0], 1., 0.), None):
        teacher_check = TeacherCheck(task, str(tmp_path))
        teacher_check.record(TeacherResult(0., order))
        assert teacher_check.top1 is None
        teacher_check.after_epoch(0, dict(loss=1., teacher_agreement=0.))
        assert ('Possible causes: its classes' in caplog.text) == (order is None)


def test_a_teacher_that_knows_the_validation_images_is_not_judged_by_a_mixed_batch(tmp_path, caplog):
    """Also after a run was resumed within the first epoch."""
    task = make_task('logit', Teacher(Answers([0, 1, 2])))
    validator = make_validator(task)
    teacher_check = TeacherCheck(task, str(tmp_path), validator)
    teacher_check.evaluate(Position(), StopRequest())
    for check_of_run in (teacher_check, TeacherCheck(task, str(tmp_path), validator)):
        check_of_run.after_epoch(0, dict(loss=1., teacher_agreement=0.))
    assert not caplog.messages


def test_training_images_tell_the_order_if_there_are_few_validation_images(tmp_path, caplog):
    """The accuracy is that on the validation images. Classes with names need no more images."""
    for names, expected in ((None, True), (['Dog', 'cat', 'emu'], False)):
        caplog.clear()
        task = make_task('logit', Teacher(Answers([1, 0, 2], names)))
        few = make_validator(task, 6)
        assert evaluate_teacher(task, [few]) == (pytest.approx(100 / 3), None)
        teacher_check = TeacherCheck(
            task, str(tmp_path), few, make_validator(task), names=['cat', 'Dog', 'emu'])
        teacher_check.evaluate(Position(), StopRequest())
        assert teacher_check.top1 == 33.333 and ('in another order' in caplog.text) == expected


def test_the_users_map_is_never_replaced(tmp_path, caplog):
    path = tmp_path / 'kd_class_map.txt'
    path.write_text('0\n1\n2\n')
    task = make_task('logit', Teacher(Answers([1, 0, 2]), class_map=load_class_map(str(path))))
    TeacherCheck(task, str(tmp_path), make_validator(task), class_map=str(path)).evaluate(Position(), StopRequest())
    assert path.read_text() == '0\n1\n2\n'
    assert (tmp_path / 'kd_class_map-2.txt').read_text() == '1\n0\n2\n' and 'kd_class_map-2.txt' in caplog.text


@pytest.mark.parametrize('class_map, names, ends', [
    (None, None, True),
    ([0, 1, 2], None, False),
    (None, ['cat', 'Dog', 'emu'], False),
    (None, ['fox', 'yak', 'elk'], True),
], ids=['order alone', 'map', 'names', 'other names'])
def test_a_student_never_learns_only_the_answers_of_another_order(class_map, names, ends, tmp_path, caplog):
    """Unless a map or the names tell that the order is right."""
    student = timm.create_model('test_dearkd', num_classes=3)
    teacher = Teacher(Answers([1, 0, 2], names), class_map=class_map)
    task = DearKDTask(student, teacher, TwoStageSchedule(2, beta=0.), verbose=False, labels='teacher')
    teacher_check = TeacherCheck(task, str(tmp_path), make_validator(task), names=['cat', 'Dog', 'emu'])
    if ends:
        with pytest.raises(TrainingError, match='another order.*set a --kd-class-map FILE with the lines 0 to 2'):
            teacher_check.evaluate(Position(), StopRequest())
    else:
        teacher_check.evaluate(Position(), StopRequest())
        assert 'in another order' in caplog.text
    assert (tmp_path / 'kd_class_map.txt').read_text() == '1 cat\n0 Dog\n2 emu\n'


@pytest.mark.parametrize('known,remedy', [
    (['Emu', 'cat', 'dog'], 'train it for more epochs'), (['a', 'b', 'c'], '--kd-class-map FILE'),
    ([], '--kd-class-map FILE')])
def test_a_teacher_with_the_names_of_the_classes_that_guesses_has_not_learned(known, remedy, tmp_path, caplog):
    student, cnn = (timm.create_model(name, num_classes=3) for name in ('test_dearkd', 'test_resnet'))
    cnn.pretrained_cfg = {**cnn.pretrained_cfg, 'label_names': known}
    task = DearKDTask(student, cnn, TwoStageSchedule(6), hooks=['2'], verbose=False)
    teacher_check = TeacherCheck(task, str(tmp_path), names=['cat', 'dog', 'Emu'])
    teacher_check.after_epoch(1, dict(loss=1., teacher_agreement=0.3))
    assert not caplog.messages
    teacher_check.after_epoch(0, dict(loss=1., teacher_agreement=0.3))
    assert 'Guessing gives 33.3 %' in caplog.text and remedy in caplog.text


@pytest.mark.parametrize('labels', ['dataset', 'teacher'])
def test_a_teacher_that_guesses_is_warned_of_before_training_if_it_alone_teaches(labels, tmp_path, caplog):
    student, cnn = (timm.create_model(name, num_classes=4) for name in ('test_dearkd', 'test_resnet'))
    task = DearKDTask(student, cnn, TwoStageSchedule(6), hooks=['2'], verbose=False, labels=labels)
    for top1, count in ((29., labels == 'teacher'), (31., 0), (None, 0)):
        caplog.clear()
        TeacherCheck(task, str(tmp_path), make_validator(task)).record(TeacherResult(top1))
        assert caplog.text.count('Guessing gives 25.0 %') == count
