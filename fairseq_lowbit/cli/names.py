"""What a command's rows are called: NAME=VALUE."""

from fairseq_lowbit.errors import LowbitError


def read_named(text: str, kind: str) -> tuple[str, str]:
    """The name and what stands behind it; ``kind`` says what that is. Raises LowbitError if either
    is missing."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise LowbitError(f"{text!r}: write NAME={kind}")
    return name, value
