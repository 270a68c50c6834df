"""Load, freeze, save byte-stably. Model folders are plain Hugging Face folders, safetensors only."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from rlhf_vs_dpo.config import Adapter, Base, Memory, Scratch
from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language import adapters, sharding
from rlhf_vs_dpo.run import arithmetic, atomic

if not torch.cuda.is_available():
    # Gradients of a place that was read several times are added in order, not by threads that race (run/arithmetic.py). On a GPU
    # some operations have no such form.
    torch.set_deterministic_debug_mode("error")  # what use_deterministic_algorithms does, without a second of imports
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would only make what is never read the same
else:
    # Heads are read in float32, and at tens of thousands of words that costs as much as all layers: TF32 has 10 bits where bf16 has 7,
    # sums in float32, and is several times as fast.
    torch.set_float32_matmul_precision("high")


def device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def in_half(device: torch.device) -> bool:
    """Whether forward passes on a device run in bf16: on a GPU that has it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, cached: bool = True):
    """bf16 on a GPU that has it, float32 elsewhere: the precision of every forward pass of the project.

    cached    whether what is cast once is kept until the end
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cached) if in_half(device) else nullcontext()


@contextmanager
def in_full() -> Iterator[None]:
    """Float32 as float32, on a GPU, too, which otherwise takes bf16 or TF32."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device().type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(usual)


def in_float32(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A vocabulary or scalar head on hidden states, in float32 whatever `autocast` says of the rest."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())


def quiet(model: nn.Module) -> nn.Module:
    """Switch dropout off for good: with it, a policy differs from itself (ratio != 1, KL != 0 before any update)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in list(vars(model.config)):
        if name.endswith(("dropout", "_pdrop", "dropout_prob")) and isinstance(getattr(model.config, name), float):
            setattr(model.config, name, 0.0)
    for module in model.modules():  # attention modules keep a copy of their probability
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.eval()


def freeze(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def recompute(model: nn.Module) -> nn.Module:
    """Have layers compute their activations again in the backward pass: the same numbers, less memory, about a third more time."""
    with warnings.catch_warnings():  # newer releases call it activation checkpointing, older ones do not know that name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def recomputing(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that `recompute` was asked for."""
    return [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]


def light(model: nn.Module) -> nn.Module:
    """On a GPU, hold matrices that do not learn in bf16, the form in which `autocast` reads them: the same numbers, half the memory."""
    return in_bf16(model) if in_half(device()) else model


def in_bf16(model: nn.Module, learning: bool = False) -> nn.Module:
    """Frozen matrices of a model's body as bf16; embeddings, norms and heads, which are read in float32, stay as they are.

    learning    those that learn, too
    """
    for _, layer in adapters.linear(model.base_model):
        for name, p in list(layer.named_parameters(recurse=False)):
            if learning or not p.requires_grad:
                setattr(layer, name, nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False))
    return model


def sampler(model: nn.Module) -> nn.Module:
    """The network that responses are sampled from: on a CPU the model itself, its adapters merged; on a GPU a copy in bf16.

    `autocast` would cast float32 matrices again for every token. Adapters stay beside the matrices there: in bf16 a sum of both would
    lose most of what was learned, which is smaller than the rounding.
    """
    whole = sharding.whole(model)
    if not in_half(device()):
        return adapters.merged(whole)
    return in_bf16(copy.deepcopy(whole, {id(p): p for p in whole.parameters()}), learning=True)


def to_read(model: nn.Module) -> nn.Module:
    """A trained network that is read only: frozen, on `device()`, its adapters merged; on a GPU they stay beside the base, see `sampler`."""
    model = freeze(model if in_half(device()) else adapters.merged(model))
    return light(model.to(device()))


def size_of_sampler(model: nn.Module) -> int:
    """Bytes of what `sampler` holds besides the model, at the most."""
    if in_half(device()):
        held = [p for _, layer in adapters.linear(model.base_model) for p in layer.parameters(recurse=False)]
        copied = sum(2 * p.numel() for p in held if p.dtype == torch.float32)
        return copied + (sharding.size_of_whole(model) if sharding.sharded(model) else 0)
    if sharding.sharded(model):
        return sharding.size_of_whole(model)
    return sum(of.get_base_layer().weight.nbytes for of in adapters.attached(model).values())


def size(model: nn.Module) -> int:
    """Weights outside the table of embeddings (a look-up): N of the estimate 6 N per token (arXiv:2001.08361, section 2.1).

    A projection that shares that table is left out with it, as there.
    """
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def frozen(model: nn.Module) -> int:
    """Those weights of `size` that do not learn: under adapters, all but the adapters."""
    table = model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if not p.requires_grad and p is not table)


def context_of(config) -> int:
    """Tokens that fit into the context of a model."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20)


class Network(nn.Module):
    """A Hugging Face model under a head of ours, and what everyone who feeds it must know of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __call__(self, *args, **options):
        """Through what holds it in parts, where it is held so."""
        root = vars(self).get(sharding.ROOT)
        return (super().__call__ if root is None else root)(*args, **options)

    def state_dict(self, *args, **options):
        """What is learned: all of it; under adapters, what does not stand in the base."""
        whole = super().state_dict(*args, **options)
        if adapters.attached(self.model):
            learned = {name for name, p in self.named_parameters() if p.requires_grad}
            whole = {name: value for name, value in whole.items() if name in learned}
        return whole

    def load_state_dict(self, state, *args, **options):
        """The reverse. Raises RuntimeError where the state is that of another network."""
        if adapters.attached(self.model):
            learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
            if learned.keys() != state.keys():
                raise RuntimeError("a state of other adapters")
            options["strict"] = False
        return super().load_state_dict(state, *args, **options)

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return self.model.config.pad_token_id

    @property
    def context(self) -> int:
        """Tokens that fit into the model's context."""
        return context_of(self.model.config)

    @property
    def budget(self) -> int:
        """Padded tokens of one micro-batch that fit this device: what divides a global batch, never what defines it.

        A rough count of float32 activations per token (about 40 vectors of the width a layer, and two of the
        vocabulary), against a quarter of the memory of a GPU that is free now, or 4 GiB on any CPU, where 16,384 tokens keep the working
        set near the caches. RLHF_MICRO_TOKENS overrides it, on a CPU only with RLHF_NATIVE, for it moves bits.
        """
        given = os.environ.get("RLHF_MICRO_TOKENS")
        if given and (torch.cuda.is_available() or arithmetic.native()):
            return int(given)
        config = self.model.config.get_text_config()
        per_token = 4 * (40 * config.hidden_size * config.num_hidden_layers + 2 * config.vocab_size)
        if not torch.cuda.is_available():
            return min(16384, max(2048, 2**32 // per_token))
        fitting = max(2048, int(torch.cuda.mem_get_info()[0] / 4 / per_token))
        return sharding.least(fitting) if sharding.sharded(self.model) else fitting


# ---- loading ---------------------------------------------------------------------------------------------------------


def from_scratch(settings: Scratch, tokenizer):
    """A small Llama with random weights, its embedding tied to its projection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.width % settings.heads:
        raise ModelError(
            f"params.yaml: `base.scratch.width` ({settings.width}) must be a multiple of `heads` ({settings.heads})"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        # The usual 0.02 suits widths of thousands; at a width of 112 it delays copying heads beyond the run.
        initializer_range=settings.width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return never_say(quiet(LlamaForCausalLM(config)), [config.pad_token_id, config.bos_token_id])


def pretrained(settings: Base):
    """(model, tokenizer) from a Hub id with revision, a local folder, or a folder with one GGUF file.

    A PAD that is missing or equals EOS is replaced by a token of its own, or the policy would never learn to stop. It is never
    said, nor is a BOS that has no other meaning.
    """
    from transformers import GenerationConfig

    name = settings.pretrained
    model, tokenizer = load(name, "AutoModelForCausalLM", _origin(name, settings.revision))
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no EOS token, so that no response could end")
    tokenizer.clean_up_tokenization_spaces = False
    # Of how the model was sampled elsewhere (temperature, top-p, penalties) nothing holds here, but what it never says.
    model.generation_config = GenerationConfig(suppress_tokens=model.generation_config.suppress_tokens)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = len(tokenizer)
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        start_at_mean(model, [tokenizer.pad_token_id], known)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
    silent = {tokenizer.pad_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id, None}
    return never_say(model, sorted(silent)), tokenizer


def pretrained_tokenizer(name: str, revision: str | None):
    """The tokenizer alone: for its chat template, before there is a model."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_origin(name, revision))
    except ModelError:
        raise
    except Exception as error:
        raise _unloadable(name, "AutoTokenizer", error) from error


def _origin(name: str, revision: str | None) -> dict[str, str]:
    """What `from_pretrained` needs besides the name: a revision for a Hub id, the file for a folder with a GGUF."""
    folder = Path(name)
    if folder.is_dir():
        gguf = sorted(path.name for path in folder.glob("*.gguf"))
        if len(gguf) > 1:
            raise ModelError(f"{folder}: several GGUF files ({', '.join(gguf)}); keep one in the folder")
        return {"gguf_file": gguf[0]} if gguf and not (folder / "config.json").exists() else {}
    if name.startswith((".", "/", "~")):
        raise ModelError(f"`base.pretrained` is {name}, and there is no such folder")
    if not revision:
        raise ModelError(
            f"`base.pretrained` is {name}, which is no folder here, hence a Hub id: give `base.revision` a commit hash, "
            "for a Hub id alone is invisible to DVC and may change under you"
        )
    return {"revision": revision}


def load_policy(folder: Path):
    """(model, tokenizer) of a folder that a stage wrote, to be read only (see `to_read`): dropout off, in eval mode."""
    model, tokenizer = load_own(folder, "AutoModelForCausalLM")
    return to_read(model), tokenizer


def load_learner(folder: Path, adapter: Adapter | None = None, memory: Memory | None = None, half: bool = True):
    """(model, tokenizer) of a folder that a stage wrote, to be trained: float32, dropout off, in eval mode, on `device()`.

    adapter     low-rank adapters that learn in the place of all weights
    memory      what is given for memory: activations computed again, weights in parts
    half        whether the frozen matrices below adapters may be held in bf16, on a GPU
    """
    model, tokenizer = load_own(folder, "AutoModelForCausalLM")
    return to_learn(model, adapter, memory, half).to(device()), tokenizer


def to_learn(model: nn.Module, adapter: Adapter | None, memory: Memory | None, half: bool = True) -> nn.Module:
    """A model as it is trained (see `load_learner`)."""
    if adapter is not None:
        adapters.attach(model, adapter)
        model = light(model) if half else model
    if memory is None:
        return model
    model.shard = memory.sharding
    return recompute(model) if memory.gradient_checkpointing else model


def start_of(model: nn.Module, folder: Path) -> nn.Module:
    """What `model`, to be trained from a folder, is compared with: the policy of the folder; under adapters, its base without them."""
    return adapters.switched_off(model) if adapters.attached(model) else load_policy(folder)[0]


def tokenizer_and_context(folder: Path):
    """(tokenizer, context) of a folder that a stage wrote, without its weights."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return tokenizer, context_of(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        raise _unloadable(str(folder), "AutoTokenizer", error) from error


def load_own(folder: Path, kind: str):
    """A folder that a stage wrote: it must hold exactly the weights of its kind, all finite, and a whole tokenizer."""
    if not Path(folder).is_dir():
        raise ModelError(f"{folder}: no such folder; `dvc repro` makes it, `dvc status` says by which stage")
    base = adapters.base_of(Path(folder))
    if base is None:
        model, tokenizer = load(str(folder), kind, {}, strict=True)
    else:
        model, tokenizer = _on_base(Path(folder), base, kind)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ModelError(
            f"{folder}: its tokenizer has no EOS, or no PAD of its own; remove the folder and run `dvc repro`"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ModelError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, more than the model has embeddings")
    if (model.config.pad_token_id, model.config.eos_token_id) != (tokenizer.pad_token_id, tokenizer.eos_token_id):
        raise ModelError(
            f"{folder}: config.json and the tokenizer do not have the same PAD and EOS; remove the folder and run `dvc repro`"
        )
    broken = [key for key, value in model.named_parameters() if not torch.isfinite(value).all()]
    if broken:
        raise ModelError(
            f"{folder}: weights that are not finite: {', '.join(broken[:3])}; remove the folder and run `dvc repro`"
        )
    return model, tokenizer


def _on_base(folder: Path, base: Path, kind: str):
    """(model, tokenizer) of a folder of adapters: weights of the base, all else of the folder itself."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _unloadable(str(folder), kind, error) from error
    try:
        model, _ = load(str(base), kind, {"config": config}, new_head=True)
        if kind == "AutoModelForCausalLM":
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except (ModelError, OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder}: does not go with {base}, which its adapters stand on; remove it and run `dvc repro`\n  {str(error)[:400]}"
        ) from error
    return adapters.restore(model, folder), tokenizer


def load(name: str, kind: str, extra: dict, new_head: bool = False, strict: bool = False):
    """(model, tokenizer); a weight that the folder lacks is an error, unless it is that of a head to be trained."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    weights = {"use_safetensors": True}
    if "gguf_file" in extra:  # a dense float32 model, which can be trained; newer releases keep the blocks unless told
        packed = getattr(transformers, "GgufConfig", None)
        weights = {"quantization_config": packed(dequantize=True)} if packed else {}
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **weights, **extra
        )
        tokenizer_extra = {key: value for key, value in extra.items() if key not in ("num_labels", "config")}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **tokenizer_extra)
    except Exception as error:  # transformers, safetensors, json and the Hub client raise unrelated types
        raise _unloadable(name, kind, error) from error
    lost = [key for key in found["missing_keys"] if not (new_head and key.split(".")[0] in ("score", "classifier"))]
    foreign = sorted(found["unexpected_keys"]) if strict else []
    if lost or foreign or found["mismatched_keys"]:
        what = (
            f"missing {sorted(lost)[:3]}, foreign {foreign[:3]}, of another shape {list(found['mismatched_keys'])[:3]}"
        )
        raise _unloadable(name, kind, KeyError(f"weights {what}"))
    return quiet(model), tokenizer


def _unloadable(name: str, kind: str, error: Exception) -> ModelError:
    if Path(name).exists():
        fix = "the folder is corrupt, truncated, or not of this kind; remove it and make it again (`dvc repro`, or a new download)"
    else:
        fix = (
            "the Hub could not give it; check the name and revision, or download it where there is a network "
            f"(`hf download {name} --local-dir FOLDER`) and set `base.pretrained` to FOLDER"
        )
    return ModelError(f"{name}: cannot be loaded as {kind}: {fix}\n  {type(error).__name__}: {str(error)[:400]}")


# ---- how a policy is prompted ----------------------------------------------------------------------------------------


def prompt_suffixes(model) -> list[str]:
    """What this policy wants behind a prompt, as its own config.json says; [""] for most.

    The first is how it is meant to be prompted; others show what it does when told otherwise.
    """
    return list(getattr(model.config, "prompt_suffixes", None) or [""])


def start_at_mean(model: nn.Module, ids: list[int], known: int) -> None:
    """Embeddings of new tokens (a row for each is made where there is none), in and out, at the mean of the `known` ones.

    A random row is no neutral start: where all logits lie far below 0 (GPT-2: about -35), that of a random row lies near 0, and its
    token takes all of the probability.
    """
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weights in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weights[ids] = weights[:known].mean(0)
        if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
            bias[ids] = bias[:known].mean()


def never_say(model: nn.Module, ids: list[int]) -> nn.Module:
    """Add to the tokens that a policy never says; written into its folder (`suppress_tokens` of the generation config)."""
    config = model.generation_config
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *ids})
    return model


def sampled_at(model: nn.Module, temperature: float) -> None:
    """Write into the generation config how the policy is sampled: who loads its folder generates from the same distribution."""
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, temperature, 0, 1.0


def add_control_tokens(model, tokenizer, tokens: list[str], weight_decay: float = 0.0) -> None:
    """Give model and tokenizer new tokens to be prompted by: embeddings resized, never said, written into the folder.

    Their embeddings start at the mean of all others, so that they mean nothing until they are trained. Under adapters they are
    all that learns of the embeddings. Raises ModelError where `weight_decay` would shrink the others all the same.
    """
    known = len(tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=True)
    if len(tokenizer) != known + len(tokens):
        raise ModelError(f"the tokenizer has one of {', '.join(tokens)} already, with a meaning of its own")
    ids = tokenizer.convert_tokens_to_ids(tokens)
    start_at_mean(model, ids, known)
    never_say(model, ids)
    model.config.prompt_suffixes = tokens
    if adapters.attached(model):
        if weight_decay > 0:
            raise ModelError(
                "params.yaml: control tokens under `adapter` need `weight_decay: 0.0`, or all embeddings would shrink"
            )
        adapters.learn_rows(model.get_input_embeddings().weight, ids)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, tokenizer, folder: Path, base: Path | None = None, merge: bool = False) -> None:
    """Write a model folder whole or not at all.

    base    the folder that the model's adapters were attached to
    merge   write a whole model, and no adapters
    """
    with atomic.folder(folder) as temporary:
        if not adapters.attached(model) or merge:
            adapters.merged(_in_float32(model, base)).save_pretrained(temporary)
        else:
            adapters.save(model, temporary, base)
            model.config.save_pretrained(temporary)
            if model.can_generate():
                model.generation_config.save_pretrained(temporary)
        if "local_files_only" in tokenizer.init_kwargs:
            tokenizer.init_kwargs["local_files_only"] = (
                False  # else HF_HUB_OFFLINE of whoever runs this would be in the bytes
            )
        tokenizer.save_pretrained(temporary)


def _in_float32(model: nn.Module, base: Path | None) -> nn.Module:
    """The model with the matrices that `light` rounded as they stand in its base: adapters are smaller than the rounding."""
    rounded = {name for name, p in model.named_parameters() if p.dtype is torch.bfloat16}
    if not rounded:
        return model
    kind = "AutoModelForCausalLM" if model.can_generate() else "AutoModelForSequenceClassification"
    stored = dict(load(str(base), kind, {}, new_head=True)[0].named_parameters())
    whole = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name in rounded:
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, stored[name.replace(".base_layer.", ".")])
    return whole.cpu()
