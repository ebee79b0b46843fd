"""The one error a user is meant to read."""


class InputError(ValueError):
    """Something the user gave is wrong: one line that names the value, the bound and the remedy."""
