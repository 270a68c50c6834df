"""Less memory for the same numbers: activations computed again, frozen matrices in the form that a GPU reads them in."""

import pytest
import torch
from conftest import gpt2, small_model

from rlhf_vs_dpo.config import Adapter, Scratch
from rlhf_vs_dpo.language import adapters, models
from rlhf_vs_dpo.language.generation import generate
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, collate

RANK_4 = Adapter(rank=4, alpha=8.0, targets="all", merge=False)


def deep(tokenizer, kind: str):
    """Four layers, so that most activations are inside of layers."""
    if kind == "gpt2":
        return gpt2(tokenizer, layers=4)
    torch.manual_seed(0)
    size = Scratch(layers=4, width=32, heads=2, feed_forward=48, context=64, bpe_vocabulary=300)
    return models.from_scratch(size, tokenizer)


def kept(policy: Policy, batch) -> tuple[int, torch.Tensor]:
    """Bytes that the forward pass keeps, and the gradient of all weights."""
    places: dict[int, int] = {}
    held = []

    def pack(tensor):
        held.append(tensor)
        places[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = policy(batch).sums().sum()
    learned = [p for p in policy.parameters() if p.requires_grad]
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)])
    return sum(places.values()), slopes


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True])
def test_activations_computed_again_give_the_same_gradient_from_less(kind, adapted, tokenizer, examples):
    model = deep(tokenizer, kind)
    if adapted:
        adapters.attach(model, RANK_4)
    policy, batch = Policy(model, 0.7), collate(examples * 4, tokenizer.pad_token_id)
    size, slopes = kept(policy, batch)
    drawn = generate(policy, Prompts([[1, 5], [1, 6, 7]], ["a", "b"]), [0, 0], 8, 0)
    models.recompute(model)
    less, again = kept(policy, batch)
    assert torch.equal(slopes, again) and less < 0.6 * size
    assert generate(policy, Prompts([[1, 5], [1, 6, 7]], ["a", "b"]), [0, 0], 8, 0) == drawn
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_frozen_matrices_in_bf16_say_what_autocast_makes_of_float32(kind, tokenizer, examples):
    plain = small_model(tokenizer) if kind == "llama" else gpt2(tokenizer)
    batch = collate(examples, tokenizer.pad_token_id)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
        exact = Policy(plain, 0.7)(batch).logp
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = Policy(plain, 0.7)(batch).logp
        models.in_bf16(models.freeze(plain))
        after = Policy(plain, 0.7)(batch).logp
    kinds = {p.dtype for p in plain.parameters()}
    assert kinds == {torch.float32, torch.bfloat16}
    assert plain.get_output_embeddings().weight.dtype == torch.float32
    if kind == "gpt2":
        assert torch.equal(before, after)
    else:  # by hand, float32 matrices take the norm's weight in before they are rounded: another rounding, of the same size
        ours, theirs = ((said - exact)[batch.response_mask].square().mean().sqrt() for said in (after, before))
        assert 0 < ours < 1.5 * theirs


def test_what_is_saved_whole_is_not_rounded(tokenizer, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = small_model(tokenizer)
    models.save(plain, tokenizer, tmp_path / "base")
    model, _ = models.load_learner(tmp_path / "base", RANK_4)
    with torch.no_grad():
        for layer in adapters.attached(model).values():
            layer.lora_B["default"].weight.normal_(std=0.01)
    expected = adapters.merged(model).state_dict()
    models.in_bf16(model)
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())
    models.save(model, tokenizer, tmp_path / "whole", tmp_path / "base", merge=True)
    whole = models.load_policy(tmp_path / "whole")[0].state_dict()
    assert whole.keys() == expected.keys() and all(torch.equal(whole[name], expected[name]) for name in whole)
