"""The Gram matrix against per-sample Jacobians, formed in full."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from output_row import output_row
from problems import Regression, close, dense_hessian, f64, freeze, interpolating_tanh, random, seeded, tanh_mlp
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import lsp_callbacks.operators.sgd.sharpest_mode as sharpest_mode_module
from lsp_callbacks import ProbeSet
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.curvature.top_eigenvalue import top_eigenvalue
from lsp_callbacks.operators.sgd import weighted_gram
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.sgd.layer_rules import Outer, layer_uses, transposed
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part
from lsp_callbacks.operators.sgd.per_sample_gradients import RowSeed
from lsp_callbacks.operators.sgd.rows_by_backward import rows_alone
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.module_modes import evaluating

N = 5
EXACT = 1e-10


def half_squares(f, y):
    return 0.5 * (f - y).square().flatten(1).sum(1).mean()


def logits(out):
    return out.logits if hasattr(out, "logits") else out


def probes_of(module, x, loss, sizes=None):
    """``loss(outputs, rows)``; parts of the given sizes."""
    ends = torch.tensor(sizes or [len(x)]).cumsum(0).tolist()

    def part(lo, hi):
        def evaluate():
            with evaluating(module):
                outputs = logits(module(x[lo:hi]))
            return evaluation(outputs, lambda f: loss(f, slice(lo, hi)), samples=hi - lo)

        return evaluate

    parts = tuple(part(lo, hi) for lo, hi in zip([0, *ends], ends))
    return ProbeSet(module=module, parts=parts, samples=len(x), batch_size=2)


def squares(module, x):
    """Half the squares against random targets: every S is the identity."""
    with torch.no_grad(), evaluating(module):
        y = logits(module(x)).detach()
    y = y + random(*y.shape, seed=7)
    return lambda f, rows: half_squares(f, y[rows])


def jacobians(module, x, how="vmap"):
    """``(N, outputs, P)`` in eval mode, by ``torch.func``, or by one backward pass for each number."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def outputs(values, one):
        return logits(functional_call(module, values, (one[None],))).reshape(-1)

    with evaluating(module), sdpa_kernel(SDPBackend.MATH):
        if how == "vmap":
            found = vmap(jacrev(outputs), in_dims=(None, 0))({k: p.detach() for k, p in parameters.items()}, x)
            return torch.cat([found[name].flatten(2) for name in parameters], dim=2)
        samples = []
        for one in x:
            values = outputs(parameters, one)
            rows = [
                torch.autograd.grad(v, list(parameters.values()), retain_graph=True, materialize_grads=True)
                for v in values
            ]
            samples.append(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]))
        return torch.stack(samples)


def dense(J, S=None, D=1.0):
    """K from the symmetric roots of S: the same as any other root, up to a rotation of each sample's rows."""
    if S is None:
        Z = J
    else:
        values, vectors = torch.linalg.eigh(S)
        Z = (vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT) @ J
    Z = (Z * torch.as_tensor(D, dtype=f64) ** 0.5).flatten(0, 1)
    return Z @ Z.T


def blocks(K, n):
    """``||K_ij||_F``: what a rotation of each sample's rows leaves alone."""
    return K.view(n, len(K) // n, n, -1).square().sum((1, 3)).sqrt()


def agree(kernel, K, n, tol=EXACT):
    """Equal, up to a rotation of each sample's rows."""
    scale = float(K.abs().max())
    assert kernel.gram.dtype == f64 and torch.equal(kernel.gram, kernel.gram.T)
    own, true = blocks(kernel.gram, n), blocks(K, n)
    close(own / scale, true / scale, tol)
    top = torch.linalg.eigvalsh(kernel.gram)[-n:], torch.linalg.eigvalsh(K)[-n:]
    close(top[0] / scale, top[1] / scale, tol)
    assert float(kernel.gram.trace()) == pytest.approx(float(K.trace()), rel=tol)
    assert sum(kernel.traces.values()) == pytest.approx(float(K.trace()), rel=tol)


# -- networks ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One table is embedding and head; one Linear acts twice."""

    def __init__(self):
        super().__init__()
        self.table, self.twice, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.twice(self.twice(self.table(x)).tanh()))


class Bare(nn.Module):
    """Parameters of the root, beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)

    def forward(self, x):
        return (self.scale * self.inner(x)).tanh()


class Outside(nn.Module):
    """The weight acts in its layer, and once more where no hook can see it."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.linear(self.inner(x).tanh(), self.inner.weight))


class OnlyOutside(nn.Module):
    """The layer is never called: the weight belongs to it, its use to the parent."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.inner.weight).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.recurrent, self.head = kind(3, 4, **settings), nn.Linear(4, 2)

    def forward(self, x):
        first = getattr(self.recurrent, "batch_first", True)
        out = self.recurrent(x if first else x.transpose(0, 1))[0]
        return self.head(out[:, -1] if first else out[-1])


class Keywords(nn.Module):
    """A layer that is called by keyword, and returns a dict."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, *, x, power):
            return {"out": (x @ self.weight) ** power, "beside": x}

    def __init__(self):
        super().__init__()
        self.inner, self.head = self.Inner(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x=x, power=2)["out"])


class Residual(nn.Module):
    """In-place activations behind a norm and a sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return F.relu_(out)


class Transposed(nn.Module):
    """The samples come second."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, padding_mode="circular"), nn.ReLU(inplace=True),
        Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def conv(**settings):
    return nn.Sequential(nn.Conv2d(2, 4, 3, **settings), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(2))


def normed(norm):
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3))


def wrapped(wrap):
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def encoder(**settings):
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True, **settings)


def frozen():
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


VECTOR, IMAGE, SERIES = random(N, 4, seed=1), random(N, 2, 7, 6, seed=2), random(N, 3, 3, seed=3)
TOKENS = torch.randint(7, (N, 3), generator=torch.Generator().manual_seed(4))
STRUCTURED = {"structured"}

#: Network, inputs, the paths of its parameters, how the Jacobians are formed.
NETWORKS = {
    "mlp": (mlp, VECTOR, STRUCTURED, "vmap"),
    "cnn": (cnn, IMAGE, STRUCTURED, "vmap"),
    **{
        f"conv_{i}": (lambda settings=settings: conv(**settings), IMAGE, STRUCTURED, "vmap")
        for i, settings in enumerate(
            [
                {"stride": (2, 1), "padding": (1, 2)}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"},
                {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
                {"padding": 1, "padding_mode": "replicate"},
                {"dilation": 2, "padding": "valid"}, {"groups": 2, "padding": 1, "bias": False}, {"stride": 3},
                {"padding": "same", "dilation": (2, 1), "padding_mode": "circular"},
            ]
        )
    },
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(4, 2)), SERIES, STRUCTURED, "vmap"
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 2, (2, 3, 3), groups=1), nn.Flatten(), nn.Tanh()),
        IMAGE, STRUCTURED, "vmap",
    ),
    "conv_transpose": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nn.AvgPool2d(6), nn.Flatten()),
        IMAGE, {"layer"}, "vmap",
    ),
    "layer_norm": (lambda: normed(nn.LayerNorm(6)), VECTOR, STRUCTURED, "vmap"),
    "layer_norm_2d": (
        lambda: nn.Sequential(nn.LayerNorm((3, 3)), nn.Flatten(), nn.Linear(9, 2)), SERIES, STRUCTURED, "vmap"
    ),
    "group_norm": (lambda: normed(nn.GroupNorm(2, 6)), VECTOR, STRUCTURED, "vmap"),
    "rms_norm": (lambda: normed(nn.RMSNorm(6)), VECTOR, STRUCTURED, "vmap"),
    "batch_norm_1d": (lambda: normed(nn.BatchNorm1d(6)), VECTOR, STRUCTURED, "vmap"),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), SERIES, STRUCTURED, "vmap"),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=int(TOKENS[0, 0])), nn.Tanh(), nn.Linear(4, 2)),
        TOKENS, STRUCTURED, "vmap",
    ),
    "tied": (Tied, TOKENS, STRUCTURED, "vmap"),
    "frozen": (frozen, VECTOR, STRUCTURED, "vmap"),
    "encoder": (encoder, random(N, 3, 4, seed=5), None, "loop"),
    "encoder_norm_first": (lambda: encoder(norm_first=True), random(N, 3, 4, seed=5), None, "loop"),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), SERIES, {"structured", "layer"}, "loop"),
    "lstm_time_first": (lambda: Recurrent(nn.LSTM), random(N, 4, 3, seed=3), {"structured", "layer"}, "loop"),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True, num_layers=2), SERIES, {"structured", "layer"}, "loop"),
    "bare": (Bare, VECTOR, STRUCTURED, "vmap"),
    "outside": (Outside, VECTOR, {"structured", "rows"}, "vmap"),
    "only_outside": (OnlyOutside, VECTOR, {"structured", "rows"}, "vmap"),
    "keywords": (Keywords, VECTOR, {"structured", "layer"}, "vmap"),
    "samples_second": (Transposed, random(N, 2, 4, seed=5), None, "vmap"),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), VECTOR, {"structured", "layer"}, "loop"),
    "spectral_norm": (lambda: wrapped(parametrizations.spectral_norm), VECTOR, None, "loop"),
    "weight_norm": (lambda: wrapped(parametrizations.weight_norm), VECTOR, None, "loop"),
    "weight_norm_hook": (lambda: wrapped(nn.utils.weight_norm), VECTOR, None, "loop"),
    "gpt2": (gpt2, TOKENS, {"structured"}, "loop"),
}  # fmt: skip


def network(name):
    make, x, paths, how = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
        with torch.no_grad():
            module.double()(x)  # lazy layers
    return seeded(module), x, paths, how


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_the_dense_jacobian(name):
    module, x, paths, how = network(name)
    module.train()
    found = tangent_kernel(probes_of(module, x, squares(module, x)), outputs="all")
    J = jacobians(module, x, how)
    assert found.rows == J.shape[1] and found.defect < 1e-9
    agree(found, dense(J), N)
    if paths is not None:
        assert set(found.path.values()) == paths
    assert all(m.training for m in module.modules()) and all(p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "lstm_time_first", "outside", "weight_norm", "encoder"])
def test_parts_of_different_sizes_tiny_memory_and_a_preconditioner(name):
    module, x, _, how = network(name)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    D = {n: 0.3 + random(*p.shape, seed=i).abs() for i, (n, p) in enumerate(parameters.items())}
    D[next(iter(D))] = 0.0
    J = jacobians(module, x, how)
    flat = torch.cat(
        [torch.as_tensor(d, dtype=f64).expand_as(p).reshape(-1) for d, p in zip(D.values(), parameters.values())]
    )
    for sizes, memory in (([2, 3], 2**26), ([1, 4], 1), ([5], 1), ([5], 500)):
        found = tangent_kernel(probes_of(module, x, squares(module, x), sizes), outputs="all", scale=D, memory=memory)
        agree(found, dense(J, D=flat), N)
    scalars = {n: 0.5 + i for i, n in enumerate(parameters)}
    flat = torch.cat([torch.full((p.numel(),), scalars[n], dtype=f64) for n, p in parameters.items()])
    agree(tangent_kernel(probes_of(module, x, squares(module, x)), outputs="all", scale=scalars), dense(J, D=flat), N)


class Conv1D(nn.Module):
    nf = 4  # as in transformers: y = x W


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), Conv1D()])
@pytest.mark.parametrize("block", [1, 2**19])
def test_a_preconditioned_linear_layer_needs_no_gradient_of_a_sample(layer, block, monkeypatch):
    monkeypatch.setattr(weighted_gram, "BLOCK", block)
    x, g, root = random(N, 4, seed=1), random(N, 3, 4, seed=2), random(4, 4, seed=3).abs()
    use = layer_uses(layer, x, g)["weight"]
    rows = (use.gradients(0, N) * root.reshape(-1)).flatten(0, 1)
    none = replace(use, gradients=lambda lo, hi: pytest.fail("a gradient was formed"))
    a, swapped = x.repeat_interleave(3, 0), transposed(layer)

    def part(lo, hi):
        outer = Outer(g[lo:hi].flatten(0, 1), a[3 * lo : 3 * hi], swapped)
        return Part(hi - lo, [replace(none, outer=outer)])

    close(ParameterGram([part(0, 2), part(2, N)]).gram(root**2, 2**26, 16), rows @ rows.T, EXACT)


def test_one_output_gives_the_matrix_itself():
    problem, _ = interpolating_tanh()
    found = tangent_kernel(probes_of(problem.net, problem.x, squares(problem.net, problem.x)))
    K = dense(jacobians(problem.net, problem.x))
    close(found.gram, K, EXACT)
    close(found.gram[0, 0], 7.050322263264985, 1e-12)  # ground truth, computed elsewhere
    close(found.gram[1, 3], 3.6352725239767283, 1e-12)
    assert found.rows == 1 and found.stated == "the only output"


def test_permuting_the_samples_permutes_the_matrix():
    module, x, *_ = network("cnn")
    y, order = random(N, 3, seed=6), torch.tensor([3, 0, 4, 1, 2])
    one = tangent_kernel(probes_of(module, x, lambda f, rows: half_squares(f, y[rows])), outputs="all")
    two = tangent_kernel(probes_of(module, x[order], lambda f, rows: half_squares(f, y[order][rows])), outputs="all")
    close(blocks(two.gram, N), blocks(one.gram, N)[order][:, order], EXACT)
    double = tangent_kernel(probes_of(module, torch.cat([x, x]), lambda f, rows: f.square().sum() / 20), outputs="all")
    assert torch.linalg.matrix_rank(double.gram) == torch.linalg.matrix_rank(double.gram[: 3 * N, : 3 * N])


@pytest.mark.parametrize("name", ["lstm", "tied", "cnn"])
def test_rows_alone_is_the_dense_row(name):
    module, x, _, how = network(name)
    parameter = next(p for p in module.parameters())
    with evaluating(module), sdpa_kernel(SDPBackend.MATH):
        outputs = module(x).reshape(N, -1)
        seeds = [RowSeed(w.expand_as(outputs).clone()) for w in torch.eye(outputs.shape[1], dtype=f64)]
        rows = rows_alone(outputs, [parameter], seeds)[0].gradients(0, N)
    close(rows, jacobians(module, x, how)[..., : parameter.numel()], EXACT)


class WithNorm(nn.Module):
    """A parameter of the root, beside a norm with statistics."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner, self.norm = nn.Parameter(torch.ones(3)), nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.scale * self.inner(x))


@pytest.mark.parametrize("make, x", [(encoder, random(N, 3, 4, seed=5)), (WithNorm, VECTOR)], ids=["encoder", "norm"])
def test_layers_that_are_run_again_are_in_eval_mode(make, x):
    with torch.random.fork_rng():
        module = seeded(make()).train()
        before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
        found = tangent_kernel(probes_of(module, x, squares(module, x)), outputs="all")
        assert "rows" not in found.path.values() and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# -- losses --------------------------------------------------------------------------------------------------------

CLASSES = 4
LABELS = torch.tensor([0, 3, 1, 1, 2])
HOT = random(N, CLASSES, seed=9).sigmoid()


def softmax_curvature(f):
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def identity(f):
    return torch.eye(CLASSES, dtype=f64).expand(len(f), -1, -1)


def bernoulli(f):
    return torch.diag_embed(f.sigmoid() * (1 - f.sigmoid()))


#: The loss of (outputs, rows), and S_i.
LOSSES = {
    "mse": (lambda f, r: F.mse_loss(f, HOT[r]), lambda f: 2 / CLASSES * identity(f)),
    "half_squares": (lambda f, r: half_squares(f, HOT[r]), identity),
    "cross_entropy": (lambda f, r: F.cross_entropy(f, LABELS[r]), softmax_curvature),
    "smoothed": (lambda f, r: F.cross_entropy(f, LABELS[r], label_smoothing=0.3), softmax_curvature),
    "soft_targets": (lambda f, r: F.cross_entropy(f, HOT[r].softmax(-1)), softmax_curvature),
    "nll": (lambda f, r: F.nll_loss(f.log_softmax(-1), LABELS[r]), softmax_curvature),
    "bce": (lambda f, r: F.binary_cross_entropy_with_logits(f, HOT[r]), lambda f: bernoulli(f) / CLASSES),
    "poisson": (
        lambda f, r: F.poisson_nll_loss(f, HOT[r]), lambda f: torch.diag_embed(f.exp()) / CLASSES,
    ),
    "mse_sum": (lambda f, r: F.mse_loss(f, HOT[r], reduction="sum"), lambda f: 2 * N * identity(f)),
    "cross_entropy_sum": (
        lambda f, r: F.cross_entropy(f, LABELS[r], reduction="sum"), lambda f: N * softmax_curvature(f),
    ),
}  # fmt: skip


def classifier(gain=1.0):
    net = seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)))
    net[2].weight.data.mul_(gain)
    net[2].bias.data.mul_(gain)
    return net


@pytest.mark.parametrize("name", LOSSES)
def test_the_curvature_of_the_loss_enters(name):
    net, (loss, curvature) = classifier(), LOSSES[name]
    found = tangent_kernel(probes_of(net, VECTOR, loss), outputs="all")
    J, S = jacobians(net, VECTOR), curvature(net(VECTOR).detach())
    agree(found, dense(J, S), N)
    assert found.loss == pytest.approx(float(loss(net(VECTOR).detach(), slice(None))), rel=1e-12)
    # lambda_max(K) / N is the sharpness of the Gauss-Newton matrix, which is a mean over the samples.
    G = torch.einsum("nap,nab,nbq->pq", J, S, J) / N
    top = torch.linalg.eigvalsh(found.gram)[-1] / N
    close(top, torch.linalg.eigvalsh(G)[-1], EXACT)


def test_at_interpolation_it_is_the_sharpness_of_the_hessian():
    problem, answer = interpolating_tanh()
    found = tangent_kernel(probes_of(problem.net, problem.x, lambda f, r: half_squares(f, problem.y[r])))
    top = torch.linalg.eigvalsh(found.gram)[-1] / 4
    close(top, answer, 1e-12)
    close(top, torch.linalg.eigvalsh(dense_hessian(problem))[-1], EXACT)
    close(top, top_eigenvalue(freeze(problem), tol=1e-6).value, 1e-5)
    assert found.loss < 1e-30


def test_several_outputs_at_interpolation():
    net, x = tanh_mlp(3, 5, 2), random(4, 3, seed=2)
    y = net(x).detach()
    found = tangent_kernel(probes_of(net, x, lambda f, r: half_squares(f, y[r])), outputs="all")
    truth = torch.linalg.eigvalsh(dense_hessian(Regression(net, x, y)))
    close(torch.linalg.eigvalsh(found.gram).flip(0)[:4] / 4, truth.flip(0)[:4], 1e-9)


@pytest.mark.parametrize("name", ["linear", "concave", "saddle"])
def test_a_criterion_without_a_gauss_newton_matrix_is_refused(name):
    loss, reason = {
        "linear": (lambda f, r: f.mean(), "linear"),
        "concave": (lambda f, r: -F.mse_loss(f, HOT[r]), "not convex"),
        "saddle": (lambda f, r: (f[:, 0] * f[:, 1]).mean() + f.square().mean() / 100, "not convex"),
    }[name]
    for outputs in ("all", *(["top"] if name != "saddle" else [])):
        with pytest.raises(Unmeasurable, match=reason):
            tangent_kernel(probes_of(classifier(), VECTOR, loss), outputs=outputs)


def test_a_random_forward_pass_is_refused():
    """Rows are formed in a second pass: they cannot add up to the gradient of the first."""
    net, noise = OnlyOutside().double(), torch.Generator().manual_seed(0)

    def evaluate():
        outputs = net(VECTOR * torch.rand(N, 1, generator=noise, dtype=f64))
        return evaluation(outputs, lambda f: f.square().mean(), samples=N)

    with pytest.raises(Unmeasurable, match="random"):
        tangent_kernel(ProbeSet(module=net, parts=(evaluate,), samples=N, batch_size=2), outputs="all")


# -- one row a sample ----------------------------------------------------------------------------------------------


def gram_of_rows(net, S):
    along = torch.stack([output_row(each, [*net.parameters()]) for each in S])
    Z = torch.einsum("na,nap->np", along, jacobians(net, VECTOR))
    return Z @ Z.T


def test_top_is_the_row_of_each_output_hessian():
    net = classifier()
    net[2].bias.data.copy_(torch.tensor([0.0, 5.0, 6.0, -6.0]))
    net[2].weight.data.mul_(0.2)
    found = tangent_kernel(probes_of(net, VECTOR, LOSSES["bce"][0]))
    S = LOSSES["bce"][1](net(VECTOR).detach())
    K = gram_of_rows(net, S)
    assert found.rows == 1 and found.stated == "top of 4 outputs"
    close(found.gram.abs(), K.abs(), EXACT)
    agree(found, K, N)


def test_top_of_the_softmax():
    net = classifier(gain=6.0)
    found = tangent_kernel(probes_of(net, VECTOR, LOSSES["cross_entropy"][0]))
    K = gram_of_rows(net, softmax_curvature(net(VECTOR).detach()))
    close(found.gram.abs() / K.max(), K.abs() / K.max(), 1e-9)
    close(torch.linalg.eigvalsh(found.gram) / K.max(), torch.linalg.eigvalsh(K) / K.max(), 1e-9)


@pytest.mark.parametrize("scale", [None, {"0.weight": 0.01, "0.bias": 100.0, "2.weight": 0.01, "2.bias": 0.01}])
def test_where_all_directions_are_alike_it_is_that_of_the_sharpest_mode(scale, monkeypatch):
    probes = probes_of(classifier(), VECTOR, LOSSES["mse"][0])

    def share():
        one, full = (tangent_kernel(probes, outputs=which, scale=scale) for which in ("top", "all"))
        assert one.rows == 1 and one.stated == "sharpest mode of 4 outputs"
        return float(torch.linalg.eigvalsh(one.gram)[-1] / torch.linalg.eigvalsh(full.gram)[-1])

    assert 0.95 < share() <= 1 + 1e-9  # where no mode stands out, twenty products leave a few per cent
    monkeypatch.setattr(sharpest_mode_module, "COLD", 40)
    assert 1 - 1e-4 < share() <= 1 + 1e-9


def test_positions_stand_for_all_in_the_mean():
    net, x = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))), random(N, 7, 3, seed=3)
    probes = probes_of(net, x, lambda f, rows: f.square().mean())
    whole = tangent_kernel(probes, positions=7)
    assert whole.rows == 7 and whole.stated == "the only output at 7 of 7 positions"
    traces = []
    for seed in range(40):
        some = tangent_kernel(probes, positions=3, generator=torch.Generator().manual_seed(seed))
        assert some.rows == 3 and "3 of 7 positions" in some.stated
        traces.append(float(some.gram.trace()))
    traces = torch.tensor(traces)
    assert abs(float(traces.mean() / whole.gram.trace()) - 1) < 4 * float(traces.std() / whole.gram.trace()) / 40**0.5


def test_ragged_parts_are_refused_where_a_position_is_missing():
    net, x = nn.Linear(3, 1).double(), [random(2, 7, 3), random(3, 1, 3)]
    parts = tuple(lambda part=part: evaluation(net(part), lambda f: f.square().mean(), samples=len(part)) for part in x)
    with pytest.raises(Unmeasurable, match="positions"):
        tangent_kernel(ProbeSet(module=net, parts=parts, samples=5, batch_size=2))


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_is_close(dtype, tol):
    net = classifier()
    exact = tangent_kernel(probes_of(net, VECTOR, LOSSES["half_squares"][0]), outputs="all").gram
    low, x, y = copy.deepcopy(net).to(dtype), VECTOR.to(dtype), HOT.to(dtype)
    found = tangent_kernel(probes_of(low, x, lambda f, r: half_squares(f, y[r])), outputs="all")
    assert found.gram.dtype == f64
    close(found.gram / exact.max(), exact / exact.max(), tol)


def test_the_global_random_state_is_left_alone():
    net, state = classifier(), torch.get_rng_state()
    probes = probes_of(net, VECTOR, LOSSES["cross_entropy"][0])
    one, two = tangent_kernel(probes), tangent_kernel(probes)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one.gram, two.gram)
    assert math.isfinite(one.defect)
