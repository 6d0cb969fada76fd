"""What people fine-tune, tiny: adapters, frozen and quantised layers, activation checkpoints, half precision."""

from functools import partial

import pytest
import torch
from harness import CLASSES, FEATURES, MOMENTUM, Model
from model_zoo import CURVED, ROUNDED, UNCLEAR, Case, Language, LoRA, bert, gpt2
from torch import nn
from torch.nn import functional as F


class Merged(Language):
    """Merges its adapters into the frozen weights at the end."""

    def on_train_end(self):
        self.net = self.net.merge_and_unload()


def trained(model, factor=8.0):
    """A base whose weights are larger than at the start, so that its adapters change the loss."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(factor)
    return model


def lora_gpt2(dropout=0.1):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=dropout
    )
    return Merged(peft.get_peft_model(trained(gpt2().net), config), partial(MOMENTUM, lr=0.5))


def lora_bert(dora=False):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], use_dora=dora)
    return Merged(peft.get_peft_model(trained(bert().net), config), partial(MOMENTUM, lr=0.5))


def checkpointed(reentrant):
    model = gpt2()
    model.net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


class Int8Linear(nn.Module):
    """A frozen layer whose weight is kept in 8 bits."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised():
    """An adapter on top of a layer in 8 bits, as QLoRA has it."""
    frozen = Int8Linear(nn.Linear(FEATURES, 5))
    return Model(nn.Sequential(frozen, nn.Tanh(), LoRA(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, CLASSES)))


#: The product of both factors is of second order along the update: the loss tends to a limit.
FLAT = {"critical_sharpness": "does not rise along"}

FINE_TUNING = {
    "lora_gpt2": Case(lora_gpt2, CURVED, failed=FLAT, blocks=True),
    "lora_bert": Case(lora_bert, CURVED, failed=FLAT, blocks=True),
    "gradient_checkpointing_gpt2": Case(partial(checkpointed, False), CURVED, blocks=True),
    "gradient_checkpointing_reentrant": Case(partial(checkpointed, True), CURVED, blocks=True),
    "quantised_frozen": Case(quantised, kernel="layer and structured"),
    "lora_bf16_true": Case(
        lora_gpt2, "exact, bfloat16", failed=ROUNDED | FLAT, trainer={"precision": "bf16-true"}, blocks=True,
    ),
    "16_mixed": Case(Model, "exact, bfloat16", failed=ROUNDED, partly=UNCLEAR, trainer={"precision": "16-mixed"}),
}  # fmt: skip
#: Those that take long.
SLOW = {"gradient_checkpointing_gpt2", "gradient_checkpointing_reentrant", "lora_bf16_true"}
