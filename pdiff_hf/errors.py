"""The base of all errors that a user can cause and mend."""


class PdiffError(Exception):
    """Something is wrong with what was given; the message says what was found, what was expected and what to do."""
