"""The one exception that a user's mistake raises."""


class LowbitError(Exception):
    """A mistake in a user's input, said in one message that names the file, key or value and what
    would be right."""
