"""A network in parts: each of several processes holds a share of its weights, gradients and AdamW's moments (`memory.sharding`).

A layer is whole while it is computed, and no longer: PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277). Every pass is
then work of all processes together, so that all must make equally many. Sampling is not: for it each process makes itself a whole copy.
"""

import copy
import os

import torch
from torch import Tensor, nn

from rlhf_vs_dpo.errors import ModelError

SKELETON, PARTS, ROOT = "skeleton", "parts", "root"  # what a model and its network remember, apart from their modules


class Root(nn.Module):
    """What FSDP hooks; the network itself stays the class that it is."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *args, **options):
        from rlhf_vs_dpo.language.models import autocast

        # Parts come and go, and what was cast of one is not the next one's.
        with autocast(next(self.network.parameters()).device, cached=False):
            return nn.Module.__call__(self.network, *args, **options)


def asked(network: nn.Module) -> bool:
    """Whether `models.to_learn` was told to, and there is anybody to share with."""
    return getattr(network.model, "shard", False) and int(os.environ.get("WORLD_SIZE", 1)) > 1


def sharded(model: nn.Module) -> bool:
    """Whether a Hugging Face model is held in parts."""
    return SKELETON in vars(model)


def shard(network: nn.Module) -> nn.Module:
    """Hold a network in parts from here on; returns what is to be called in its place (and is, when the network is called).

    Layers by themselves, the rest together. Raises ModelError for a model with adapters, whose networks share their frozen weights.
    """
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from rlhf_vs_dpo.language import adapters
    from rlhf_vs_dpo.language.models import in_half

    model = network.model
    if adapters.attached(model):
        raise ModelError(
            "`memory.sharding` and `adapter` cannot be used together: set one of them to false or null in params.yaml"
        )
    device = PartialState(cpu=not torch.cuda.is_available()).device
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    vars(model)[SKELETON] = copy.deepcopy(model, empty)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    parts = [module for module in model.modules() if type(module).__name__ in kinds]
    root, plain = Root(network), MixedPrecisionPolicy()
    # Layers are gathered in the form in which they are read: what `autocast` casts of them would be kept until the backward pass.
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*parts, root):
        fully_shard(module, mesh=mesh, mp_policy=half if in_half(device) and module is not root else plain)
        if device.type == "cpu":  # gloo's average is a sum (pytorch#162338)
            module.set_force_sum_reduction_for_comms(True)
    vars(network)[ROOT], vars(model)[PARTS] = root, [*parts, root]
    return root


def whole(model: nn.Module) -> nn.Module:
    """A whole copy of a model that is held in parts, on each process; all must ask for it. Any other model itself."""
    if not sharded(model):
        return model
    for part in vars(model)[PARTS]:  # the root stays whole behind a pass without a gradient
        part.reshard()
    parts = dict(model.named_parameters())
    filled = {
        id(p): nn.Parameter(parts[name].full_tensor().detach().clone(), p.requires_grad)
        for name, p in vars(model)[SKELETON].named_parameters()
    }
    return copy.deepcopy(vars(model)[SKELETON], filled)


def size_of_whole(model: nn.Module) -> int:
    """Bytes of what `whole` makes of a model that is held in parts."""
    return sum(p.numel() * p.element_size() for p in vars(model)[SKELETON].parameters())


def gather(network: nn.Module) -> None:
    """Hold a network whole again, on each process."""
    network.model = whole(network.model)
    vars(network).pop(ROOT, None)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def number(scalar: Tensor) -> float:
    """A scalar to which all processes may have to add."""
    return float(scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar)


def least(value: int) -> int:
    """The smallest of what the processes say; they must all ask."""
    return _over_all(value, torch.distributed.ReduceOp.MIN)


def most(value: int) -> int:
    """The largest of what the processes say; they must all ask."""
    return _over_all(value, torch.distributed.ReduceOp.MAX)


def _over_all(value: int, how) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    said = torch.tensor(value, device=device)
    torch.distributed.all_reduce(said, how)
    return int(said)
