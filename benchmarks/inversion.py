"""Time a step of DF-DearKD's image optimisation, the CNN alone, and a plain implementation.

The variants take turns in one process (A B C A B C ...). The figures are medians. "Bare" is the CNN's forward,
cross-entropy and the gradient of the images. "Step" adds the BatchNorm statistics, the priors, Adam, the shift and the
flip. "Plain" has no shift and no flip, takes the statistics by `mean` and `var`, and also computes the gradients of the
weights, as DeepInversion's code does.
One thread by default, so that the figures are those of a core. Weights are random.

    python benchmarks/inversion.py                   # some minutes on a slow core
    python benchmarks/inversion.py --models resnet50 --device cuda --amp-dtype bfloat16 --size 224
"""
import argparse

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timing import medians

from timm_dearkd.data_free.inversion import Execution, Inverter, Resolution
from timm_dearkd.data_free.losses import l2_prior, total_variation
from timm_dearkd.engine.process import Precision, select_device

NORM = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def make_bare(model, images, targets, precision, compile=None):
    def loss():
        with precision.autocast():
            return F.cross_entropy(model(images).float(), targets)

    run_loss = torch.compile(loss, backend=compile, dynamic=False) if compile else loss
    return lambda: torch.autograd.grad(run_loss(), images)


def make_step(model, images, targets, precision, channels_last, compile=None):
    size = images.shape[-1]
    inverter = Inverter(
        model, **NORM, resolutions=[Resolution(size, 1, 0.1)], diversity='none',
        execution=Execution(precision.autocast, channels_last, compile))
    optimizer = torch.optim.Adam([images], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    return lambda: inverter.step(images, targets, optimizer, size, generator)


def make_plain(model, images, targets, precision):
    terms = []

    def measure(module, args):
        x = args[0]
        mean, var = x.mean((0, 2, 3)), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)
        terms.append((mean - module.running_mean).norm() + (var - module.running_var).norm())

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(measure)
    optimizer = torch.optim.Adam([images], lr=0.1)

    def run():
        optimizer.zero_grad()
        model.zero_grad()
        with precision.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets) + 5e-2 * sum(terms)
        loss = loss + 1e-4 * total_variation(images) + 1e-5 * l2_prior(images)
        terms.clear()
        loss.backward()
        optimizer.step()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50', 'efficientnet_lite0'])
    parser.add_argument('--size', type=int, default=112)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16'))
    parser.add_argument('--no-channels-last', action='store_true')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, _ = select_device(args.device)
    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp_dtype else None)
    memory_format = torch.contiguous_format if args.no_channels_last else torch.channels_last
    targets = torch.randint(1000, (args.batch_size,), device=device)

    def images():
        x = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
        return x.contiguous(memory_format=memory_format).requires_grad_()

    def model(name):
        return timm.create_model(name).to(device).to(memory_format=memory_format).eval()

    print(f'{device}, {args.size}x{args.size}, batch {args.batch_size}, {args.amp_dtype or "float32"}; milliseconds')
    print('| CNN | bare | step | plain | step / bare | plain / step |\n| --- | --- | --- | --- | --- | --- |')
    for name in args.models:
        functions = dict(
            bare=make_bare(model(name).requires_grad_(False), images(), targets, precision),
            step=make_step(model(name), images(), targets, precision, not args.no_channels_last),
            plain=make_plain(model(name), images(), targets, precision),
        )
        bare, step, plain = (1e3 * seconds for seconds in medians(functions, args.rounds, device).values())
        ratios = f'{step / bare:.2f} | {plain / step:.2f}'
        print(f'| {name} | {bare:.0f} | {step:.0f} | {plain:.0f} | {ratios} |', flush=True)


if __name__ == '__main__':
    main()
