"""Outputs and targets behind a loss, and the samples at which they are looked at."""

from collections import namedtuple

import pytest
import torch
from harness import CLASSES, FEATURES, Model, data, encoder, fit, mlp
from problems import close, f64, random, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lsp_callbacks import SGDStability, StabilityMonitor
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.step.criterion import Criteria, evaluation
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.probes import Probes, population

N, C = 6, 4
X, Y, HOT = random(N, 3), torch.arange(N) % C, random(N, C, seed=1).sigmoid()
PIXELS, MASK = random(N, C, 3, 2, seed=2), torch.arange(N * 6).view(N, 3, 2) % C


@pytest.fixture
def net():
    return seeded(nn.Linear(3, C))


def found_in(step, samples=N):
    with Criteria() as criteria:
        loss = step()
    return criteria.of(loss, samples=samples), loss


# -- what is found -------------------------------------------------------------------------------------------------


def _cross_entropy_by_keyword(f):
    return F.cross_entropy(input=f, target=Y)


#: The loss of (N, C) outputs; what it is of outputs in the one form is the same function.
LOSSES = {
    "cross_entropy": lambda f: F.cross_entropy(f, Y),
    "keywords": _cross_entropy_by_keyword,
    "module": lambda f: nn.CrossEntropyLoss()(f, Y),
    "smoothed": lambda f: nn.CrossEntropyLoss(label_smoothing=0.2)(f, Y),
    "soft": lambda f: F.cross_entropy(f, HOT.softmax(-1)),
    "nll": lambda f: F.nll_loss(F.log_softmax(f, dim=1), Y),
    "nll_method": lambda f: F.nll_loss(f.log_softmax(-1), Y),
    "nll_torch": lambda f: F.nll_loss(torch.log_softmax(f, dim=-1), Y),
    "nll_modules": lambda f: nn.NLLLoss()(nn.LogSoftmax(dim=1)(f), Y),
    "mse": lambda f: F.mse_loss(f, HOT),
    "mse_module": lambda f: nn.MSELoss()(f, HOT),
    "bce": lambda f: F.binary_cross_entropy_with_logits(f, HOT),
    "bce_module": lambda f: nn.BCEWithLogitsLoss()(f, HOT),
    "huber": lambda f: F.huber_loss(f, HOT, delta=0.3),
    "none_and_mean": lambda f: F.cross_entropy(f, Y, reduction="none").mean(),
    "mse_none_and_mean": lambda f: F.mse_loss(f, HOT, reduction="none").mean(),
    "positional": lambda f: F.mse_loss(f, HOT, None, None, "mean"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_criterion_of_a_step(name, net):
    loss = LOSSES[name]
    found, value = found_in(lambda: loss(net(X)))
    assert found.outputs.shape == (N, 1, C) and found.outputs.requires_grad
    close(found.outputs[:, 0].detach(), net(X).detach(), 1e-14)
    assert torch.equal(found.criterion(found.outputs), value)
    elsewhere = random(N, C, seed=5)
    close(found.criterion(elsewhere[:, None]), loss(elsewhere), 1e-14)
    own = torch.autograd.grad(found.criterion(found.outputs), net.weight)[0]
    close(own, torch.autograd.grad(loss(net(X)), net.weight)[0], 1e-14)


def test_the_one_that_is_the_loss_among_several(net):
    def step():
        F.cross_entropy(net(X), Y + 0 * Y)  # a metric
        loss = F.mse_loss(net(X), HOT)
        F.mse_loss(net(X).detach(), 2 * HOT)
        return loss

    found, _ = found_in(step)
    close(found.criterion(random(N, 1, C, seed=5)), F.mse_loss(random(N, C, seed=5), HOT), 1e-14)


@pytest.mark.parametrize("flat", [False, True], ids=["segmentation", "permuted"])
def test_classes_on_the_second_axis(flat):
    pixels = PIXELS.clone().requires_grad_()
    if flat:  # (N * H * W, C)
        found, value = found_in(lambda: F.cross_entropy(pixels.permute(0, 2, 3, 1).reshape(-1, C), MASK.flatten()))
    else:
        found, value = found_in(lambda: F.cross_entropy(pixels, MASK))
    assert found.outputs.shape == (N, 6, C)
    close(found.outputs.detach(), PIXELS.flatten(2).movedim(1, -1), 1e-14)
    close(found.criterion(found.outputs), value, 1e-14)
    elsewhere = random(*PIXELS.shape, seed=3)
    close(found.criterion(elsewhere.flatten(2).movedim(1, -1)), F.cross_entropy(elsewhere, MASK), 1e-14)


def test_segmentation_by_nll():
    pixels = PIXELS.clone().requires_grad_()
    found, value = found_in(lambda: F.nll_loss(F.log_softmax(pixels, dim=1), MASK))
    assert found.outputs.shape == (N, 6, C)
    close(found.criterion(found.outputs), value, 1e-14)


def test_token_logits_belong_to_their_samples():
    table = seeded(nn.Embedding(9, 5))
    tokens, target = torch.arange(12).view(4, 3) % 9, torch.arange(12).view(4, 3) % 5
    found, value = found_in(lambda: F.cross_entropy(table(tokens).view(-1, 5), target.view(-1)), samples=4)
    assert found.outputs.shape == (4, 3, 5)
    assert torch.equal(found.outputs, table(tokens)) and torch.equal(found.criterion(found.outputs), value)


@pytest.mark.parametrize("joined", [lambda f: f.view(-1, 5), lambda f: f.flatten(0, 1), lambda f: f.reshape(-1, 5)])
@pytest.mark.parametrize("dim", [-1, 2])
def test_log_probabilities_of_tokens_may_be_joined(joined, dim):
    """As in PyTorch's own language models."""
    table = seeded(nn.Embedding(9, 5))
    tokens, target = torch.arange(12).view(4, 3) % 9, torch.arange(12).view(4, 3) % 5
    found, value = found_in(
        lambda: F.nll_loss(joined(F.log_softmax(table(tokens), dim=dim)), target.view(-1)), samples=4
    )
    assert torch.equal(found.outputs, table(tokens)) and torch.equal(found.criterion(found.outputs), value)
    assert torch.equal(found.criterion(2 * found.outputs), F.cross_entropy(2 * table(tokens).mT, target))


def test_log_probabilities_over_another_axis_are_refused():
    table = seeded(nn.Embedding(9, 5))
    tokens, target = torch.arange(12).view(4, 3) % 9, torch.arange(12) % 5
    with pytest.raises(Unsupported, match="nll_loss without log_softmax"):
        found_in(lambda: F.nll_loss(F.log_softmax(table(tokens), dim=1).view(-1, 5), target), samples=4)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 2, 3), (N, 2, 3, 2)])
def test_regression_outputs_of_any_shape(shape):
    target = random(*shape, seed=1)
    outputs = random(*shape).requires_grad_()
    found, value = found_in(lambda: F.mse_loss(outputs, target))
    assert found.outputs.shape == (N, 1, outputs[0].numel())  # one position: entries are the outputs of a sample
    assert torch.equal(found.criterion(found.outputs), value)


def test_a_model_that_returns_its_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(12).view(3, 4) % 9
    found, value = found_in(lambda: model(input_ids=tokens, labels=tokens).loss, samples=3)
    assert found.outputs.shape[0] == 3 and found.outputs.shape[2] == 9
    assert torch.equal(found.criterion(found.outputs), value)


def test_a_loss_times_a_number_has_its_factor(net):
    found, value = found_in(lambda: 0.5 * F.cross_entropy(net(X), Y))
    assert torch.allclose(found.criterion(found.outputs), value)
    assert torch.allclose(value, 0.5 * F.cross_entropy(net(X), Y))


# -- what is refused -----------------------------------------------------------------------------------------------

REFUSED = {
    "auxiliary": lambda net: F.cross_entropy(net(X), Y) + 0.1 * net.weight.square().sum(),
    "by_hand": lambda net: (net(X) - HOT).square().mean(),
    "class_weights": lambda net: F.cross_entropy(net(X), Y, weight=torch.arange(1.0, C + 1, dtype=f64)),
    "class_weights_positional": lambda net: F.cross_entropy(net(X), Y, torch.arange(1.0, C + 1, dtype=f64)),
    "class_weights_nll": lambda net: F.nll_loss(net(X).log_softmax(1), Y, weight=torch.ones(C, dtype=f64)),
    "no_graph": lambda net: F.cross_entropy(net(X).detach(), Y),
    "probabilities": lambda net: F.nll_loss(net(X).softmax(1).log(), Y),
    "too_few": lambda net: F.cross_entropy(net(X)[: N - 1], Y[: N - 1]),
    "two_terms": lambda net: F.cross_entropy(net(X), Y) + F.mse_loss(net(X), HOT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_way_out(name, net):
    with pytest.raises(Unsupported, match=r"(?s)forward_fn=lambda.*criterion=lambda"):
        found_in(lambda: REFUSED[name](net))


def test_targets_first_are_refused(net):
    with pytest.raises(Unsupported, match="target first"):
        found_in(lambda: F.mse_loss(HOT, net(X)))


@pytest.mark.parametrize("outputs", [None, 3.0, torch.ones(N, C)], ids=["none", "number", "no_graph"])
def test_outputs_without_a_graph_are_refused(outputs):
    with pytest.raises(Unsupported, match="do not depend"):
        evaluation(outputs, lambda f: f.sum(), samples=N)


def test_a_loss_that_is_nan_says_so_of_this_step_alone(net):
    with pytest.raises(Unmeasurable, match="not finite") as caught:
        found_in(lambda: F.cross_entropy(net(X * float("nan")), Y))
    assert not isinstance(caught.value, Unsupported)


def test_a_sum_over_the_samples_is_refused(net):
    with pytest.raises(Unsupported, match=r"sums over the batch.*forward_fn"):
        found_in(lambda: F.cross_entropy(net(X), Y, reduction="sum"))


# -- modes ---------------------------------------------------------------------------------------------------------


def test_modes_are_put_back_and_a_graph_is_made():
    net = mlp(nn.Dropout(0.5), nn.BatchNorm1d(5))
    net.train()
    net[1].eval()
    for error in (None, KeyError):
        try:
            with torch.no_grad(), evaluating(net):
                assert not any(m.training for m in net.modules()) and torch.is_grad_enabled()
                if error:
                    raise error
        except KeyError:
            pass
        assert [m.training for m in net] == [True, False, True, True, True] and net.training


# -- samples -------------------------------------------------------------------------------------------------------


class Counted(Dataset):
    """Counts how often each sample is read."""

    def __init__(self, n=48):
        self.x, self.reads = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(2)), [0] * n
        self.asked = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads[i] += 1
        return self.x[i], int(self.x[i, :CLASSES].argmax())


def monitor(probes=20, every=1, **settings):
    return StabilityMonitor(SGDStability(probes, chains=4, steps=20), every_n_steps=every, **settings)


def test_the_data_set_is_read_by_training_alone():
    reads = []
    for callbacks in ([], [monitor()]):
        dataset = Counted()
        fit(Model, *callbacks, loader=DataLoader(dataset, batch_size=8), max_steps=5)
        reads.append(dataset.reads)
    assert reads[0] == reads[1] and sum(reads[0]) > 0
    assert "stability/courant_sgd" in callbacks[0].history


@pytest.mark.parametrize("wanted", [2, 8, 9, 20, 48])
def test_exactly_the_first_samples_are_kept(wanted):
    loader = data(shuffle=False)
    own = monitor(wanted)
    fit(Model, own, loader=loader, max_steps=7)
    ((x, y),) = own.observer.probes._batches
    assert torch.equal(x, loader.dataset.tensors[0][:wanted]) and torch.equal(y, loader.dataset.tensors[1][:wanted])
    assert own.observer.probes.full and own.observer.probes.batch_size == 8
    assert own.history["stability/courant_sgd"].steps[0] == (wanted - 1) // 8


def test_what_is_kept_is_a_copy():
    probes, x = Probes(4, None, None), torch.zeros(3, 2)
    probes.add([x, {"y": x}])
    x.add_(1)
    probes.add([x, {"y": x}])
    x.add_(1)
    ((first, rest),) = probes._batches
    assert first.tolist() == rest["y"].tolist() == [[0, 0]] * 3 + [[1, 1]] and probes.full
    probes.add([x, {"y": x}])
    assert len(probes._batches) == 1
    probes.drop()
    assert not probes.full and probes._batches == [] and probes.batch_size == 0


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize("kind", [dict, list, tuple, Pair])
def test_batches_of_any_form_are_joined(kind):
    probes = Probes(5, None, None)
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    batch = {"x": x, "y": y} if kind is dict else Pair(x, y) if kind is Pair else kind([x, y])
    for _ in range(3):
        probes.add(batch)
    (joined,) = probes._batches
    values = list(joined.values()) if kind is dict else list(joined)
    assert type(joined) is kind and [len(v) for v in values] == [5, 5]
    assert values[1].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "batches",
    [
        [[torch.zeros(3, 4)], [torch.zeros(3, 5)]],  # padded to different lengths
        [[torch.zeros(3, 4), "text"], [torch.zeros(3, 4), "text"]],
        [[torch.zeros(3, 4), torch.zeros(())], [torch.zeros(3, 4), torch.zeros(())]],
        [[torch.zeros(3, 4)], [torch.zeros(3, 4), torch.zeros(3)]],
        [[torch.zeros(3, 4), torch.zeros(7)], [torch.zeros(3, 4), torch.zeros(7)]],  # one is per something else
    ],
    ids=["ragged", "text", "scalar", "structure", "lengths"],
)
def test_batches_that_cannot_be_joined_stay_apart(batches):
    probes = Probes(5, None, None)
    for batch in batches:
        probes.add(batch)
    assert probes.full and len(probes._batches) == 2 and probes._sizes == [3, 3]


@pytest.mark.parametrize("batch", [["a", "b"], [], None, {"n": 3}, torch.zeros(())], ids=str)
def test_batches_without_samples_are_said_to_be_so(batch):
    probes = Probes(4, None, None)
    probes.add(batch)
    assert probes.full and "no tensor" in str(probes._failure)


def test_batches_that_cannot_be_copied_are_said_to_be_so():
    probes = Probes(4, None, None)
    probes.add([torch.zeros(2), (i for i in range(3))])
    assert probes.full and "cannot be copied" in str(probes._failure)


def test_a_loader_of_ready_made_batches_does_not_say_how_many_samples_there_are():
    assert population(data()) == 48
    assert population(DataLoader([[torch.zeros(8, 6)]] * 4, batch_size=None)) is None
    assert population(iter([])) is None


class Dicts(Model):
    """A dict with text in it; the numbers of tokens differ."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, CLASSES))

    def training_step(self, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return F.cross_entropy(self.net(x.mean(1)), batch["y"])


class Ragged(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = torch.randn(3 + i // 8, FEATURES, generator=torch.Generator().manual_seed(i))
        return {"x": x, "y": i % CLASSES, "name": f"sample {i}"}


def test_ragged_dicts_are_measured_batch_by_batch():
    own = monitor(20)
    fit(Dicts, own, loader=DataLoader(Ragged(), batch_size=8), max_steps=5)
    assert own.observer.probes._sizes == [8, 8, 8]
    values = own.history["stability/courant_sgd"].values
    assert len(values) == 3 and all(v > 0 for v in values)


def test_the_probes_are_evaluated_in_eval_mode_and_the_model_goes_on_training():
    own = monitor(16)
    run = fit(lambda: Model(encoder()), own, max_steps=5)
    assert run.model.training and all(m.training for m in run.model.modules())
    assert len(own.history["stability/courant_sgd"].values) == 4


def test_forward_fn_and_criterion_replace_the_step():
    class ByHand(Model):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - F.one_hot(batch[1], CLASSES)).square().mean()

    class Known(Model):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], CLASSES).float())

    one = monitor(
        forward_fn=lambda module, batch: module.net(batch[0]),
        criterion=lambda outputs, batch: (outputs - F.one_hot(batch[1], CLASSES)).square().mean(),
    )
    two = monitor()
    fit(ByHand, one), fit(Known, two)
    one, two = (m.history["stability/courant_sgd"] for m in (one, two))
    assert one.steps == two.steps and one.values == pytest.approx(two.values, rel=1e-2)


@pytest.mark.parametrize("given", [{"forward_fn": len}, {"criterion": len}])
def test_one_without_the_other_is_refused(given):
    with pytest.raises(ValueError, match="belong together"):
        StabilityMonitor(**given)
