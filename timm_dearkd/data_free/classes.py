"""Classes of a CNN: indices, names, and the same classes in another network."""
import logging
from typing import Any, List, Optional, Sequence

from timm_dearkd.analysis.inputs import label_names
from timm_dearkd.engine.distillation import saved_names
from timm_dearkd.engine.image_folder import class_order, first_names, normal_name

from .dataset import folder_name

_logger = logging.getLogger(__name__)


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
        first, dash, last = text.partition('-')
        if not first.isdecimal() or (dash and not last.isdecimal()):
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

    Warns of a class whose folder has another name.

    Args:
        path: File with a name per line; None takes the names that the model was saved with, else the class indices.
        model: The CNN.

    Raises:
        ValueError: If the file does not have one name per class.
    """
    count: int = model.num_classes
    names = label_names(model) or []
    if path:
        with open(path, encoding='utf-8-sig') as f:
            names = [line.strip() for line in f if line.strip()]
        if len(names) != count:
            raise ValueError(f'--class-names {path} has {len(names)} names, expected {count}, one per class.')
    if len(names) != count:
        names = [f'{index:0{len(str(count - 1))}d}' for index in range(count)]
    folders = _folder_names(names)
    changed = [(name, folder) for name, folder in zip(names, folders) if normal_name(name) != folder]
    if changed:
        _logger.warning(
            f'{len(changed)} of {count} class names are invalid or not unique as folder names. {changed[0][0]!r}'
            f' becomes {changed[0][1]!r}. The student gets the names of the folders. Rename the folders of its'
            ' validation images to match.')
    return folders


def _folder_names(names: Sequence[str]) -> List[str]:
    """Return a folder name for each class name; all are different."""
    names = [folder_name(name, index) for index, name in enumerate(names)]
    while len(set(names)) < len(names):
        names = [f'{name} {index}' if names.count(name) > 1 else name for index, name in enumerate(names)]
    return names


def match_student(student: Any, names: Sequence[str]) -> List[int]:
    """Return the CNN's class for each class of a student: by name if the CNN knows all names, else by index.

    Args:
        student: The student, which may know fewer classes.
        names: Class names of the CNN, see `read_class_names`.

    Raises:
        ValueError: If the classes cannot be matched.
    """
    own = _folder_names(saved_names(student))
    if own and set(own) <= set(names):
        return [names.index(name) for name in own]
    return _match_in_order(student, own, names, 'student')


def match_verifier(verifier: Any, model: Any, names: Sequence[str]) -> List[int]:
    """Return the verifier's class for each class of a CNN: by name if the verifier knows all names, else by index.

    Args:
        verifier: The verifier, which may know more classes.
        model: The CNN.
        names: See `match_student`.

    Raises:
        ValueError: If the classes cannot be matched.
    """
    own = _folder_names(label_names(verifier) or [])
    for known in (list(names), _folder_names(label_names(model) or [])):
        if known and set(known) <= set(own):
            return [own.index(name) for name in known]
    return _match_in_order(verifier, own, names, 'verifier')


def _match_in_order(model: Any, own: Sequence[str], names: Sequence[str], role: str) -> List[int]:
    """Match the classes by index, if both networks have as many. Warns if that may be wrong."""
    if model.num_classes != len(names):
        raise ValueError(
            f'--{role} has {model.num_classes} classes, the CNN {len(names)}, and their names do not match.'
            f' Choose a {role} that was trained on the same classes.')
    if not own and list(names) != class_order(names):
        _logger.warning(
            f'--{role} has no class names. Its classes are taken in the order of the CNN: {first_names(names)}. If they'
            f' have another order, choose another {role}.')
    different = [(name, other) for name, other in zip(names, own) if name != other]
    if different:
        _logger.warning(
            f'The classes of --{role} have other names than those of the CNN, and are taken in its order:'
            f' {different[0][0]!r} is {different[0][1]!r}. If they are others, choose another {role}.')
    return list(range(len(names)))
