"""Outputs of a model's modules, captured by forward hooks."""
import difflib
from functools import partial
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`.

    Raises:
        ValueError: If the model has no such module. The message lists the nearest names.
    """
    modules = {n: m for n, m in model.named_modules() if n}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or [n for n, _ in model.named_children()]
        raise ValueError(f'{type(model).__name__} has no layer {name!r}. The nearest names: {", ".join(near)}.')
    return modules[name]


class FeatureCapture:
    """Forward hooks that keep the outputs of named modules for `take`.

    The hooks are registered once, so that they can be compiled with the model. `close` or the end of a `with` block
    removes them.

    Args:
        model: The model to hook.
        names: Module names as in `named_modules`.

    Raises:
        ValueError: If the model has no such module.

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
        # bound methods, so that a deep copy of the model and this object has hooks of its own
        self._handles = [m.register_forward_hook(partial(self._keep, name)) for name, m in modules.items()]

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.enabled:
            self._features[name] = output

    def take(self) -> List[torch.Tensor]:
        """Return and drop the outputs of the latest forward, in the order of `names`.

        Raises:
            ValueError: If the forward did not call a module.
        """
        for name in self.names:
            if name not in self._features:
                raise ValueError(f'The forward of the model does not call its layer {name!r}. Name another layer.')
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
