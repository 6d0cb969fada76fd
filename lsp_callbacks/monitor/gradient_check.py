"""Whether the optimizer is given the gradient that was measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.spread_tensors import local_parts
from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.step.fingerprint import identical, in_one, some_numbers
from lsp_callbacks.step.ranks import Ranks

#: By parameter, the gradient that it should have; those without one are not there.
Gradients = dict[nn.Parameter, Tensor]


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
        self._expected: dict[nn.Parameter, Tensor] = {}
        self._counts: dict[nn.Parameter, int] = {}
        self._some: Tensor | None = None
        self.is_expected = False

    def expect(self, gradients: Callable[[], Gradients], *, by_some: bool = False) -> None:
        """Remember what the gradients should be; called on every rank, also where ``gradients`` raises.

        Args:
            gradients: returns them; they are copied.
            by_some: whether some numbers of each are compared, see `some_numbers`, instead of all.
        """
        self.forget()
        self.is_expected = True
        try:
            coming = gradients()
            parts = local_parts(coming.values())
            if by_some:
                numbers = some_numbers(parts)
                self._counts, self._some = dict(zip(coming, map(len, numbers))), in_one(numbers)
            else:
                self._expected = dict(zip(coming, map(torch.clone, parts)))
        except Exception as error:
            self.errors.caught("the gradient could not be copied to be compared later", error)

    def is_changed(self, *, is_gone_allowed: bool) -> bool:
        """Return True if a gradient is another one, on any rank; nothing is compared a second time.

        Args:
            is_gone_allowed: whether a gradient may have been set to None, as after the update.
        """
        if not self.is_expected:
            return False
        expected, counts, some = self._expected, self._counts, self._some
        self.forget()

        def differs() -> bool:
            compared = counts or expected
            there = {p: p.grad for p in compared if p.grad is not None}
            if len(there) < len(compared) and not is_gone_allowed:
                return True
            if some is None or not there:
                before = [expected[p] for p in there]
                return not identical(local_parts(there.values()), before)
            parts, values = local_parts(there.values()), some
            if len(there) < len(counts):
                values = torch.cat([part for p, part in zip(counts, some.split([*counts.values()])) if p in there])
            numbers = in_one(some_numbers(parts))
            return len(numbers) != len(values) or not identical([numbers], [values])

        try:
            if self.ranks.world == 1:
                return differs()
            return self.ranks.any(differs, "the gradient after the step")
        except Exception as error:
            self.errors.caught("the gradient could not be compared with the measured one", error)
            return False
