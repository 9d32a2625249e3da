"""The one error class for bad input, which the command lines turn into exit code 2, and what models' code raises."""


class MoELensError(ValueError):
    """Input that cannot be used; the message says what was expected, what came and what to do."""


class NotFiniteError(MoELensError):
    """A model whose numbers are not finite where they count, so that nothing measured with it means anything."""


MODEL_CRASHES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's own code raises when it is called otherwise than it expects; out of memory is a RuntimeError."""
