"""Classes of a CNN: indices, names, and the same classes in another network."""
from typing import Any, List, Optional, Sequence

from timm_dearkd.analysis.inputs import label_names
from timm_dearkd.engine.distillation import label_names as saved_names

from .dataset import folder_name

__all__ = ['match_classes', 'parse_classes', 'read_class_names']


def parse_classes(texts: Optional[Sequence[str]], num_classes: int) -> List[int]:
    """Return the sorted class indices of --classes.

    Args:
        texts: Indices such as '3' and ranges such as '0-9'; None means all classes.
        num_classes: Number of classes of the CNN.

    Raises:
        ValueError: If a text is no index or range, or the CNN does not have the class.
    """
    classes: List[int] = []
    for text in texts or [f'0-{num_classes - 1}']:
        first, _, last = text.partition('-')
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f'--classes has {text!r}, expected an index such as 3 or a range such as 0-9.')
        if int(last or first) < int(first):
            raise ValueError(f'--classes has the range {text!r}, whose end is before its start.')
        classes += range(int(first), int(last or first) + 1)
    outside = [index for index in classes if index >= num_classes]
    if outside:
        raise ValueError(f'--classes has class {outside[0]}, but the CNN has classes 0 to {num_classes - 1}.')
    return sorted(set(classes))


def read_class_names(path: Optional[str], model: Any) -> List[str]:
    """Return a folder name for each class of a CNN; all are different.

    Args:
        path: File with a name per line; None takes the names that the model was saved with, else the class indices.
        model: The CNN.

    Raises:
        ValueError: If the file does not have one name per class.
    """
    count: int = model.num_classes
    names = label_names(model) or []
    if path:
        with open(path, encoding='utf-8') as f:
            names = [line.strip() for line in f if line.strip()]
        if len(names) != count:
            raise ValueError(f'--class-names {path} has {len(names)} names, expected {count}, one per class.')
    if len(names) != count:
        names = [f'{index:0{len(str(count - 1))}d}' for index in range(count)]
    names = [folder_name(name, index) for index, name in enumerate(names)]
    return [f'{name} {index}' if names.count(name) > 1 else name for index, name in enumerate(names)]


def match_classes(model: Any, names: Sequence[str], role: str) -> List[int]:
    """Return the CNN's class index for each class of another network.

    Classes are matched by name if all names of the network are names of the CNN, else by index.

    Args:
        model: The other network.
        names: Class names of the CNN, see `read_class_names`.
        role: Flag of the other network without its dashes, for the error.

    Raises:
        ValueError: If the classes cannot be matched.
    """
    own = [folder_name(name, index) for index, name in enumerate(saved_names(model))]
    if own and set(own) <= set(names):
        return [names.index(name) for name in own]
    if model.num_classes != len(names):
        raise ValueError(
            f'--{role} has {model.num_classes} classes, the CNN {len(names)}, and their names do not match.'
            f' Choose a {role} that was trained on the same classes.')
    return list(range(len(names)))
