"""Hidden states at the places that are read: those of the whole model, in value and gradient."""

import pytest
import torch

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
    """Prompts and responses of every length, one of a single token among them; PAD is a token like others."""
    draw = torch.Generator().manual_seed(0)
    of = lambda n: torch.randint(0, 50, (n,), generator=draw).tolist()  # noqa: E731
    return collate([Tokens(of(7), of(3)), Tokens(of(1), of(1)), Tokens(of(2), of(9)), Tokens(of(12), of(2))], pad=3)


def whole(model, batch, where):
    """One text at a time through the model as it comes: no batch, no padding."""
    rows = []
    for ids, attended in zip(batch.input_ids, batch.attention_mask, strict=True):
        hidden = model.base_model(ids[: int(attended.sum())][None]).last_hidden_state[0]
        rows.append(torch.nn.functional.pad(hidden, (0, 0, 0, len(ids) - len(hidden))))
    return torch.stack(rows)[where]


@pytest.mark.parametrize("read", ["before", "last", "some", "all"])
@pytest.mark.parametrize(("layers", "key_value_heads"), [(1, 4), (3, 4), (2, 2), (2, 1)])
def test_trimmed_states_are_those_of_the_whole_model_and_so_are_their_gradients(batch, read, layers, key_value_heads):
    model = llama(layers, key_value_heads)
    some = torch.zeros_like(batch.response_mask)
    some[0, 2] = some[2, [1, 5, 6]] = True  # two texts that nobody reads
    where = {"before": before(batch.response_mask), "last": last(batch.response_mask), "some": some,
             "all": batch.attention_mask.bool()}[read]  # fmt: skip
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


def test_the_last_layer_works_at_places_that_are_read_alone(batch):
    model, seen = llama(2, 4), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 32))
    states(model, batch, before(batch.response_mask))
    assert seen == [batch.input_ids.numel(), int(batch.response_mask.sum())]


def test_any_other_model_runs_whole(batch, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.delattr(room, "_trimmed")
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
