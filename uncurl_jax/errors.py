"""The error that means "the caller's input is wrong"."""


class InputError(ValueError):
    """Input that breaks a rule; its message is one sentence: rule, got, where, remedy.

    The command line prints the message alone and exits with status 2. Raise it before work
    starts and before anything is written. Every other exception is a defect or the environment.
    """
