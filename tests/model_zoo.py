"""Every kind of model that users train, tiny, and what is expected of each: by which path, and what is left out why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optimizer_zoo
import torch
import transformers
from harness import (
    CLASSES,
    FEATURES,
    MOMENTUM,
    SGD,
    Closure,
    GradientHook,
    Model,
    Sequence,
    convolutional,
    frozen,
    mlp,
    tied,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lsp_callbacks.quantities import PRESETS

# -- networks ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Fused by default: its kernel cannot be differentiated twice."""

    def __init__(self, width=4):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, activation, width=4):
        super().__init__()
        self.attention = Attention(width)
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 8), activation, nn.Linear(8, width))

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        self.embed, self.block = nn.Linear(2, 4), TransformerBlock(activation or nn.GELU())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.block(self.embed(x.view(-1, 3, 2))).mean(1))


def cnn(activation=nn.ReLU):
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), activation(), nn.Flatten(),
        nn.Linear(36, CLASSES),
    )  # fmt: skip


class Recurrent(Sequence):
    """The last hidden state, whatever the cell."""

    def forward(self, x):
        return self.head(self.recurrent(F.pad(x.view(len(x), 3, 2), (0, 2)))[0][:, -1])


class LoRA(nn.Module):
    """A frozen layer, and a trained product of two thin ones beside it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / 4)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


class FirstCheckpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh())

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


class Checkpointed(nn.Module):
    """Re-entrant, not re-entrant, or not at all."""

    def __init__(self, reentrant, activation=nn.Tanh):
        super().__init__()
        self.first, self.inner = nn.Linear(FEATURES, 5), nn.Sequential(nn.Linear(5, 5), activation(), nn.Dropout(0.2))
        self.last, self.reentrant = nn.Linear(5, CLASSES), reentrant

    def forward(self, x):
        x = self.first(x)
        inner = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.last(inner)


class Bag(nn.Module):
    """Tokens from an embedding whose gradient is sparse."""

    def __init__(self, sparse=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4, sparse=sparse), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(tokens(x)).mean(1)))


def tokens(x):
    """Numbers become words of a vocabulary of 8."""
    return (2 * x).round().clamp(-4, 3).long() + 4


# -- custom functions ----------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """``sin x``, written by hand; it can be differentiated as often as one likes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Detached(Twice):
    """The gradient of sin is right, its derivative is lost without a word."""

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].detach().cos()


class Once(Twice):
    """As `Detached`, and PyTorch raises where it sees it."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class FusedCrossEntropy(torch.autograd.Function):
    """Its gradient is computed in the forward pass, as fused kernels do it: the curvature of the softmax is lost."""

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = F.cross_entropy(leaf, target)
        (ctx.gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.gradient, None


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class Fused(Model):
    def loss(self, batch):
        return FusedCrossEntropy.apply(self.net(batch[0]), batch[1])


# -- Hugging Face --------------------------------------------------------------------------------------------------


class Language(Model):
    """The model's own loss on tokens."""

    def loss(self, batch):
        ids = tokens(batch[0])
        return self.net(input_ids=ids, labels=ids).loss


class Picture(Model):
    def loss(self, batch):
        return self.net(pixel_values=batch[0], labels=batch[1]).loss


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return Language(transformers.GPT2LMHeadModel(config))


def bert():
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    return Language(transformers.BertForMaskedLM(config))


def t5():
    config = transformers.T5Config(
        vocab_size=8, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    return Language(transformers.T5ForConditionalGeneration(config), partial(torch.optim.SGD, lr=0.01))


def vit():
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    return Picture(transformers.ViTForImageClassification(config))


def resnet():
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return Picture(transformers.ResNetForImageClassification(config))


# -- habits of training_step ---------------------------------------------------------------------------------------


class Mixup(Model):
    def loss(self, batch):
        x, y = batch
        weight, order = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(x))
        logits = self.net(torch.lerp(x[order], x, weight))
        return weight * F.cross_entropy(logits, y) + (1 - weight) * F.cross_entropy(logits, y[order])


class Dictionary(Model):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "size": len(batch[0])}


class GAN(Model):
    """Two optimizers that take turns; the first step of a batch is the discriminator's."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1)))
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, FEATURES))

    def discriminator_loss(self, batch, detach=True):
        fake = self.generator(torch.randn(len(batch[0]), 2))
        fake = fake.detach() if detach else fake
        return F.softplus(-self.net(batch[0])).mean() + F.softplus(self.net(fake)).mean()

    def generator_loss(self, batch):
        return F.softplus(-self.net(self.generator(torch.randn(8, 2)))).mean()

    def training_step(self, batch, batch_idx):
        losses = (
            self.discriminator_loss,
            self.generator_loss,
        )
        for optimizer, loss in zip(self.optimizers(), losses):
            optimizer.zero_grad()
            value = loss(batch)
            self.manual_backward(value)
            optimizer.step()
        self.log("loss", value)
        return {"loss": value.detach()}

    def configure_optimizers(self):
        return [self.optimizer(self.net.parameters()), self.optimizer(self.generator.parameters())]


def compiled(backend):
    model = Model()
    model.net = torch.compile(model.net, backend=backend)
    return model


def parametrised(wrap):
    net = mlp()
    net[0] = wrap(net[0])
    return Model(net)


def partly_frozen():
    model = Model(cnn())
    model.net[1].requires_grad_(False)
    model.net[2].requires_grad_(False)
    return model


def lora():
    net = mlp()
    net[0] = LoRA(net[0])
    net[2].requires_grad_(False)
    return Model(net)


def custom(function, activation=None):
    return Model(mlp(Custom(function), *([] if activation is None else [activation])))


# -- the table -----------------------------------------------------------------------------------------------------

DIFFERENCES, EXACT, MATH = "finite difference", "exact", "exact, math attention"
#: At kinks, where activations can keep the slopes of the step.
HELD = "finite difference, slopes held"
#: Smooth, but on some steps so curved that a difference fails its check.
CURVED = (DIFFERENCES, EXACT)


@dataclass(frozen=True)
class Case:
    """What is trained, and what is expected.

    Attributes:
        make: the model.
        hessian: the path of its Hessian products; several where steps may differ.
        kernel: the path of its Gram matrix.
        blocks: whether residual blocks are found.
        left_out: part of the reason by quantity, of what this run can never measure.
        failed: likewise, of what says NaN.
        partly: likewise, of what says NaN at some of the steps.
        shape: of a sample.
        loader: further arguments of the data's loader.
        trainer: further arguments of the Trainer.
        monitor: further arguments of the StabilityMonitor.
    """

    make: Callable[[], Any]
    hessian: str | tuple[str, ...] = DIFFERENCES
    kernel: str = "structured"
    blocks: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    partly: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = (FEATURES,)
    loader: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)


#: What takes Hessian products.
CURVATURE = (
    "sharpness",
    "lyapunov",
    "lyapunov_trajectory",
    "batch_sharpness",
    "sgd_law",
    "spectral_density",
    "leave_one_out",
    "stability_profile",
    "secant_ratio",
    "proximal_step",
)


def refused(reason: str) -> dict[str, str]:
    """All that takes Hessian products."""
    return dict.fromkeys(CURVATURE, reason)


def unprobed(reason: str) -> dict[str, str]:
    """All that takes the outputs of probes."""
    return dict.fromkeys((*STOCHASTIC, "sgd_law"), reason)


image: dict[str, Any] = {"shape": (1, 8, 8), "blocks": True}
#: What takes outputs of the step's batch, and of the probes.
STOCHASTIC = ("mean_square_stability", "sgd_stability")
FULL = set(PRESETS["full"])
LAYER, ROWS = "layer and structured", "rows and structured"
#: In a step the statistics of its batch tie samples together, also those of a BatchNorm that is frozen but in training
#: mode: a backward pass for each row.
TIED = "rows"
#: Differences of losses in half precision.
ROUNDED = {"courant_step": "rounding hides it"}
UNCLEAR = {"critical_sharpness": "rounding hides where"}
CASES = {
    "mlp": Case(Model),
    "mlp_relu": Case(lambda: Model(mlp(nn.ReLU())), HELD),
    "cnn_batch_norm": Case(lambda: Model(cnn()), HELD, TIED),
    "residual_cnn": Case(lambda: Model(convolutional()), HELD, TIED, blocks=True),
    "transformer": Case(lambda: Model(Transformer()), blocks=True),
    "transformer_relu": Case(lambda: Model(Transformer(nn.ReLU())), HELD, blocks=True),
    "gpt2": Case(gpt2, CURVED, blocks=True),
    "bert": Case(bert, CURVED, ROWS, blocks=True),
    "t5": Case(t5, HELD, "layer and rows and structured", blocks=True),
    "vit": Case(vit, (DIFFERENCES, MATH), **image),
    "resnet": Case(resnet, HELD, TIED, **image),
    "lstm": Case(lambda: Model(Recurrent(nn.LSTM(4, 4, batch_first=True))), kernel=LAYER),
    "gru": Case(lambda: Model(Recurrent(nn.GRU(4, 4, batch_first=True)), MOMENTUM), kernel=LAYER),
    "tied": Case(tied),
    "frozen": Case(frozen, kernel=TIED),
    "partly_frozen": Case(partly_frozen, kernel=TIED),  # its ReLU lies before all that is trained
    # Its second factor is 0 at first: a large one saturates, and the loss tends to a limit below that at the start.
    "lora": Case(lora, kernel="layer", partly={"critical_sharpness": "does not rise along"}),
    "checkpoint": Case(lambda: Model(Checkpointed(False))),
    "checkpoint_relu": Case(lambda: Model(Checkpointed(False, nn.ReLU)), EXACT),
    "checkpoint_reentrant": Case(lambda: Model(Checkpointed(True))),
    "checkpoint_reentrant_relu": Case(lambda: Model(Checkpointed(True, nn.ReLU)), EXACT),
    "compiled": Case(lambda: compiled("aot_eager"), "finite difference, uncompiled"),
    # Its power iteration moves with the weights, outside of the graph: not each gradient is that of a loss.
    "spectral_norm": Case(
        lambda: parametrised(parametrizations.spectral_norm),
        CURVED,
        ROWS,
        left_out={name: why for name, why in refused("tensors without a graph").items() if name != "leave_one_out"},
    ),
    "weight_norm": Case(lambda: parametrised(parametrizations.weight_norm), kernel=ROWS),
    "sparse": Case(lambda: Model(Bag())),
    "dictionary": Case(Dictionary),
    "mixup": Case(lambda: Mixup(mlp()), left_out=unprobed("outputs and targets cannot be found")),
    "uneven_last_batch": Case(Model, loader={"n": 21, "drop_last": False}),
    "one_batch_epochs": Case(Model, loader={"n": 8}),
    "dropout": Case(lambda: Model(mlp(nn.Dropout(0.5)))),
    "float64": Case(lambda: Model(cnn(nn.Tanh)), kernel=TIED, trainer={"precision": "64-true"}),
    "bf16_mixed": Case(Model, "exact, bfloat16", failed=ROUNDED, partly=UNCLEAR, trainer={"precision": "bf16-mixed"}),
    "bf16_mixed_transformer": Case(
        lambda: Model(Transformer(), MOMENTUM), "exact, math attention, bfloat16", blocks=True,
        failed=ROUNDED | UNCLEAR, trainer={"precision": "bf16-mixed"},
    ),
    "bf16_true": Case(  # at a rate whose steps are not lost in the rounding of the weights
        lambda: Model(optimizer=partial(MOMENTUM, lr=0.5)), "exact, bfloat16", failed=ROUNDED, partly=UNCLEAR,
        trainer={"precision": "bf16-true"},
    ),
    "bf16_true_custom": Case(
        lambda: custom(Twice), failed=refused("half precision") | ROUNDED, partly=UNCLEAR,
        trainer={"precision": "bf16-true"},
    ),
    "twice_differentiable": Case(lambda: custom(Twice)),
    "twice_differentiable_relu": Case(lambda: custom(Twice, nn.ReLU()), EXACT),
    "once_differentiable": Case(
        lambda: custom(Once),
        failed=dict.fromkeys(("robustness", "clarke_profile"), "backward of Once"),
    ),
    "once_differentiable_relu": Case(
        lambda: custom(Once, nn.ReLU()),
        failed=refused("backward of Once") | dict.fromkeys(("robustness", "clarke_profile"), "Once in the network"),
    ),
    "detached_relu": Case(lambda: custom(Detached, nn.ReLU()), failed=refused("backward of Detached")),
    "fused_loss": Case(lambda: Fused(mlp()), left_out=unprobed("outputs and targets cannot be found")),
    "changed_gradient": Case(
        GradientHook,
        failed=dict.fromkeys((*STOCHASTIC, "courant_step"), "gradient is not that") | refused("gradient is not that"),
    ),
    "gan": Case(
        GAN, monitor={"loss_fn": lambda module, batch: module.discriminator_loss(batch)},
        left_out=dict.fromkeys((*STOCHASTIC, "courant_step", "critical_sharpness"), "several optimizers")
        | refused("several optimizers"),
        trainer={"max_steps": 8},
    ),
    "players": Case(
        GAN, monitor={"loss_fn": {
            "discriminator": lambda module, batch: module.discriminator_loss(batch, detach=False),
            "generator": lambda module, batch: module.generator_loss(batch),
        }},
        left_out=dict.fromkeys(
            FULL - {"spectral_norm", "residual_cfl", "sharpness", "lyapunov_trajectory"}, "several players"
        ),
        trainer={"max_steps": 8},
    ),
    "hopeless": Case(Closure, failed=dict.fromkeys(FULL - {"dissipation", "residual_cfl"}, "the original")),
}  # fmt: skip


# -- optimizers ------------------------------------------------------------------------------------------------------


#: What takes the formula of the update, and what takes its derivative alone. Sharpness goes on without the formula.
EDGE = ("sharpness", "mean_square_stability", "sgd_stability", "lyapunov", "sgd_law")
RULE = dict.fromkeys((*EDGE, "proximal_step"), "not supported")
STEP = ("lyapunov_trajectory", "leave_one_out", "stability_profile", "secant_ratio")
SIGNS = RULE | dict.fromkeys(STEP, "signs")
MANY = RULE | dict.fromkeys(STEP, "several times in a step")
HIDDEN = RULE | dict.fromkeys(STEP, "remembers more than float tensors")
optim = torch.optim


def words_alone():
    """Only the embedding is trained, whose gradient is sparse."""
    net = Bag()
    net.head.requires_grad_(False)
    return net


#: For optimizers that take matrices only, sparse gradients, or weights in 16 bits.
NETS = {
    "Masters in 32 bits": lambda: optimizer_zoo.HalfWeights(*mlp()),
    "Muon": optimizer_zoo.without_biases,
    "SparseAdam": words_alone,
}
#: How each is made, and what is left out with it, for a part of the reason.
OPTIMIZERS = {
    "SGD": (SGD, {}),
    "SGD, momentum": (MOMENTUM, {}),
    "SGD, Nesterov": (partial(MOMENTUM, nesterov=True, weight_decay=1e-2), {}),
    "SGD, fused": (partial(MOMENTUM, fused=True), {}),
    "Adam": (partial(optim.Adam, lr=1e-2), {}),
    "AdamW": (partial(optim.AdamW, lr=1e-2), {}),
    "AdamW, amsgrad": (partial(optim.AdamW, lr=1e-2, amsgrad=True), {}),
    "AdamW, foreach": (partial(optim.AdamW, lr=1e-2, foreach=True), {}),
    "AdamW, fused": (partial(optim.AdamW, lr=1e-2, fused=True), {}),
    "AdamW, rate in a tensor": (lambda p: optim.AdamW(p, lr=torch.tensor(1e-2)), {}),
    "RMSprop": (partial(optim.RMSprop, lr=1e-2, momentum=0.5), {}),
    "Adagrad": (partial(optim.Adagrad, lr=1e-2), {}),
    "NAdam": (partial(optim.NAdam, lr=1e-2), {}),
    "RAdam": (partial(optim.RAdam, lr=1e-2), {}),
    "Adamax": (partial(optim.Adamax, lr=1e-2), {}),
    "Muon": (partial(optim.Muon, lr=0.02), dict.fromkeys(EDGE, "as long for a small gradient")),
    "Lion": (partial(optimizer_zoo.Lion, lr=1e-3), SIGNS),
    "Adafactor": (partial(optim.Adafactor, lr=1e-2), RULE),
    "Adafactor of transformers": (transformers.Adafactor, RULE),
    "Schedule-free": (optimizer_zoo.ScheduleFree, RULE),
    "Adadelta": (optim.Adadelta, RULE),
    "ASGD": (partial(optim.ASGD, lr=0.1), RULE),
    "Rprop": (partial(optim.Rprop, lr=1e-2), SIGNS),
    "SparseAdam": (  # through a tanh that saturates: the loss of far words tends to a limit
        partial(optim.SparseAdam, lr=1e-2),
        RULE | dict.fromkeys(STEP, "does not support dense gradients") | {"critical_sharpness": "does not rise along"},
    ),
    "State in bfloat16": (optimizer_zoo.HalfState, RULE | dict.fromkeys(STEP, "rounds its state to bfloat16")),
    "State in 8 bits": (optimizer_zoo.EightBit, HIDDEN),
    "Lookahead": (lambda p: optimizer_zoo.Lookahead(optim.SGD(p, lr=0.1, momentum=0.9)), RULE),
    "Muon and AdamW as one": (
        optimizer_zoo.matrices_and_rest(partial(optim.Muon, lr=0.02), partial(optim.AdamW, lr=1e-2)),
        HIDDEN,
    ),
    "LBFGS": (partial(optim.LBFGS, lr=0.1, max_iter=4), MANY),
    "SAM": (optimizer_zoo.SAM, MANY),
    "Masters in 32 bits": (  # of weights in bfloat16
        optimizer_zoo.Masters,
        RULE
        | ROUNDED
        | UNCLEAR
        | {"secant_ratio": "rounding hides it"}
        | dict.fromkeys(("lyapunov_trajectory", "stability_profile"), "not smooth here"),
    ),
}
