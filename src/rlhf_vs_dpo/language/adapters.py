r"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): what is learned is W + (alpha / rank) B A, and W stays as it is.

B starts at 0, so that a policy with fresh adapters is its base. Networks that start from one model share its weights: a policy, its
reference, a reward model and a value network are one base and what each has learned. A folder of adapters holds, besides them, where
their base lies and a hash of its weights; for whoever only reads a network they are merged into a copy of it.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from rlhf_vs_dpo.config import Adapter
from rlhf_vs_dpo.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in a folder of peft
HEADS = ("score", "classifier")  # of a reward model: learned whole, and kept beside the adapters


def attach(model: nn.Module, settings: Adapter) -> nn.Module:
    """Give the layers of a model fresh adapters and freeze the rest of it, a scalar head apart.

    Raises ModelError where `targets` name no linear layer, or the head: that of the vocabulary reads in float32 without adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    known = sorted({name.rsplit(".", 1)[-1] for name, _ in linear(model.base_model)})
    wanted = known if settings.targets == "all" else settings.targets
    if foreign := sorted(set(wanted) - set(known)):
        raise ModelError(
            f"params.yaml: `adapter.targets` names {', '.join(foreign)}; the linear layers of this model are {', '.join(known)}"
        )
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(wanted), lora_dropout=0.0, bias="none",
        fan_in_fan_out=any(type(layer) is not nn.Linear for _, layer in linear(model.base_model)),
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    for name in HEADS:
        if isinstance(head := getattr(model, name, None), nn.Module):
            head.requires_grad_(True)
    return model.eval()


def linear(body: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that multiply by a matrix, by name: PyTorch's, and GPT-2's, which holds its matrix the other way round."""
    from transformers.pytorch_utils import Conv1D

    return ((name, layer) for name, layer in body.named_modules() if isinstance(layer, (nn.Linear, Conv1D)))


def attached(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that have adapters, by name; none of a plain model."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def switched_off(model: nn.Module) -> nn.Module:
    """The base of this model as a network of its own, computed as the model is: it shares the weights, and adds no adapter to them."""
    base = twin(model)
    for layer in attached(base).values():
        layer.enable_adapters(False)
    return base.requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A network that learns from here on by itself: what is frozen is shared, what learns is copied."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return copy.deepcopy(model, {id(p): p for p in frozen})


def learn_rows(weight: nn.Parameter, rows: list[int]) -> None:
    """Let these rows of a frozen table learn, and no other: their gradients are zero."""
    mask = torch.zeros(len(weight), 1, device=weight.device)
    mask[rows] = 1.0
    weight.requires_grad_(True)
    weight.register_hook(lambda slope: slope * mask)


def share(model: nn.Module, other: nn.Module) -> None:
    """Let `model` have the frozen weights of `other`, of the same base, in the place of its own copies of them: also where those lie on
    another device, or are held in bf16."""
    theirs = {name: p for name, p in other.named_parameters() if not p.requires_grad}
    for path, module in model.named_modules():
        for name, own in list(module.named_parameters(recurse=False)):
            found = theirs.get(f"{path}.{name}")
            if found is None or own.requires_grad or own.shape != found.shape:
                continue
            if torch.equal(own.to(found.device, found.dtype), found):
                setattr(module, name, found)


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapters added to the weights, a copy that shares all that has none; without adapters, the model itself."""
    layers = attached(model)
    if not layers:
        return model
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
    for name, layer in attached(plain).items():
        if not layer.disable_adapters:
            layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, layer.get_base_layer())
    for trace in ("peft_config", "_hf_peft_config_loaded"):  # it would be saved as a model of peft
        vars(plain).pop(trace, None)
    return plain


# ---- folders ---------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path, base: Path) -> None:
    """Adapters, and a scalar head, in the form of peft; `base` is the folder of the model that they were attached to."""
    from safetensors.torch import save_file

    layers = attached(model)
    config = next(iter(model.peft_config.values())).to_dict() if hasattr(model, "peft_config") else {}
    heads = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    config |= {
        "base_model_name_or_path": str(base),
        "revision": revision(base),
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "modules_to_save": heads or None,
        "inference_mode": True,
    }
    weights = {
        PREFIX + name.replace(".default.", "."): p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n")


def _plain(value: object) -> object:
    """Sets and enumerations of peft's configuration as JSON has them."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def revision(base: Path) -> str:
    """What tells the weights of a folder from others: the SHA-256 of its safetensors."""
    found = hashlib.sha256()
    for path in sorted(base.glob("*.safetensors")):
        found.update(path.read_bytes())
    return f"sha256:{found.hexdigest()}"


def base_of(folder: Path) -> Path | None:
    """The folder of the base that a folder of adapters stands on; None where it is a whole model.

    Raises ModelError where the base is not there, or another one than when the adapters were saved.
    """
    if not (folder / CONFIG).exists():
        return None
    config = _read(folder)
    base = Path(config["base_model_name_or_path"])
    if not base.is_dir():
        raise ModelError(
            f"{folder}: its adapters stand on {base}, which is not there; `dvc repro` or `dvc pull` brings it"
        )
    if config["revision"] != revision(base):
        raise ModelError(f"{folder}: its adapters stand on other weights than {base} has now; run `dvc repro`")
    return base


def _read(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text())
        assert {"base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules"} <= config.keys()
        return config
    except (ValueError, AssertionError) as error:
        raise ModelError(
            f"{folder / CONFIG}: no adapters of this project ({error}); remove the folder and run `dvc repro`"
        ) from error


def restore(model: nn.Module, folder: Path) -> nn.Module:
    """Attach the adapters of a folder to their base, and give a scalar head its weights.

    Raises ModelError where the folder does not hold exactly what the model wants.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read(folder)
    alpha, targets = float(config["lora_alpha"]), list(config["target_modules"])
    attach(model, Adapter(rank=config["r"], alpha=alpha, targets=targets, merge=False))
    wanted = {PREFIX + name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: cannot be read ({error}); remove the folder and run `dvc repro`"
        ) from error
    wrong = sorted(wanted.keys() ^ weights.keys()) or [n for n, p in wanted.items() if p.shape != weights[n].shape]
    if wrong:
        raise ModelError(
            f"{folder}: adapters for another model ({', '.join(wrong[:3])}); remove the folder and run `dvc repro`"
        )
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(weights[name])
    return model
