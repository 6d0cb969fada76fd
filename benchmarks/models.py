"""Networks like those that people train, with data, loss and optimizer: for what measuring costs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), Residual(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), Residual(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm and beside the identity."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class CharTransformer(nn.Module):
    def __init__(self, vocabulary: int = 65, length: int = 64, width: int = 128, depth: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) / 50)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.place)))


class ViT(nn.Module):
    def __init__(self, size: int = 28, patch: int = 7, width: int = 128, depth: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.place = nn.Parameter(torch.randn((size // patch) ** 2, width) / 50)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


def gpt2(vocabulary: int, length: int, width: int, depth: int, heads: int) -> nn.Module:
    """GPT-2 from a configuration, without pretrained weights and without dropout, for its logits."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=depth, n_head=heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Logits(transformers.GPT2LMHeadModel(config))


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


class Task(pl.LightningModule):
    """Cross-entropy of classes, or of the next token."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


@cache
def images(samples: int) -> TensorDataset:
    """Images of MNIST where the folder ``$MNIST`` is set, otherwise noise: it costs as much."""
    if "MNIST" in os.environ:
        from runs import mnist

        return mnist(samples)
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 1, 28, 28, generator=generator), torch.randint(10, (samples,), generator=generator)
    )


@cache
def text(samples: int, vocabulary: int, length: int) -> TensorDataset:
    """Pieces of ``$MNIST/tinyshakespeare.txt`` for a vocabulary of characters, otherwise random tokens."""
    file = Path(os.environ.get("MNIST", "")) / "tinyshakespeare.txt"
    if vocabulary < 256 and file.is_file():
        characters = file.read_text()
        numbers = {character: i for i, character in enumerate(sorted({*characters}))}
        tokens = torch.tensor([numbers[character] for character in characters[: samples * (length + 1)]])
    else:
        # A chain in which each token is followed by few others, so that there is something to learn.
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(1, 9, (samples * (length + 1),), generator=generator)
        tokens = (7 * steps).cumsum(0) % vocabulary
    rows = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)
    return TensorDataset(rows[:, :-1].clone(), rows[:, 1:].clone())


@dataclass(frozen=True)
class Training:
    """What is trained: network, data, batch size and optimizer."""

    net: Callable[[], nn.Module]
    data: Callable[[], Dataset]
    batch: int
    optimizer: Callable[..., torch.optim.Optimizer]

    def module(self) -> Task:
        return Task(self.net(), self.optimizer)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.data(), batch_size=self.batch, shuffle=True, drop_last=True)


momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
adam = partial(torch.optim.AdamW, lr=3e-4)
TRAININGS = {
    "MLP": Training(mlp, partial(images, 4000), 128, momentum),
    "CNN": Training(cnn, partial(images, 4000), 64, momentum),
    "char transformer": Training(CharTransformer, partial(text, 4000, 65, 64), 32, adam),
    "ViT": Training(ViT, partial(images, 4000), 32, adam),
    "GPT-2 10 M": Training(partial(gpt2, 8192, 64, 256, 10, 4), partial(text, 400, 8192, 64), 8, adam),
    "GPT-2 124 M": Training(partial(gpt2, 50257, 64, 768, 12, 12), partial(text, 40, 50257, 64), 2, adam),
}
