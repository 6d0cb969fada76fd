"""How a run's parameters lie on its processes, where each holds a shard of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import scales_gradients
from lsp_callbacks.autograd.spread_tensors import copies, has_shards, is_spread, local, processes_of, sharded_modules
from lsp_callbacks.step.ranks import Ranks


class Shards:
    """The shards of a module's parameters: those of ``fully_shard`` (FSDP2) and of ``parallelize_module``.

    Args:
        module: with at least one parameter that is spread over processes.
        ranks: all processes of the run.
    """

    def __init__(self, module: nn.Module, ranks: Ranks):
        self.ranks = ranks
        #: Of how many processes each holds the same numbers, by the name of the parameter.
        self.copies = {name: copies(p, ranks.world) for name, p in module.named_parameters() if p.requires_grad}

    @classmethod
    def of(cls, module: nn.Module, ranks: Ranks) -> Shards | None:
        """Return how a module's parameters lie on the processes; None where each holds all of them."""
        return cls(module, ranks) if has_shards(module) else None

    def total(self, values: Mapping[str, Tensor], what: str) -> Tensor:
        """Return the sum over all parameters, each number once, of what each process has for its shards.

        Args:
            values: sums over the shards of this process, by the name of the parameter.
            what: name of the exchange.
        """

        def of_rank() -> tuple[Tensor]:
            parts = [value / self.copies[name] for name, value in values.items()]
            device = self.ranks.device
            return (torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=device),)

        (mean,) = self.ranks.mean(of_rank, what)
        return mean * self.ranks.world


def local_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return this process's shards of the trainable parameters, by name: plain tensors in the memory of the shards."""
    return {name: nn.Parameter(local(p)) for name, p in module.named_parameters() if p.requires_grad}


def why_refused(module: nn.Module, world: int) -> str | None:
    """Return why the gradient of a sharded module is not the mean over the processes' losses; None if it is.

    Args:
        module: with shards.
        world: how many processes train it.
    """
    if world > 1 and not has_shards(module):
        return (
            f"no parameter is spread over the {world} processes, and nobody averages gradients: apply fully_shard or "
            "parallelize_module, or use strategy='ddp'"
        )
    for name, p in module.named_parameters():
        if p.requires_grad and is_spread(p) and processes_of(p) != world:
            return (
                f"the mesh of {name} has {processes_of(p)} of {world} processes: nobody averages its gradient over the "
                "others; use one mesh of all of them"
            )
    modules = sharded_modules(module)
    if any(map(scales_gradients, modules)):
        return (
            "set_gradient_divide_factor or an all-reduce hook changes what fully_shard makes of the gradients: they "
            "are not the plain mean over the processes, which is what is modelled"
        )
    plain = [name for name, p in module.named_parameters() if p.requires_grad and not is_spread(p)]
    if modules and plain:
        return (
            f"{len(plain)} trainable parameters ({plain[0]}, ...) are outside of fully_shard: nobody averages their "
            "gradients over the processes; apply fully_shard to the module that holds them, too"
        )
    return None
