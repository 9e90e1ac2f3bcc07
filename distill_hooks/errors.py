"""Helpers for error messages."""
__all__ = ['first_line', 'one_line']


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: Exception) -> str:
    """Return an error's message in one line of at most 400 characters; its type if it has none."""
    return ' '.join(str(error).split())[:400] or type(error).__name__
