"""Fold the BatchNorm of a frozen model into its convolutions."""
import contextlib
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_weights

MAX_ERROR = 1e-4  # relative to the largest output; ResNets, RegNetY and EfficientNets stay below 4e-6


def _find_pairs(
        model: nn.Module,
        run: Callable[[], List[torch.Tensor]],
) -> Tuple[List[torch.Tensor], Dict[nn.Module, Any]]:
    """Return the outputs of `run`, and the convolution whose output each BatchNorm takes."""
    outputs: List[Tuple[torch.Tensor, nn.Module]] = []  # the tensors live, so that their ids are unique
    pairs: Dict[nn.Module, Any] = {}

    def keep(conv: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.append((output, conv))

    def match(bn: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        for output, conv in outputs:
            if args and output is args[0]:
                pairs[bn] = conv

    handles = []
    for module in model.modules():
        weight = module._parameters.get('weight')  # a parametrised one is no parameter
        if module._forward_hooks or weight is None or weight.dtype != torch.float32:  # a hook needs the output as it is
            continue
        if type(module).forward is nn.Conv2d.forward:
            handles.append(module.register_forward_hook(keep))
        elif module._buffers.get('running_mean') is not None and type(module).forward in (
                nn.BatchNorm2d.forward, BatchNormAct2d.forward):
            handles.append(module.register_forward_pre_hook(match))
    try:
        return run(), pairs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute in float32 on CUDA, where PyTorch's convolutions round to TF32: by more than `MAX_ERROR`."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = allowed


@torch.no_grad()
@_without_tf32()
def fold_batchnorm(model: nn.Module, run: Callable[[], List[torch.Tensor]]) -> int:
    """Fold each BatchNorm that takes the output of a convolution into that convolution, in place.

    The model computes the same up to rounding, without a pass over memory per BatchNorm. If the outputs differ by more,
    because a convolution's output is used elsewhere too, the model stays as it was.

    Args:
        model: A model in eval mode.
        run: Runs the model on a fixed input and returns all outputs that must stay the same.

    Returns:
        The number of folded BatchNorm modules.
    """
    expected, pairs = _find_pairs(model, run)
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    originals = [(conv, conv.weight, conv.bias, bn) for bn, conv in pairs.items()]
    for conv, weight, bias, bn in originals:
        norm: Any = bn
        conv.weight, conv.bias = fuse_conv_bn_weights(
            weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        setattr(*parents[bn], rest)
    if not all((a - b).abs().max() <= MAX_ERROR * b.abs().max() for a, b in zip(run(), expected)):
        for conv, weight, bias, bn in originals:
            conv.weight, conv.bias = weight, bias
            setattr(*parents[bn], bn)
        return 0
    return len(originals)
