"""The error a person can mend: the command line prints its message alone, without a traceback."""


class InputError(ValueError):
    """Bad input. The message says what was wrong, where (file, line or argument), and what would fit."""
