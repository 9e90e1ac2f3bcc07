"""What the messages of errors have in common."""
__all__ = ['first_line']


def first_line(error: Exception) -> str:
    """Of an error's text; its type where there is none, as of a bare `assert`."""
    return (str(error).splitlines() or [type(error).__name__])[0]
