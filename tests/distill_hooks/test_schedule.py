import pytest

from distill_hooks import StageWeights, TwoStageSchedule


def test_the_papers_300_epochs():
    schedule = TwoStageSchedule(300)
    assert schedule.stage1_epochs == 250
    assert all(schedule(epoch) == StageWeights(1, 0.5, 10.0) for epoch in range(250))
    for k in range(50):
        stage, alpha, beta = schedule(250 + k)
        assert (stage, beta) == (2, 0.) and alpha == pytest.approx(0.5 + 0.5 * (k + 1) / 50)
    assert schedule(299) == (2, 1., 0.) and schedule(298).uses_labels
    assert not schedule(298).uses_features


def test_the_papers_1000_epochs():
    schedule = TwoStageSchedule(1000, 800, 'ce')
    assert schedule(799) == (1, 0.5, 10.0) and schedule(800) == (2, 1., 0.)


def test_cooldown_belongs_to_stage_two():
    schedule = TwoStageSchedule(10, 6, cooldown_epochs=4)
    assert [schedule(e).stage for e in range(14)] == [1] * 6 + [2] * 8
    assert [schedule(e).alpha for e in range(6, 14)] == pytest.approx([0.5 + 0.5 * (k + 1) / 8 for k in range(8)])
    assert schedule(20).alpha == 1.


@pytest.mark.parametrize('stage1,stages', [(0, [2, 2, 2]), (3, [1, 1, 1])])
def test_a_single_stage(stage1, stages):
    assert [TwoStageSchedule(3, stage1)(e).stage for e in range(3)] == stages


@pytest.mark.parametrize('kwargs,message', [
    (dict(stage1_epochs=11), 'from 0 to 10'),
    (dict(stage1_epochs=-1), 'from 0 to 10'),
    (dict(stage2='none'), "'anneal' or 'ce'"),
    (dict(alpha=1.5), r'\[0, 1\]'),
    (dict(beta=-1.), '0 or more'),
    (dict(beta=float('nan')), '0 or more'),
])
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TwoStageSchedule(10, **kwargs)
