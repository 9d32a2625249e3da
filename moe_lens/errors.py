"""The one error class for bad input, which the command lines turn into exit code 2."""


class MoELensError(ValueError):
    """Input that cannot be used; the message says what was expected, what came and what to do."""
