import copy

import pytest
import torch
from timm.task import ClassificationTask

from timm_dearkd.engine.optimizer import build_optimizer
from timm_dearkd.engine.process import SINGLE
from timm_dearkd.train import _parse_args


def build(name, device='cpu', flags=(), **options):
    """The optimizer of a small model on the CPU, for a run on `device`."""
    args = _parse_args(['DIR', '--opt', name, '--lr', '0.1', *flags])[0]
    args.opt_kwargs = options
    torch.manual_seed(0)
    return build_optimizer(args, ClassificationTask(torch.nn.Linear(3, 2)), torch.device(device), SINGLE)


def weights(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def step(optimizer, count):
    for i in range(count):
        for p in weights(optimizer):
            p.grad = torch.full_like(p, (-2.) ** i)
        optimizer.step()


@pytest.mark.parametrize('name', ['lookahead_adamw', 'lookahead_sgd', 'lookahead_lamb', 'adamw'])
def test_an_optimizer_goes_on_from_its_state(name):
    """Over Lookahead's steps of every sixth update, and with its own kind of step, not the checkpoint's."""
    before, after = build(name, **({} if 'lamb' in name else dict(fused=True))), build(name)
    step(before, 8)
    with torch.no_grad():
        for p, q in zip(weights(after), weights(before)):
            p.copy_(q)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(group.get('fused') is None for group in after.param_groups)
    step(before, 5)
    step(after, 5)
    for p, q in zip(weights(after), weights(before)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize('name,fused', [
    ('adam', True), ('adamw', True), ('sgd', True), ('momentum', True), ('adagrad', None), ('lamb', None),
    ('lookahead_adamw', None)])
def test_the_fused_step_is_taken_where_every_pytorch_has_it(name, fused):
    assert build(name, 'cuda').defaults.get('fused') is fused
    assert build(name).defaults.get('fused') is None


@pytest.mark.parametrize('flags,fused', [
    (['--amp'], None), (['--amp', '--momentum', '0'], True), (['--amp', '--amp-dtype', 'bfloat16'], True)])
def test_a_loss_scale_does_not_meet_fused_momentum(flags, fused):
    """PyTorch leaves the momentum uninitialised where the first step overflows."""
    assert build('momentum', 'cuda', flags).defaults.get('fused') is fused
