"""What ends a run without being wrong input."""


class Collapsed(RuntimeError):
    """The model's loss is not finite, or so high that the model is of no use."""
