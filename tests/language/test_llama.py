"""Pieces of the Llama by hand that have gradients of their own: the ways of rows, and the gate of the feed-forward."""

import pytest
import torch

from rlhf_vs_dpo.language.llama import Rows, Way, _Gated, _Moved


def matrix(way: Way, width: int) -> torch.Tensor:
    return way.of(torch.eye(width, dtype=torch.float64))


def shared() -> Rows:
    """Three prompts of 2, 1 and 3 tokens; the responses, of 1, 2, 3, 1 and 2, belong to the first, second, third, first and first."""
    prompts, responses = Rows.of(torch.tensor([2, 1, 3])), Rows.of(torch.tensor([1, 2, 3, 1, 2]))
    return Rows.side_by_side(prompts, torch.tensor([0, 1, 2, 0, 0]), responses)


ALL = {
    "rows": Rows.of(torch.tensor([3, 1, 2])),
    "one row": Rows.of(torch.tensor([4])),
    "places": Rows.at(torch.tensor([[False, True, False, False, True]])),
    "shared": shared(),
}


@pytest.mark.parametrize("kind", ALL)
def test_the_way_back_is_the_transpose_and_each_slot_has_its_token(kind):
    rows = ALL[kind]
    tokens = int(rows.tokens.max()) + 1
    there, back = matrix(rows.there, tokens), matrix(rows.back, rows.tokens.numel())
    assert torch.equal(there, back.T)
    for slot, (token, filled) in enumerate(zip(rows.tokens.flatten(), rows.filled.flatten(), strict=True)):
        assert torch.equal(there[slot], torch.eye(tokens, dtype=torch.float64)[token] * filled)


def test_prompts_stand_before_each_of_their_responses():
    rows = shared()
    read = [row[filled].tolist() for row, filled in zip(rows.tokens, rows.filled, strict=True)]
    assert read == [[0, 1, 6], [2, 7, 8], [3, 4, 5, 9, 10, 11], [0, 1, 12], [0, 1, 13, 14]]


@pytest.mark.parametrize("kind", ALL)
def test_rows_can_be_differentiated_twice(kind):
    rows = ALL[kind]
    flat = torch.randn(int(rows.tokens.max()) + 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda of: _Moved.apply(of, rows.there, rows.back), flat)
    assert torch.autograd.gradgradcheck(lambda of: _Moved.apply(of, rows.there, rows.back).sin(), flat)


def test_the_gate_is_silu_times_up_and_so_are_its_slopes():
    both = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def plain(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    by_hand, known = _Gated.apply(both)[0], plain(both)
    torch.testing.assert_close(by_hand, known)
    torch.testing.assert_close(*(torch.autograd.grad(of.square().sum(), both)[0] for of in (by_hand, known)))
    assert torch.autograd.gradcheck(lambda both: _Gated.apply(both)[0], both)
    assert torch.autograd.gradgradcheck(lambda both: _Gated.apply(both)[0], both)
