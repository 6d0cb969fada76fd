"""Whether the optimizer is given the gradient that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.spread_tensors import local_parts
from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.step.fingerprint import identical, sums_of_rows
from lsp_callbacks.step.ranks import Ranks

#: By parameter, the gradient that it should have; those without one are not there.
Gradients = dict[nn.Parameter, Tensor]


def gradients_of(parameters: Iterable[nn.Parameter]) -> Gradients:
    """Return the gradients of the parameters that have one."""
    return {p: p.grad for p in parameters if p.grad is not None}


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
        self._expected: dict[nn.Parameter, Any] = {}
        self._by_sums = self.is_expected = False

    def expect(self, gradients: Callable[[], Gradients], *, by_sums: bool = False) -> None:
        """Remember what the gradients should be; called on every rank, also where ``gradients`` raises.

        Args:
            gradients: returns them; they are copied.
            by_sums: whether sums over some rows of each are compared, which no usual change leaves as they are,
                instead of copies.
        """
        self._expected, self._by_sums, self.is_expected = {}, by_sums, True
        try:
            coming = gradients()
            parts = local_parts(coming.values())
            kept: Sequence[Any] = sums_of_rows(parts) if by_sums else [*map(torch.clone, parts)]
            self._expected = dict(zip(coming, kept))
        except Exception as error:
            self.errors.caught("the gradient could not be copied to be compared later", error)

    def is_changed(self, *, is_gone_allowed: bool) -> bool:
        """Return True if a gradient is another one, on any rank; nothing is compared a second time.

        Args:
            is_gone_allowed: whether a gradient may have been set to None, as after the update.
        """
        if not self.is_expected:
            return False
        expected, by_sums = self._expected, self._by_sums
        self.forget()

        def differs() -> bool:
            there = gradients_of(expected)
            if len(there) < len(expected) and not is_gone_allowed:
                return True
            values, parts = [expected[p] for p in there], local_parts(there.values())
            if not by_sums:
                return not identical(parts, values)
            sums = sums_of_rows(parts)
            return sums != values and any(a != b and not (a != a and b != b) for a, b in zip(sums, values))

        try:
            if self.ranks.world == 1:
                return differs()
            return self.ranks.any(differs, "the gradient after the step")
        except Exception as error:
            self.errors.caught("the gradient could not be compared with the measured one", error)
            return False
