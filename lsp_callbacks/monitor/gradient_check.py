"""Whether the optimizer is given the gradient that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from lsp_callbacks.autograd.spread_tensors import local
from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.step.fingerprint import identical
from lsp_callbacks.step.ranks import Ranks

#: Parameters, each with the gradient that it should have.
Gradients = list[tuple[nn.Parameter, Tensor]]


def copies_of_gradients(parameters: Iterable[nn.Parameter]) -> Gradients:
    """Return the parameters that have a gradient, each with a copy of it."""
    return [(p, p.grad.clone()) for p in parameters if p.grad is not None]


class GradientCheck:
    """The gradients that a measured step should give to its optimizer, until they have been compared.

    Args:
        errors: what happens where they cannot be copied or compared.

    Attributes:
        is_expected: whether there are any.
    """

    def __init__(self, errors: ErrorPolicy):
        self.errors, self.ranks = errors, Ranks()
        self.forget()

    def forget(self) -> None:
        """Compare nothing."""
        self._expected: Gradients = []
        self.is_expected = False

    def expect(self, gradients: Callable[[], Gradients]) -> None:
        """Remember what the gradients should be; called on every rank, also where ``gradients`` raises."""
        self._expected, self.is_expected = [], True
        try:
            self._expected = gradients()
        except Exception as error:
            self.errors.caught("the gradient could not be copied to be compared later", error)

    def is_changed(self, *, is_gone_allowed: bool) -> bool:
        """Return True if a gradient is another one, on any rank; nothing is compared a second time.

        Args:
            is_gone_allowed: whether a gradient may have been set to None, as after the update.
        """
        if not self.is_expected:
            return False
        expected = self._expected
        self.forget()

        def differs() -> bool:
            there = [(local(p.grad), local(gradient)) for p, gradient in expected if p.grad is not None]
            is_gone = len(there) < len(expected)
            return (is_gone and not is_gone_allowed) or not identical(*([pair[k] for pair in there] for k in (0, 1)))

        try:
            if self.ranks.world == 1:
                return differs()
            return self.ranks.any(differs, "the gradient after the step")
        except Exception as error:
            self.errors.caught("the gradient could not be compared with the measured one", error)
            return False
