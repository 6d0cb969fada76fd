"""The trained parameters of a module: those of ``named_parameters``, in its order, each once."""

import torch
from torch import nn

from lsp_callbacks.autograd._torch_internals import trained_parameters


def test_they_are_those_of_named_parameters():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": shared}), nn.Linear(3, 3))
    net[1]["a"].weight = net[2].weight
    net.scale, net.none = nn.Parameter(torch.ones(3)), None
    net[2].bias.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(net[2])
    scripted = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    for module in (net, scripted):
        expected = [(name, id(p)) for name, p in module.named_parameters() if p.requires_grad]
        assert [(name, id(p)) for name, p in trained_parameters(module).items()] == expected
