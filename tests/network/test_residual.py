import math
import os

import pytest
import torch
from problems import NORM_I_PLUS_HALF_G, RESIDUAL, Regression, TanhBranch, close, f64, random, seeded
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import lsp_callbacks.functional.network.residual as residual
import lsp_callbacks.quantities.network.residual_cfl as residual_cfl
from lsp_callbacks import ResidualCFL, Snapshot, Unmeasurable
from lsp_callbacks.autograd.module_calls import is_residual_block
from lsp_callbacks.errors import NotApplicable
from lsp_callbacks.functional import residual_stability
from lsp_callbacks.functional.network.residual import followed_stability
from lsp_callbacks.linalg import from_matrix, unit
from lsp_callbacks.operators import residual_block
from lsp_callbacks.step.run_context import RunContext

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The numbers of one block -------------------------------------------------------------------------------------------


def dense(G: Tensor) -> dict[str, float | None]:
    """Every number by dense decompositions of one or several matrices."""
    values = torch.linalg.eigvalsh((G + G.mT) / 2)
    one = torch.eye(G.shape[-1], dtype=f64)
    m, M = -values[..., -1].max(), torch.linalg.matrix_norm(G, 2).max()
    found = {
        "stiffness": -values[..., 0].min() / 2,
        "gain": torch.linalg.matrix_norm(one + G, 2).max().log(),
        "m": m,
        "M": None,
        "h_max": None,
        "h_exact": None,
        "cfl": None,
    }
    if m > 0:
        exact = torch.linalg.eigvals(torch.linalg.solve(-G - G.mT, G.mT @ G)).real.amax(-1)
        found |= {"M": M, "h_max": 2 * m / M**2, "h_exact": 1 / exact.max(), "cfl": M**2 / (2 * m)}
    return found


@pytest.mark.parametrize("h", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", RESIDUAL)
def test_numbers_in_closed_form(name, h):
    case = RESIDUAL[name]
    found = residual_stability(from_matrix(h * case.G), h=h)
    close(found.m, case.m, 1e-12)
    assert found.dissipative is (case.m > 0)
    if case.m > 0:
        close(found.M, case.M, 1e-12)
        close(found.h_max, case.h_max, 1e-12)
        close(found.h_exact, case.h_exact, 1e-9)
        close(found.cfl, h / case.h_max, 1e-12)
    else:
        assert found.M is found.h_max is found.h_exact is found.cfl is None


# x + 2x; and x + W2 tanh(W1 x) / 2 at 0, where G = W2 W1 / 2 = [[p, q], [0, p]] has the norm of I + G in closed form.
CALM_STIFFNESS = {
    "x + 2x": (torch.tensor([[2.0]], dtype=f64), -1.0, 3.0),
    "a branch": (torch.tensor([[-0.08, 0.34], [0.0, -0.08]], dtype=f64), 0.125, 0.17 + (0.17**2 + 0.92**2) ** 0.5),
}


class HalfTanh(nn.Module):
    """``x + W2 tanh(W1 x) / 2``."""

    def __init__(self, G):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=f64))
        self.last = nn.Parameter(2 * G @ torch.linalg.inv(self.first.detach()))

    def forward(self, x):
        return x + 0.5 * (x @ self.first.T).tanh() @ self.last.T


class Triple(nn.Module):
    def __init__(self, G):
        super().__init__()
        self.weight = nn.Parameter(G.clone())

    def forward(self, x):
        return x + x @ self.weight.T


@pytest.mark.parametrize("name, block", list(zip(CALM_STIFFNESS, (Triple, HalfTanh))), ids=CALM_STIFFNESS)
def test_a_stiffness_below_1_does_not_hide_a_block_that_expands(name, block):
    """The gain says so, first of the keys."""
    G, stiffness, norm = CALM_STIFFNESS[name]
    close(torch.linalg.matrix_norm(torch.eye(len(G), dtype=f64) + G, 2), norm, 1e-12)
    metric = ResidualCFL(blocks=block)
    x = torch.zeros(3, len(G), dtype=f64)
    metric.update(step(Regression(nn.Sequential(block(G)), x, x), metric))
    values = metric.compute()
    assert next(iter(values)) == metric.keys[0] == "stability/residual_gain_max"
    close(values["stability/residual_gain_max"], math.log(norm), 1e-9)
    close(values["stability/residual_gain_bound_max"], math.log(norm), 1e-9)
    close(values["stability/residual_gain/net.0"], math.log(norm), 1e-9)
    close(values["stability/residual_stiffness_max"], stiffness, 1e-9)
    assert values["stability/residual_dissipative"] == 0 and "stability/residual_cfl_max" not in values


def test_the_gain_lies_between_its_ends():
    """Of large blocks after few products, too."""
    for seed in range(10):
        G = 0.1 * random(2, 60, 60, seed=seed)
        found = residual_stability(from_matrix(G), steps=4)
        truth = torch.linalg.matrix_norm(torch.eye(60, dtype=f64) + G, 2).max().log()
        assert found.gain <= truth + 1e-12 and truth <= found.gain_bound < truth + 0.7


def test_gain_of_half_a_step():
    found = residual_stability(from_matrix(0.5 * RESIDUAL["not_dissipative"].G))
    close(found.gain, math.log(NORM_I_PLUS_HALF_G), 1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.5, 4.0], ids=["indefinite", "nearly", "dissipative"])
def test_numbers_agree_with_dense_decompositions(shift):
    """The extremes over a batch of 20 matrices of dimension 12."""
    G = 0.4 * random(20, 12, 12) - shift * torch.eye(12, dtype=f64)
    found = residual_stability(from_matrix(G), steps=12, tol=1e-10)
    for name, value in dense(G).items():
        assert (getattr(found, name) is None) == (value is None)
        if value is not None:
            close(getattr(found, name), value, 1e-7)
    assert found.residual < 1e-6


def test_with_the_defaults_the_error_is_below_its_tolerance():
    G = 0.1 * random(3, 80, 80) - 2 * torch.eye(80, dtype=f64)
    found = residual_stability(from_matrix(G))
    for name, value in dense(G).items():
        close(getattr(found, name), value, 0.02 * (1 + abs(value)))
    assert found.residual < 0.2


@pytest.mark.parametrize("seed", range(20))
def test_what_the_numbers_promise(seed):
    """h_max is sufficient, h_exact is exact, a stiffness above 1 expands, and so does each h where m is below 0."""
    G = random(5, 5, seed=seed) - 2 * torch.eye(5, dtype=f64)
    found = residual_stability(from_matrix(G), steps=5, tol=1e-10)
    one = torch.eye(5, dtype=f64)
    if found.stiffness > 1 or found.m < 0:
        assert found.gain > 0
    if found.cfl is not None and found.cfl < 1:
        assert found.gain < 0
    if found.dissipative:
        assert found.h_max <= found.h_exact * (1 + 1e-9)
        for h, contracts in ((found.h_max, True), (0.999 * found.h_exact, True), (1.001 * found.h_exact, False)):
            assert bool(torch.linalg.matrix_norm(one + h * G, 2) <= 1 + 1e-9) is contracts


@pytest.mark.parametrize(
    "G, stiffness, gain, m",
    [
        (torch.zeros(3, 3), 0.0, 0.0, 0.0),  # the identity
        (-torch.eye(3), 0.5, -math.inf, 1.0),  # everything is forgotten
        (torch.tensor([[-3.0]]), 1.5, math.log(2), 3.0),
        (torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), math.nan, math.nan, math.nan),
    ],
)
def test_degenerate_blocks(G, stiffness, gain, m):
    found = residual_stability(from_matrix(G.to(f64)))
    for value, expected in ((found.stiffness, stiffness), (found.gain, gain), (found.m, m)):
        assert float(value) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert found.dissipative is (m > 0)


def test_the_tanh_branch_as_a_module():
    case = TanhBranch.answers
    for h in (1.0, 0.25):
        metric = ResidualCFL(blocks=TanhBranch, h=h)
        problem = Regression(nn.Sequential(TanhBranch(h)), TanhBranch.point, torch.zeros(1, 2, dtype=f64))
        metric.update(step(problem, metric))
        values = {k.rpartition("/")[0]: v for k, v in metric.compute().items() if k.endswith("/net.0")}
        for number in ("m", "M", "h_max", "h_exact"):
            close(values[f"stability/residual_{number}"], getattr(case, number), 1e-8)
        close(values["stability/residual_cfl"], h / case.h_max, 1e-8)
        close(values["stability/residual_stiffness"], h * dense(case.G)["stiffness"], 1e-8)
        assert metric.compute()["stability/residual_dissipative"] == 1.0


# Blocks of real networks --------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """torchvision's."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's."""

    def __init__(self, width, inner):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(self.body(x) + x)


class InvertedResidual(nn.Module):
    """MobileNet's: a skip only where the shape is kept."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, 2 * inputs, 1, bias=False), nn.BatchNorm2d(2 * inputs), nn.ReLU6(),
            nn.Conv2d(2 * inputs, 2 * inputs, 3, stride, 1, groups=2 * inputs), nn.BatchNorm2d(2 * inputs), nn.ReLU6(),
            nn.Conv2d(2 * inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """timm's vision transformer block, or (``skip=False``) a plain stack of layers that keeps the shape too."""

    def __init__(self, width, skip=True):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.ls1, self.drop_path = LayerScale(width), nn.Dropout(0.1)
        self.norm2, self.ls2 = nn.LayerNorm(width), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.skip = float(skip)

    def forward(self, x):
        y = self.norm1(x)
        y = self.drop_path(self.ls1(self.attn(y, y, y)[0]))
        x = x + y if self.skip else y
        y = self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x + y if self.skip else y


class NormActivationBlock(nn.Module):
    """Nothing but what may follow the sum in a real block: no addition, no skip."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return torch.relu(self.norm(x))


class ResidualGroup(nn.Module):
    """A skip over blocks that have their own."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return x + self.blocks(x)


class Encoder(nn.Module):
    """PyTorch's own layer, with a causal mask if wanted: as long as the batch is large, to tempt a confusion."""

    def __init__(self, masked=False, **settings):
        super().__init__()
        self.layer, self.masked = nn.TransformerEncoderLayer(4, 2, 6, **settings), masked

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype) if self.masked else None
        padding = torch.zeros(3, 3, dtype=x.dtype) if self.masked else None
        return self.layer(x, src_mask=mask, src_key_padding_mask=padding)


class Decoder(nn.Module):
    """PyTorch's own, reading from a longer memory."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 6)

    def forward(self, x):
        return self.layer(x, random(5, 3, 4, seed=3))


def transformers_model(name: str, **config) -> nn.Module:
    import transformers

    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


BERT_LIKE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
T5 = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2}
GPT2 = {"vocab_size": 9, "n_positions": 4, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2]}
TOKENS, PADDING = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])
SEQUENCES, IMAGES = random(3, 3, 4), random(3, 4, 6, 6)


def text(model):
    return model(input_ids=TOKENS, attention_mask=PADDING).last_hidden_state


def text_to_text(model):
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS).last_hidden_state


def photographs(model):
    return model(pixel_values=random(3, 3, 16, 16)).last_hidden_state


def on(inputs):
    return lambda model: model(inputs)


RESNET_BLOCKS = ["encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.1.layers.1"]
#: model, what is run, and the blocks that are to be found, by name.
NETWORKS = {
    **{
        f"encoder_{norm_first=}_{batch_first=}_{masked=}": (
            lambda a=norm_first, b=batch_first, m=masked: Encoder(m, norm_first=a, batch_first=b),
            on(SEQUENCES),
            ["layer"],
        )
        for norm_first in (False, True)
        for batch_first in (False, True)
        for masked in (False, True)
    },
    "decoder_batch_first=False": (Decoder, on(SEQUENCES), ["layer"]),
    "torchvision_basic": (
        lambda: nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 6, 2), BasicBlock(6, 6)),
        on(IMAGES),
        ["0", "2"],
    ),
    "torchvision_bottleneck": (lambda: nn.Sequential(Bottleneck(4, 2), Bottleneck(4, 2)), on(IMAGES), ["0", "1"]),
    "mobilenet": (
        lambda: nn.Sequential(InvertedResidual(4, 4, 1), InvertedResidual(4, 4, 2), InvertedResidual(4, 6, 1)),
        on(IMAGES),
        ["0"],
    ),
    "timm_block": (lambda: nn.Sequential(Block(4), Block(4)), on(SEQUENCES), ["0", "1"]),
    "no_skip": (
        lambda: nn.Sequential(Block(4, skip=False), Block(4), NormActivationBlock(4)),
        on(SEQUENCES),
        ["1"],
    ),
    "nested": (
        lambda: nn.Sequential(ResidualGroup(Block(4), Block(4)), ResidualGroup(Block(4, skip=False))),
        on(SEQUENCES),
        ["0.blocks.0", "0.blocks.1", "1"],
    ),
    "bert": (
        lambda: transformers_model("Bert", vocab_size=9, max_position_embeddings=4, **BERT_LIKE),
        text,
        ["encoder.layer.0", "encoder.layer.1"],
    ),
    "gpt2": (lambda: transformers_model("GPT2", **GPT2), text, ["h.0", "h.1"]),
    "vit": (
        lambda: transformers_model("ViT", image_size=16, patch_size=8, **BERT_LIKE),
        photographs,
        ["layers.0", "layers.1"],
    ),
    "t5": (lambda: transformers_model("T5", **T5), text_to_text, ["encoder.block.0", "decoder.block.0"]),
    "resnet_basic": (lambda: transformers_model("ResNet", layer_type="basic", **RESNET), photographs, RESNET_BLOCKS),
    "resnet_bottleneck": (
        lambda: transformers_model("ResNet", layer_type="bottleneck", **RESNET),
        photographs,
        RESNET_BLOCKS,
    ),
}


def step(module, metric, run=None):
    """A step whose loss is the mean square of what is run."""
    replay = module if run is None else lambda: run(module).square().mean()
    return Snapshot(step=0, module=module, replay=replay, run=RunContext(captures_inputs=metric.captures_inputs))


def per_sample(block: nn.Module, call, axis: int) -> Tensor:
    """Brute force: the Jacobian of the block in eval mode on the whole batch, less the identity."""
    drop = lambda value: None if hasattr(value, "get_seq_length") else value  # noqa: E731 (a key/value cache)
    x, *rest = map(drop, call.args)
    kwargs = {name: drop(value) for name, value in call.kwargs.items()}

    def forward(x):
        out = block(x, *rest, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    block.eval()
    J = jacobian(forward, x).movedim(axis, 0).movedim(x.ndim + axis, 1)
    size, J = len(J), J.reshape(*J.shape[:2], -1, x.numel() // len(J))
    across = J[~torch.eye(size, dtype=torch.bool)]
    close(across, torch.zeros_like(across), 1e-12)  # samples do not mix
    return J[range(size), range(size)] - torch.eye(J.shape[-1], dtype=f64)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_found_and_measured(name):
    make, run, expected = NETWORKS[name]
    model = seeded(make()).train()
    metric = ResidualCFL(samples=2)
    snapshot = step(model, metric, run)
    metric.update(snapshot)
    found = {k.rpartition("/")[2]: v for k, v in metric.compute().items() if k.startswith("stability/residual_gain/")}
    assert list(found) == expected
    assert all(m.training for m in model.modules())

    axis, tol = int("batch_first=False" in name), 1e-5 if name == "t5" else 1e-10  # its norm computes in float32
    gains = {}
    for block_name in expected:
        module, call = model.get_submodule(block_name), snapshot.calls[block_name]
        G = per_sample(module, call, axis)
        block = residual_block(module, call, samples=3)
        assert block.skip and block.samples == 3
        close(block.jacobian.dense(), G, tol)
        close(block.jacobian.T.dense(), G.mT, tol)
        gains[block_name] = dense(G if "masked=True" in name else G[:2])["gain"]
    for block_name, gain in gains.items():
        close(found[block_name], gain, 0.02)


# What is, and what is not, a block ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, candidate",
    [
        *(
            (name, True)
            for name in ("BasicBlock", "Bottleneck", "PreActBottleneckV2", "ResidualStack", "InvertedBlock")
        ),
        *((name, True) for name in ("LlamaDecoderLayer", "Block", "GPTNeoXLayer", "TransformerEncoderLayer")),
        *((name, False) for name in ("LayerNorm", "Conv2d", "Sequential", "BlockList", "Layerwise", "MyResnet")),
    ],
)
def test_candidates_by_name(name, candidate):
    assert is_residual_block(type(name, (nn.Module,), {})()) is candidate


class InPlaceBlock(nn.Module):
    """It overwrites its own input, as ``ReLU(inplace=True)`` at the head of a pre-activation block does."""

    def __init__(self):
        super().__init__()
        self.activation, self.linear = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.activation(x)) + x


def test_a_block_may_work_in_place_on_its_input():
    model = nn.Sequential(nn.Linear(4, 4), InPlaceBlock()).double()
    metric = ResidualCFL(samples=8)
    x = random(8, 4)
    metric.update(step(model, metric, on(x)))
    slope = (model[0](x) > 0).to(f64).detach()
    G = (model[1].linear.weight.detach() + torch.eye(4)) * slope[:, None] - torch.eye(4)
    close(metric.compute()["stability/residual_gain/1"], dense(G)["gain"], 1e-2)


class FrozenBlock(nn.Identity):
    @torch.no_grad()
    def forward(self, x):
        return x + x.tanh()


class TokenBlock(nn.Identity):
    pass


NOT_BLOCKS = {
    "changes the shape": (BasicBlock(4, 6, 2).double(), IMAGES, "keeps the shape"),
    "cannot be differentiated": (FrozenBlock(), SEQUENCES, "cannot be differentiated"),
    "has no floating-point input": (TokenBlock(), TOKENS, "no floating-point tensor"),
}


@pytest.mark.parametrize("module, x, reason", NOT_BLOCKS.values(), ids=NOT_BLOCKS)
def test_what_is_no_block_is_passed_over_unless_the_user_named_it(module, x, reason):
    model = nn.Sequential(module)
    metric = ResidualCFL()
    snapshot = Snapshot(
        step=0,
        module=model,
        replay=lambda: model(x).double().mean(),
        run=RunContext(captures_inputs=metric.captures_inputs),
    )
    with pytest.raises(NotApplicable, match="no residual block"):
        metric.update(snapshot)
    assert not metric.complete and metric.compute() == {}
    with pytest.raises(Unmeasurable, match=f"block '0'.*{reason}"):
        ResidualCFL(blocks="0").update(snapshot)


def test_blocks_can_be_named_whatever_they_are():
    """The plain stack has no skip: named, its Jacobian less the identity is measured all the same."""
    model = nn.Sequential(seeded(Block(4)), seeded(Block(4, skip=False)))
    for blocks in ("1", ["1"], lambda name, module: name == "1"):
        metric = ResidualCFL(blocks=blocks)
        metric.update(step(model, metric, on(SEQUENCES)))
        assert [k for k in metric.compute() if "stiffness/" in k] == ["stability/residual_stiffness/1"]


def test_numbers_over_all_blocks():
    """One block contracts, one does not: the share is a half, and only one has a CFL number."""
    case = TanhBranch.answers
    model = nn.Sequential(TanhBranch(1.0), TanhBranch(-1.0))
    metric = ResidualCFL(blocks=TanhBranch)
    metric.update(step(model, metric, on(TanhBranch.point)))
    values = metric.compute()
    assert values["stability/residual_dissipative"] == 0.5
    for number in ("gain", "stiffness", "cfl"):
        by_block = {k: v for k, v in values.items() if k.startswith(f"stability/residual_{number}/")}
        assert len(by_block) == (1 if number == "cfl" else 2)
        close(values[f"stability/residual_{number}_max"], max(by_block.values()), 0)
    close(values["stability/residual_cfl_max"], 1 / case.h_max, 1e-8)
    assert values["stability/residual_lanczos_error"] < 1e-2


@pytest.mark.parametrize(
    "settings, argument", [({"samples": 0}, "samples=0"), ({"h": 0.0}, "h=0.0"), ({"h": -1}, "h=-1")]
)
def test_settings_that_make_no_sense_are_refused(settings, argument):
    with pytest.raises(ValueError, match=argument):
        ResidualCFL(**settings)


# From one measurement to the next ------------------------------------------------------------------------------------


def in_two(G: Tensor):
    """Each matrix twice, as a block that runs its samples twice has them."""
    return from_matrix(torch.stack([G, G]))


def test_both_runs_side_by_side_are_those_one_by_one():
    G = 0.4 * random(3, 12, 12)
    one, _ = followed_stability(in_two(G), steps=12, tol=1e-10)
    other = residual_stability(from_matrix(G), steps=12, tol=1e-10)
    for name, value in vars(one).items():
        assert value is None or float(value) == pytest.approx(float(getattr(other, name)), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_from_earlier_vectors_fewer_products_are_as_good(seed):
    """On large blocks that move a little: the values of six products against dense ones, and a bound that holds."""
    G, vectors = 0.1 * random(2, 60, 60, seed=seed), None
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for k in range(4):
        moved = G + 2e-3 * k * random(2, 60, 60, seed=seed + 50)
        found, vectors = followed_stability(in_two(moved), vectors, steps=6 if k else 10, generator=generator)
        truth = dense(moved)
        assert found.gain <= truth["gain"] + 1e-12 and truth["gain"] <= found.gain_bound < truth["gain"] + 0.7
        assert found.stiffness <= truth["stiffness"] + 1e-12 and found.m >= truth["m"] - 1e-12
        errors.append([float(abs(getattr(found, name) - truth[name])) for name in ("gain", "stiffness", "m")])
    assert all(late <= 2 * first + 0.01 for late, first in zip(errors[-1], errors[0]))


@pytest.mark.parametrize("seed", range(8))
def test_what_earlier_vectors_have_missed_is_within_the_bound(seed):
    """They span what is invariant, and the largest gain is elsewhere: only the noise in the start can see it."""
    G = torch.diag_embed(torch.tensor([0.9, 0.5, *[0.1] * 48], dtype=f64)).expand(2, 50, 50)
    missed = torch.eye(50, dtype=f64)[1].expand(3, 2, 50)
    found, _ = followed_stability(in_two(G), missed, steps=2, generator=torch.Generator().manual_seed(seed))
    assert found.gain <= math.log(1.9) + 1e-12 and math.log(1.9) <= found.gain_bound


def test_the_bound_counts_the_noise_that_is_in_the_start(monkeypatch):
    starts, shares = [], []
    lanczos, bound = residual.lanczos, residual.bound_beyond
    monkeypatch.setattr(
        residual, "lanczos", lambda K, start, **how: (starts.append(start), lanczos(K, start, **how))[1]
    )
    monkeypatch.setattr(residual, "bound_beyond", lambda *args: (shares.append(args[-1]), bound(*args))[1])
    G, generator = 0.1 * random(1, 20, 20), torch.Generator().manual_seed(3)
    _, vectors = followed_stability(in_two(G), generator=generator)
    noise = unit(torch.randn(2, 1, 20, generator=torch.Generator().set_state(generator.get_state()), dtype=f64))[1]
    followed_stability(in_two(G), vectors, generator=generator)
    assert shares[0] == 1.0 and 0.5 < shares[1] < 0.9
    close(starts[1][1] - shares[1] * noise, shares[1] * vectors[2], 1e-12)


def test_a_measurement_goes_on_from_the_vectors_of_the_last_one(monkeypatch):
    given = []
    follow = residual_cfl.followed_stability
    monkeypatch.setattr(
        residual_cfl, "followed_stability", lambda K, start, **how: (given.append(start), follow(K, start, **how))[1]
    )
    make, run, _ = next(iter(NETWORKS.values()))
    model, metric = seeded(make()).train(), ResidualCFL()
    snapshot = step(model, metric, run)
    metric.update(snapshot)
    first, kept = len(given), metric.vectors()["starts"]
    metric.update(snapshot)
    assert given[:first] == [None] * first and len(given) == 2 * first
    assert all(any(start is vector for vector in kept.values()) for start in given[first:])


def test_a_block_that_runs_its_samples_twice_has_the_same_matrices():
    make, run, expected = next(iter(NETWORKS.values()))
    model, metric = seeded(make()).train(), ResidualCFL(samples=2)
    snapshot = step(model, metric, run)
    for name in expected:
        module, call = model.get_submodule(name), snapshot.calls[name]
        once, twice = (residual_block(module, call, samples=2, twice=both) for both in (False, True))
        assert twice.jacobian.batch == (2, 2)
        for copy in twice.jacobian.dense():
            close(copy, once.jacobian.dense(), 1e-10)


def test_the_second_measurement_costs_less_and_says_so():
    make, run, _ = next(iter(NETWORKS.values()))
    model, metric = seeded(make()).train(), ResidualCFL()
    snapshot = step(model, metric, run)
    cold = sum(metric.cost(snapshot).values())
    metric.update(snapshot)
    assert sum(metric.cost(snapshot).values()) < cold
    metric.load_vectors(metric.vectors())
    assert sum(metric.cost(snapshot).values()) < cold
    assert metric.limit_cost(snapshot, 1e9) is None and metric.limit_cost(snapshot, 0.0) == "1 of 4 samples"
    metric.update(snapshot)
    assert metric.complete
    metric.reset()
    assert metric.vectors() == {}
