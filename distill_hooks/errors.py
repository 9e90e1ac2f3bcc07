"""Helpers for error messages."""
from typing import Optional


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException, limit: Optional[int] = 600) -> str:
    """Return an error's message in one line, of at most `limit` characters; its type if it has none."""
    return ' '.join(str(error).split())[:limit] or type(error).__name__
