"""Fine-tuning: adapters, frozen layers and those that are unfrozen in mid-run, quantised weights."""

import copy
import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from fine_tuning_zoo import lora_bert, lora_gpt2
from harness import BATCH, CLASSES, FEATURES, MOMENTUM, Model, data, fit, mlp, unchanged
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.functional import weight_norms
from lsp_callbacks.quantities.network import spectral_norm
from lsp_callbacks.step.module_copy import ModuleCopy, StandingCopy


def test_the_norm_of_a_layer_with_lora_is_that_of_what_it_applies():
    """That of the merged weight; the factors have none, of which the second is zero at the start."""
    norms = {}

    class Keep(pl.Callback):
        def on_train_start(self, trainer, module):
            self.merged(module, "first")

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.merged(module, "last")

        def merged(self, module, when):
            net = copy.deepcopy(module.net).merge_and_unload()
            block = net.transformer.h[0]
            weights = {"attn.c_attn": block.attn.c_attn, "mlp.c_fc": block.mlp.c_fc, "attn.c_proj": block.attn.c_proj}
            norms[when] = {name: float(torch.linalg.matrix_norm(m.weight, 2)) for name, m in weights.items()}

    monitor = StabilityMonitor(["spectral_norm"], every_n_steps=1)
    fit(lambda: lora_gpt2(0.0), Keep(), monitor, loader=data(), max_steps=12)
    keys = [key for key in monitor.history if "/spectral_norm/" in key]
    assert not any("lora" in key or "base_layer" in key for key in keys)
    for when, place in (("first", 0), ("last", -1)):
        for name, norm in norms[when].items():
            (key,) = [key for key in keys if key.endswith(f"h.0.{name}")]
            assert monitor.history[key].values[place] == pytest.approx(norm, rel=0.03), (when, name)  # of Lanczos
    moved = {name: abs(norms["last"][name] / norms["first"][name] - 1) for name in norms["first"]}
    assert moved["attn.c_proj"] == 0 and max(moved.values()) > 0.05
    assert all(map(math.isfinite, monitor.history["stability/spectral_log_sum"].values))


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution", "none active"])
def test_adapters_of_other_layers_are_merged_in_the_same_way(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = {"embedding": nn.Embedding(7, 3), "convolution": nn.Conv2d(2, 3, 3)}.get(kind, nn.Linear(4, 5))
    net = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapted = net.base_model.model[0]
    if kind == "none active":
        adapted.enable_adapters(False)
    shape = (2, 6, 6) if kind == "convolution" else None
    found = float(weight_norms(adapted, shape, tol=1e-6)[""].value)
    plain = copy.deepcopy(net).merge_and_unload()[0] if kind != "none active" else layer
    assert found == pytest.approx(float(weight_norms(plain, shape, tol=1e-6)[""].value), rel=1e-4)


def test_dora_has_no_norm():
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(nn.Sequential(nn.Linear(4, 5)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match="is not a layer with a known linear part"):
        weight_norms(net.base_model.model[0])


@pytest.mark.slow
def test_dora_is_measured_but_for_second_derivatives():
    """It holds the norm of each row fixed where it differentiates, so that they would not be those of its loss."""
    pytest.importorskip("peft")
    names = ["mean_square_stability", "courant_step", "spectral_norm", "sharpness", "lyapunov"]
    monitor = StabilityMonitor(every_n_steps=1, quantities=names)
    monitor.monitor.quantities.named.clear()
    unchanged(partial(lora_bert, dora=True), monitor, max_steps=4)
    assert {*monitor.skipped} == {"sharpness", "lyapunov"}
    assert all("made by detach" in reason for reason in monitor.skipped.values())
    for key in ("courant_mean_square", "courant_step", "spectral_norm_max"):
        assert all(map(math.isfinite, monitor.history[f"stability/{key}"].values)), key


class TwoLayers(Model):
    """A frozen layer, whose weights somebody may change all the same."""

    change = None

    def __init__(self):
        super().__init__(mlp())
        self.net[0].requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == self.change:
            self.net[0].weight.data.mul_(2.0)


@pytest.mark.parametrize("change", [None, 3])
def test_what_is_frozen_keeps_its_norm(change, monkeypatch):
    calls, small_norm = [], spectral_norm.small_norm

    def counted(matrix):
        calls.append(matrix.shape)
        return small_norm(matrix)

    monkeypatch.setattr(spectral_norm, "small_norm", counted)
    monkeypatch.setattr(TwoLayers, "change", change)
    monitor = StabilityMonitor(["spectral_norm"], every_n_steps=1)
    trainer = fit(TwoLayers, monitor, loader=data(shuffle=False), max_steps=6)
    assert calls.count((CLASSES, 5)) == 6 and calls.count((5, FEATURES)) == (1 if change is None else 2)
    norm = float(torch.linalg.matrix_norm(trainer.model.net[0].weight, 2))
    values = monitor.history["stability/spectral_norm/net.0"].values
    assert values[-1] == pytest.approx(norm, rel=1e-3)
    assert values[0] == pytest.approx(norm / (1 if change is None else 2), rel=1e-3)


def test_a_handle_of_a_hook_can_be_copied_again_and_again():
    """The deep copy of a handle whose hooks are gone cannot be copied; Hugging Face's checkpoints keep such handles."""
    net = mlp()
    net.handles = [net[0].register_forward_hook(lambda module, args, output: None, with_kwargs=False, always_call=True)]
    standing = StandingCopy()
    for _ in range(2):
        copied = ModuleCopy(net, standing=standing)
        for _ in range(2):
            copied.reset().handles[0].remove()
        del copied
    assert len(net[0]._forward_hooks) == 1


class Backbone(Model):
    """A backbone that is unfrozen in mid-run, and a head."""

    def __init__(self):
        super().__init__(nn.Identity(), MOMENTUM)
        self.backbone, self.head = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh()), nn.Linear(8, CLASSES)

    def loss(self, batch):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


def unfreezing(at):
    return pl.callbacks.BackboneFinetuning(at, lambda epoch: 1.0, backbone_initial_lr=0.02, verbose=False)


def test_the_headline_number_goes_on_when_a_backbone_is_unfrozen():
    """At the defaults, with the parameters that are then trained: as in a run in which they were from the start."""
    monitor = StabilityMonitor(["mean_square_stability", "sharpness", "spectral_norm"], every_n_steps=1)
    trainer = fit(Backbone, unfreezing(2), monitor, loader=data(n=8 * BATCH), max_epochs=4, max_steps=-1)
    courant = monitor.history["stability/courant"]
    assert len(courant.values) == 32 and all(map(math.isfinite, courant.values))
    assert len(trainer.optimizers[0].param_groups) == 2
    traces = monitor.monitor.quantities["mean_square_stability"].latest.kernel.traces
    assert traces["backbone.0.weight"] > 0 and traces["head.weight"] > 0
    assert monitor.paths["mean_square_stability"] == "structured" and not monitor.skipped


def test_unfreezing_leaves_no_trace():
    class Unfreezing(Backbone):
        def configure_callbacks(self):
            return [unfreezing(1)]

    unchanged(Unfreezing, StabilityMonitor(), loader=data(n=8 * BATCH), max_epochs=3, max_steps=-1)


def test_a_run_goes_on_from_a_checkpoint_behind_the_unfreezing(tmp_path):
    """With what is trained then: Lightning's callback leaves layers frozen that were unfrozen before the checkpoint."""

    def callbacks():
        return unfreezing(1), StabilityMonitor(["mean_square_stability"], every_n_steps=1)

    settings = {"loader": data(n=8 * BATCH, shuffle=False), "enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = fit(Backbone, *callbacks(), max_epochs=2, max_steps=-1, **settings)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    freezing, monitor = callbacks()
    trainer = fit(Backbone, freezing, monitor, max_epochs=3, max_steps=-1, ckpt_path=tmp_path / "last.ckpt", **settings)
    curve = monitor.history["stability/courant_mean_square"]
    assert curve.steps[-8:] == [*range(16, 24)] and all(map(math.isfinite, curve.values))
    kernel = monitor.monitor.quantities["mean_square_stability"].latest.kernel
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert kernel.traces.keys() == trained and "head.weight" in trained


def test_weights_that_torchao_has_quantised_stay_as_they_are():
    quantization = pytest.importorskip("torchao.quantization")

    def make():
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0")
        net[0].requires_grad_(False)
        return Model(net)

    monitor = StabilityMonitor(every_n_steps=1)
    left = [fit(make, *callbacks, loader=data(), max_steps=4).model for callbacks in ((), (monitor,))]
    assert torch.equal(left[0].net[2].weight, left[1].net[2].weight)
    assert all(map(math.isfinite, monitor.history["stability/courant"].values))
    frozen = left[0].net[0].weight.dequantize()
    norm = monitor.history["stability/spectral_norm/net.0"].values[-1]
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(frozen, 2)), rel=1e-2)
