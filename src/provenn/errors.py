"""The one kind of error that a user causes and can mend."""


class UserError(ValueError):
    """Bad input, said in one line: what came, what was expected, what to do. The command line prints it and exits 2."""
