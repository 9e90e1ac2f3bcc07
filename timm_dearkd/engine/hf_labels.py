"""Labels of Hugging Face data sets (`--dataset hfds/NAME`), checked before training."""
import logging
from typing import Any, Dict, List, Optional

import numpy as np

from .image_folder import class_order, normal_label

_logger = logging.getLogger(__name__)


def hf_classes(
        reader: Any,
        name: str,
        split: str,
        class_map: Optional[Dict[Any, int]] = None,
        is_training: bool = False,
) -> Optional[Dict[Any, int]]:
    """Return the class index of each label that timm's reader needs as its class map.

    Args:
        reader: timm's `ReaderHfds` of the split.
        name: Name of the data set, as in `--dataset`.
        split: The split.
        class_map: Class index by label that the reader was created with; None uses the labels of the data set.
        is_training: Log the classes that were found.

    Returns:
        Class index by label, as the data set spells it. Labels without a `ClassLabel` are sorted. None if the reader
        needs no other class map.

    Raises:
        ValueError: If the column does not exist, or images have no label, a label that the class map does not have, or
            a label that is neither an integer nor text.
    """
    if reader.target_keys or '/' in reader.label_key:  # timm reads several columns and nested ones
        return None
    where = f'split {split!r} of {name}'
    if reader.label_key not in reader.dataset.column_names:
        raise ValueError(
            f'There is no column {reader.label_key!r} in {where}. Set --target-key to the column of the labels:'
            f' {", ".join(column for column in reader.dataset.column_names if column != reader.image_key)}.')
    column = reader.dataset.data.column(reader.label_key).to_pandas()
    if column.map(lambda label: isinstance(label, (list, np.ndarray))).any():
        return None  # several labels per image
    numeric = all(isinstance(label, (int, np.integer)) and not isinstance(label, bool) for label in column.dropna())
    missing = int((column.isna() | (column < 0)).sum() if numeric else column.isna().sum())
    if missing:
        raise ValueError(
            f'{missing} of {len(column)} images in {where} have no label (none or below 0). Choose another split, or'
            ' remove these images.')
    labels = column.unique().tolist()
    if not numeric and not all(isinstance(label, str) for label in labels):
        raise ValueError(
            f'Labels in {where} are of type {type(labels[0]).__name__}, expected integers or text. Set --target-key to'
            ' another column.')
    if class_map:
        return _spell(class_map, labels, reader._source_names, where)
    if reader.class_to_idx:
        return None
    ordered = sorted(labels) if numeric else class_order({normal_label(label) for label in labels})
    if is_training:
        shown = ', '.join(map(str, ordered[:10])) + (', ...' if len(ordered) > 10 else '')
        _logger.info(f'{name} has no class names. The sorted labels are the classes: {shown}.')
    indices = {label: index for index, label in enumerate(ordered)}
    return {label: indices[normal_label(label)] for label in labels}


def _spell(class_map: Dict[Any, int], labels: List[Any], names: Dict[int, str], where: str) -> Optional[Dict[Any, int]]:
    """Return a class map with the labels in the Unicode form of the data set too; None if it has them already.

    Args:
        class_map: Class index by label, see `normal_name`.
        labels: Labels of the data set.
        names: Name of each label of a `ClassLabel`.
        where: Name of the split, for the message.

    Raises:
        ValueError: If the class map does not have one of the labels.
    """
    found = {label: label if label in class_map else names.get(label, label) for label in labels}
    unknown = class_order(str(label) for label in found.values() if normal_label(label) not in class_map)
    if unknown:
        raise ValueError(f'The class map has no entry for labels in {where}: {", ".join(unknown[:5])}.')
    spelled = {**class_map, **{label: class_map[normal_label(label)] for label in found.values()}}
    return spelled if len(spelled) > len(class_map) else None
