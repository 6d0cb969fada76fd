"""What a measurement raises where it will not give a number."""


class Unmeasurable(ValueError):
    """A quantity is not defined here, or not modelled; the message says why and what to do."""


class Unsupported(Unmeasurable):
    """It will not be in any other step of this run either."""


class NotApplicable(Unsupported):
    """There is nothing in this model that the quantity measures; from a preset it is skipped without a warning."""
