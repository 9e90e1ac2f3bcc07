"""Time MHCA, plain attention, the learned-bias form and timm's ConViT: layers at T = 197, and whole models.

The variants take turns in one process (A B C A B C ...). The figures are medians. The ratio is to the plain form;
larger is faster. One thread by default, so that the figures are those of a core.

    python benchmarks/attention.py                      # all sizes, a quarter of an hour on a slow core
    python benchmarks/attention.py --sizes tiny --rounds 5
    python benchmarks/attention.py --device cuda --amp-dtype bfloat16 --batch-size 128
"""
import argparse
import contextlib
from typing import Callable, Dict, Tuple

import timm
import torch
import torch.nn.functional as F
from timing import medians
from timm.layers import Attention

import timm_dearkd
from timm_dearkd.attention import ConvAttention

SIZES = {'tiny': (192, 12), 'small': (384, 12), 'base': (768, 16)}  # dim, heads
GRID = (14, 14)


class BiasAttention(ConvAttention):
    """The straightforward MHCA: the positional scores as a (heads, T, T) bias, computed in every forward."""

    def forward(self, x, attn_mask=None, is_causal=False):
        B, T, _ = x.shape
        q, k, v = self._qkv(x).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.rpe().to(q.dtype).unsqueeze(0), scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, T, self.attn_dim))


def step(module: torch.nn.Module, x: torch.Tensor, train: bool, autocast) -> Callable[[], None]:
    """A training step without the optimiser, or an inference, as a function."""
    def run_train():
        module.zero_grad(set_to_none=True)
        with autocast():
            loss = module(x).square().mean()
        loss.backward()

    def run_eval():
        with torch.inference_mode(), autocast():
            module(x)

    module.train(train)
    module.zero_grad(set_to_none=True)  # MHCA keeps no channels for inference while it has a gradient
    return run_train if train else run_eval


def layers(size: str, device: torch.device) -> Dict[str, torch.nn.Module]:
    dim, heads = SIZES[size]
    modules = {
        'plain attention': Attention(dim, heads, qkv_bias=True),
        'MHCA': ConvAttention(dim, heads, grid_size=GRID, qkv_bias=True),
        'MHCA as learned bias': BiasAttention(dim, heads, grid_size=GRID, qkv_bias=True),
    }
    return {name: module.to(device) for name, module in modules.items()}


def models(size: str, device: torch.device) -> Dict[str, torch.nn.Module]:
    heads = SIZES[size][1]
    name = f'dearkd_{size}_patch16_224'
    biased = timm.create_model(name)
    for block in biased.blocks:
        if isinstance(block.attn, ConvAttention):
            block.attn.__class__ = BiasAttention
    modules = {
        f'deit_{size}, {heads} heads': timm.create_model(f'deit_{size}_patch16_224', num_heads=heads),
        f'dearkd_{size}': timm.create_model(name),
        f'dearkd_{size}, rpe dropout by query': timm.create_model(name, rpe_drop_rate=0.1, rpe_drop_mode='query'),
        f'dearkd_{size}, rpe dropout by element': timm.create_model(name, rpe_drop_rate=0.1),
        f'dearkd_{size}, learned bias': biased,
        f'convit_{size}': timm.create_model(f'convit_{size}'),
    }
    return {name: module.to(device) for name, module in modules.items()}


def measure(title: str, modules: Dict[str, torch.nn.Module], shape: Tuple[int, ...], args, autocast) -> None:
    """Print the table of one comparison: milliseconds and speed relative to the first row."""
    x = torch.randn(shape, device=args.device)
    results = {}
    for train in (True, False):  # timm's ConViT keeps a tensor of its first forward, which must not be of an inference
        functions = {name: step(module, x, train, autocast) for name, module in modules.items()}
        results[train] = medians(functions, args.rounds, args.device)
    first = next(iter(modules))
    print(f'\n{title}, batch {args.batch_size}\n')
    print('| | inference, ms | speed | forward + backward, ms | speed |')
    print('| --- | --- | --- | --- | --- |')
    for name in modules:
        cells = [f'{r[name] * 1e3:.1f} | {r[first] / r[name]:.2f}' for r in (results[False], results[True])]
        print(f'| {name} | {" | ".join(cells)} |', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES))
    parser.add_argument('--only', choices=('layers', 'models'), help='Measure just these.')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=9, help='Counted rounds; the median is printed.')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='Autocast to this type.')
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)

    autocast = contextlib.nullcontext
    if args.amp_dtype:
        def autocast():
            return torch.autocast(args.device.type, dtype=getattr(torch, args.amp_dtype))
    print(f'timm_dearkd {timm_dearkd.__version__}, timm {timm.__version__}, torch {torch.__version__},'
          f' {args.device}, {args.threads} thread(s)')
    for size in args.sizes:
        if args.only != 'models':
            shape = (args.batch_size, 197, SIZES[size][0])
            measure(f'Attention layer, {size}', layers(size, args.device), shape, args, autocast)
        if args.only != 'layers':
            measure(f'Whole model, {size}', models(size, args.device), (args.batch_size, 3, 224, 224), args, autocast)


if __name__ == '__main__':
    main()
