"""Helpers for error messages."""
__all__ = ['first_line']


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
