"""A view of a frozen model that ends after its last layer of interest."""
import copy
import itertools
from typing import Any, Callable, Dict, Iterable, List, Sequence, Set

import torch
import torch.nn as nn

from .capture import find_module


class _Skipped(nn.Module):
    """A module that returns its first argument."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


def _later_modules(model: nn.Module, layers: Sequence[str], run: Callable[[], Any]) -> List[str]:
    """Return the names of the outermost modules whose first call comes after the last call of all layers."""
    clock = itertools.count()
    first_call: Dict[nn.Module, int] = {}
    end: List[int] = []

    def note_call(module: nn.Module, *_: Any) -> None:
        first_call.setdefault(module, next(clock))

    def note_end(*_: Any) -> None:
        end.append(next(clock))

    handles = [module.register_forward_pre_hook(note_call) for module in model.modules()]
    handles += [find_module(model, layer).register_forward_hook(note_end) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    later = {names[module] for module, time in first_call.items() if time > end[-1]}
    return [name for name in later if not any(name.startswith(f'{other}.') for other in later)]


def _copy_container(module: nn.Module) -> nn.Module:
    """Return a copy with the same parameters, buffers, hooks and children, whose children can be replaced."""
    container = copy.copy(module)
    container._modules = dict(module._modules)
    return container


def _without(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a view of a model in which some modules are skipped. All others are shared."""
    view = _copy_container(model)
    own: Set[nn.Module] = {view}
    for name in names:
        parent: Any = view
        *path, last = name.split('.')
        for part in path:
            if parent._modules[part] not in own:
                parent._modules[part] = _copy_container(parent._modules[part])
                own.add(parent._modules[part])
            parent = parent._modules[part]
        parent._modules[last] = _Skipped()
    return view


@torch.no_grad()
def truncate(
        model: nn.Module,
        layers: Sequence[str],
        run: Callable[[nn.Module], List[torch.Tensor]],
) -> nn.Module:
    """Return a view of a model that computes nothing after its last layer of interest.

    The view shares all modules up to there, their hooks included, and runs the model's own forward over them. So it
    computes the same maps, bit for bit, and compiles as the model does. Its output has no meaning. If a layer is inside
    a block that needs its other modules, the block is kept whole.

    Args:
        model: A model in eval mode.
        layers: Module names of the layers.
        run: Runs a model on a fixed input, and returns the outputs of the layers.

    Returns:
        The view, or the model itself if its forward does not work without the later modules.
    """
    expected: List[torch.Tensor] = []
    later = _later_modules(model, layers, lambda: expected.extend(run(model)))
    for depth in sorted({name.count('.') for name in later}, reverse=True):
        view = _without(model, (name for name in later if name.count('.') <= depth))
        try:
            found = run(view)
        except Exception:  # models raise any kind of error, assertions included
            continue
        if all(map(torch.equal, found, expected)):  # a skipped module may have changed the map in place, too
            return view
    return model
