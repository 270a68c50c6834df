"""Hidden states at the places that are read: those of the whole model, in value and gradient."""

import pytest
import torch

from rlhf_vs_dpo.language import llama as by_hand
from rlhf_vs_dpo.language import states as room
from rlhf_vs_dpo.language.states import before, last, states
from rlhf_vs_dpo.language.text import Tokens, collate


def llama(layers: int, key_value_heads: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=key_value_heads, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batch():
    """Prompts and responses of every length, one of a single token among them; some share a prompt; PAD is a token like others."""
    draw = torch.Generator().manual_seed(0)
    of = lambda n: torch.randint(0, 50, (n,), generator=draw).tolist()  # noqa: E731
    shared, long = of(7), of(12)
    rows = [
        (shared, of(3)),
        (of(1), of(1)),
        (of(2), of(9)),
        (long, of(2)),
        (shared, of(6)),
        (long, of(1)),
        (shared, of(1)),
    ]
    return collate([Tokens(prompt, response) for prompt, response in rows], pad=3)


@pytest.fixture(params=["in one product", "one by one"])
def projections(request, monkeypatch):
    """Small projections of the same tokens are one product, large ones are not."""
    if request.param == "one by one":
        monkeypatch.setattr(by_hand, "SMALL", 0)


def whole(model, batch, where):
    """One text at a time through the model as it comes: no batch, no padding."""
    rows = []
    for ids, attended in zip(batch.input_ids, batch.attention_mask, strict=True):
        hidden = model.base_model(ids[: int(attended.sum())][None]).last_hidden_state[0]
        rows.append(torch.nn.functional.pad(hidden, (0, 0, 0, len(ids) - len(hidden))))
    return torch.stack(rows)[where]


@pytest.mark.parametrize("read", ["before", "last", "some", "every"])
@pytest.mark.parametrize(("layers", "key_value_heads"), [(1, 4), (3, 4), (2, 2), (2, 1)])
def test_trimmed_states_are_those_of_the_whole_model_and_so_are_their_gradients(
    projections, batch, read, layers, key_value_heads
):
    model = llama(layers, key_value_heads)
    some = torch.zeros_like(batch.response_mask)
    some[0, 6] = some[2, [1, 5, 6]] = some[4, 12] = True  # of the other texts nobody reads anything
    where = {"before": before(batch.response_mask), "last": last(batch.response_mask), "some": some,
             "every": before(batch.response_mask) | batch.response_mask}[read]  # fmt: skip
    weights = torch.randn(int(where.sum()), 32, generator=torch.Generator().manual_seed(1))
    found = []
    for of in (states, whole):
        model.zero_grad()
        hidden = of(model, batch, where)
        (hidden * weights).sum().backward()
        found.append((hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (trimmed, slopes), (expected, expected_slopes) = found
    assert torch.allclose(trimmed, expected, atol=2e-5)
    assert slopes.keys() == expected_slopes.keys() and len(slopes) == 9 * layers + 2
    for name, slope in slopes.items():
        assert torch.allclose(slope, expected_slopes[name], rtol=1e-3, atol=1e-3 * expected_slopes[name].abs().max())


def test_a_prompt_is_read_once_padding_never_and_the_last_layer_works_where_somebody_reads(batch):
    model, seen = llama(2, 4), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 32))
    states(model, batch, before(batch.response_mask))
    distinct = 7 + 1 + 2 + 12 - 4  # tokens of the four prompts, but for the last of each, which every response repeats
    assert seen == [distinct + 7 + int(batch.response_mask.sum()), int(batch.response_mask.sum())]


def test_gradients_can_be_differentiated_again(projections, batch):
    """For TRPO's Fisher products: the slope of the slope along a direction is that of the whole model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = llama(2, 2)
    where, draw = before(batch.response_mask), torch.Generator().manual_seed(2)
    weights = torch.randn(int(where.sum()), 32, generator=draw)
    parameters = [p for name, p in model.named_parameters() if "layers" in name]
    directions = [torch.randn(p.shape, generator=draw) for p in parameters]
    found = []
    for of in (states, whole):
        with sdpa_kernel(SDPBackend.MATH):  # the one attention kernel that can be differentiated twice
            value = (of(model, batch, where) * weights).sum()
            slopes = torch.autograd.grad(value, parameters, create_graph=True)
            found.append(torch.autograd.grad(slopes, parameters, directions))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max()) and theirs.abs().max() > 0


def test_any_other_model_runs_whole(batch, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.delattr(room, "_of_llama")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).eval()
    where = before(batch.response_mask)
    assert torch.allclose(states(model, batch, where), whole(model, batch, where), atol=1e-5)


def test_before_shifts_left():
    mask = torch.tensor([[False, False, True, True, False]])
    assert before(mask).tolist() == [[False, True, True, False, False]]


def test_last_is_one_place_a_row():
    mask = torch.tensor([[False, True, False, False], [True, True, True, True], [False, False, False, True]])
    assert last(mask).tolist() == [
        [False, True, False, False],
        [False, False, False, True],
        [False, False, False, True],
    ]
