"""Feature maps of a model's modules, taken by forward hooks."""
import difflib
from functools import partial
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn

__all__ = ['FeatureCapture', 'find_module']


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`.

    Raises:
        ValueError: There is none; the message lists the names nearest to it.
    """
    modules = {n: m for n, m in model.named_modules() if n}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or [n for n, _ in model.named_children()]
        raise ValueError(f'{type(model).__name__} has no layer {name!r}. The nearest names: {", ".join(near)}.')
    return modules[name]


class FeatureCapture:
    """Keeps the outputs of named modules of the latest forward, until they are taken.

    The hooks are placed once, so that they can be compiled with the model, and go with `close` or the end of a `with`.

    Args:
        model: The model to look into.
        names: Module names, as `named_modules` has them.

    Raises:
        ValueError: An unknown name.

    Examples:

        ```python
        with FeatureCapture(model, ['layer2']) as capture:
            logits = model(images)
            feature_map, = capture.take()  # (B, C, H, W)
        ```
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self.enabled = True
        self._features: Dict[str, torch.Tensor] = {}
        modules = {name: find_module(model, name) for name in self.names}
        # bound methods, which go along when the model is copied together with this object
        self._handles = [m.register_forward_hook(partial(self._keep, name)) for name, m in modules.items()]

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.enabled:
            self._features[name] = output

    def take(self) -> List[torch.Tensor]:
        """Outputs of the latest forward in the order of `names`; they are not kept after this.

        Raises:
            ValueError: A module that was not called in it.
        """
        for name in self.names:
            if name not in self._features:
                raise ValueError(f'Layer {name!r} is there, but not called in the forward. Name another one.')
        features = [self._features[name] for name in self.names]
        self._features.clear()
        return features

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._features.clear()

    def __enter__(self) -> 'FeatureCapture':
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
