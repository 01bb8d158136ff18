"""The one kind of error that a user causes and can mend."""


class UserError(ValueError):
    """Bad input, said in one line: what came, what was expected, what to do. The command line prints it and exits 2."""


class RankLost(UserError):
    """Another process of a group that works together has ended, or does not answer."""
