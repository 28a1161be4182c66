"""The one error that a user can mend."""


class UserError(Exception):
    """One clear sentence: what was found, what was expected, and which flag or file mends it.

    The command line prints it without a traceback and ends with status 2.
    """
