"""Proximal maps and projections that are applied to the weights after the optimizer's step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from lsp_callbacks._validation import number


@dataclass(frozen=True)
class Box:
    """Weight clipping: the projection onto ``[low, high]``, number by number; ``Box(0)`` keeps weights nonnegative."""

    #: Each number is moved by itself.
    elementwise: ClassVar[bool] = True

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"low={self.low!r} and high={self.high!r}: give low <= high")

    def __call__(self, name: str, tensor: Tensor, lr: float) -> Tensor:
        return tensor.clamp(self.low, self.high)

    def penalty(self, name: str, tensor: Tensor) -> Tensor:
        return _indicator(bool(((tensor >= self.low) & (tensor <= self.high)).all()), tensor)


@dataclass(frozen=True)
class _Limited(ABC):
    """A projection of weights, as matrices of rows by all else; tensors of one axis, such as biases, are left alone."""

    limit: float

    def __post_init__(self):
        number("limit", self.limit, above=0)

    def __call__(self, name: str, tensor: Tensor, lr: float) -> Tensor:
        return tensor if tensor.ndim < 2 else self._projected(tensor.flatten(1)).view_as(tensor)

    def penalty(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return _indicator(True, tensor)
        # A projected tensor is within, whatever its rounding.
        return _indicator(bool((self._norms(tensor.flatten(1)) <= self.limit * (1 + 1e-5)).all()), tensor)

    @abstractmethod
    def _norms(self, matrix: Tensor) -> Tensor: ...

    @abstractmethod
    def _projected(self, matrix: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MaxNorm(_Limited):
    """The projection of each row of a weight (its first axis; of a convolution each filter) onto ``||row|| <= limit``.

    Tensors of one axis, such as biases, are left alone.
    """

    def _norms(self, matrix: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrix, dim=1)

    def _projected(self, matrix: Tensor) -> Tensor:
        norms = self._norms(matrix)
        outside = norms > self.limit
        return matrix * torch.where(outside, self.limit / torch.where(outside, norms, 1.0), 1.0)[:, None]


@dataclass(frozen=True)
class SpectralClip(_Limited):
    """The projection of each weight, as a matrix of rows by all else, onto ``||W||_2 <= limit``.

    Singular values are clipped. Of a convolution that is the reshaped kernel, whose norm is not that of the layer.
    """

    def _norms(self, matrix: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(matrix, 2)

    def _projected(self, matrix: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        if not bool((s > self.limit).any()):  # its derivative is 1 there, also where singular values coincide
            return matrix
        return u * s.clamp(max=self.limit) @ v


@dataclass(frozen=True)
class SoftThreshold:
    """The proximal map of ``strength ||theta||_1``: each number moves by ``lr * strength`` towards 0, no further."""

    #: Each number is moved by itself.
    elementwise: ClassVar[bool] = True

    strength: float

    def __post_init__(self):
        number("strength", self.strength, above=0)

    def __call__(self, name: str, tensor: Tensor, lr: float) -> Tensor:
        threshold = lr * self.strength
        return (tensor - threshold).relu() - (-tensor - threshold).relu()

    def penalty(self, name: str, tensor: Tensor) -> Tensor:
        return self.strength * tensor.abs().sum()


@dataclass(frozen=True)
class Ridge:
    """The proximal map of ``strength ||theta||^2 / 2``: ``theta / (1 + lr strength)``, decay after the step."""

    #: Each number is moved by itself.
    elementwise: ClassVar[bool] = True

    strength: float

    def __post_init__(self):
        number("strength", self.strength, above=0)

    @property
    def modulus(self) -> float:
        """Return the modulus of strong convexity."""
        return self.strength

    def __call__(self, name: str, tensor: Tensor, lr: float) -> Tensor:
        return tensor / (1 + lr * self.strength)

    def penalty(self, name: str, tensor: Tensor) -> Tensor:
        return self.strength / 2 * tensor.square().sum()


@dataclass(frozen=True)
class Only:
    """Another one, for parameters whose name matches a glob: ``Only("*.weight", Box(-1, 1))``."""

    names: str
    prox: Any

    def __call__(self, name: str, tensor: Tensor, lr: float) -> Tensor:
        return self.prox(name, tensor, lr) if fnmatchcase(name, self.names) else tensor

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "elementwise":
            return self.prox.elementwise
        if attribute != "penalty":  # strong convexity holds for some of the parameters only
            raise AttributeError(attribute)
        inner = self.prox.penalty
        return lambda name, tensor: inner(name, tensor) if fnmatchcase(name, self.names) else tensor.new_zeros(())


def _indicator(within: bool, like: Tensor) -> Tensor:
    return like.new_full((), 0.0 if within else math.inf)
