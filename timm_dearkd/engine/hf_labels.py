"""Labels of Hugging Face data sets (`--dataset hfds/NAME`), checked before training."""
import logging
from typing import Any, Dict, Optional

import numpy as np

from .image_folder import class_order

__all__ = ['hf_classes']

_logger = logging.getLogger(__name__)


def hf_classes(
        reader: Any,
        name: str,
        split: str,
        class_map: Optional[Dict[Any, int]] = None,
        is_training: bool = False,
) -> Optional[Dict[Any, int]]:
    """Return the class index of each label of a Hugging Face data set that does not number its labels itself.

    Args:
        reader: timm's `ReaderHfds` of the split.
        name: What `--dataset` calls it.
        split: Its split.
        class_map: Class index by label that the reader was made with; None takes the data set's own.
        is_training: Log which classes were found.

    Returns:
        Sorted labels and their indices; None where the data set has a `ClassLabel`, or with a class map.

    Raises:
        ValueError: If there is no such column, or images have no label, a label that the class map has not, or one that
            is neither an integer nor text.
    """
    if reader.target_keys or '/' in reader.label_key:  # several columns or a nested one: timm's to read
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
        known = {*class_map, *(index for index, label in reader._source_names.items() if label in class_map)}
        unknown = class_order(str(label) for label in labels if label not in known)
        if unknown:
            raise ValueError(f'The class map has no entry for labels in {where}: {", ".join(unknown[:5])}.')
        return None
    if reader.class_to_idx:
        return None
    ordered = sorted(labels) if numeric else class_order(labels)
    if is_training:
        shown = ', '.join(map(str, ordered[:10])) + (', ...' if len(ordered) > 10 else '')
        _logger.info(f'{name} has no names for its labels. Their order is that of the classes: {shown}.')
    return {label: index for index, label in enumerate(ordered)}
