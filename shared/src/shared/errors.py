"""The error that is the user's to mend."""


class BadInput(ValueError):
    """What the user gave cannot be used. The message names the cause and the remedy in one line."""
