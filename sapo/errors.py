"""The error a person can mend: the command line prints its message alone, without a traceback."""


class InputError(ValueError):
    """Bad input. The message says what was wrong, where (file, line or argument), and what would fit."""


BROKEN_WEIGHTS = "the policy's logits are not finite: its weights are broken, most often by too high a learning rate."
