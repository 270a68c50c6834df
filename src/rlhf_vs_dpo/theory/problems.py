"""Two kinds of enumerable problem, in the form that the production loops take: a policy, a tokenizer, a reward model.

1. `tabular`: a softmax over outcomes for each prompt, one logit per outcome. A response is an outcome and EOS.
2. `transformer`: a tiny Llama that says at most two tokens of a small vocabulary, so that each of its responses is known.
"""

import copy
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_vs_dpo.config import Scratch
from rlhf_vs_dpo.config import Tabular as Size
from rlhf_vs_dpo.language.forward import log_likelihoods, scores
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.models import device, from_scratch
from rlhf_vs_dpo.language.text import Prompts, Tokens, word_tokenizer
from rlhf_vs_dpo.theory import laws

NEVER = -1e4  # logit of what cannot be said: its probability is exactly 0 in float32
CONTROLS = ("[GOOD]", "[BAD]")


@dataclass
class Problem:
    """prompts and responses (ids); every response of the reference is among `responses`, the same for each prompt.

    max_new_tokens   of a response
    ref, reward      (P, R) float64: probabilities of the reference, and rewards (of a response that never ended:
                     `unfinished_reward`)
    """

    name: str
    reference: Policy
    tokenizer: object
    scorer: Scorer
    prompts: Prompts
    responses: list[list[int]]
    unfinished_reward: float
    max_new_tokens: int = 2

    def __post_init__(self) -> None:
        self.ref = self.distribution(self.reference)
        gap = np.abs(self.ref.sum(-1) - 1).max()
        if not gap < 1e-4:
            raise AssertionError(f"the enumeration is not complete: probabilities add up to 1 ± {gap:.2g}")
        self.ref /= self.ref.sum(-1, keepdims=True)
        examples = self.examples()
        scored = np.array(scores(self.scorer, examples))
        ended = np.array([tokens.response[-1] == self.reference.eos for tokens in examples])
        self.reward = np.where(ended, scored, self.unfinished_reward).reshape(self.ref.shape)

    def start(self) -> Policy:
        """A policy to be trained: a copy of the reference."""
        return copy.deepcopy(self.reference).requires_grad_(True)

    def examples(self, suffix: tuple[int, ...] = ()) -> list[Tokens]:
        """Every response to every prompt, `suffix` between the two; prompt by prompt."""
        return [Tokens([*ids, *suffix], response) for ids in self.prompts.ids for response in self.responses]

    def distribution(self, policy: Policy, suffix: tuple[int, ...] = ()) -> np.ndarray:
        """Probabilities of every response under a policy, (P, R) float64."""
        logp = log_likelihoods(policy, self.examples(suffix))
        return np.exp(np.array(logp, dtype=np.float64)).reshape(len(self.prompts.ids), len(self.responses))

    def optimum(self, beta: float) -> np.ndarray:
        return laws.gibbs(self.ref, self.reward, beta)[0]


class Asked(nn.Module):
    """One-hot state of each position of a text: which prompt was asked, behind which control token, and what was said.

    Of a text `<bos> prompt [control] outcome <eos>`: before the outcome the state is (prompt, control); `said` tells
    whether the outcome is told apart (for a reward) or forgotten (for a policy, which has nothing left to choose).
    """

    def __init__(self, size: Size, tokenizer, said: bool):
        super().__init__()
        self.prompts, self.outcomes, self.said = size.prompts, size.outcomes, said
        self.first_prompt = tokenizer.convert_tokens_to_ids("p0")
        self.first_outcome = tokenizer.convert_tokens_to_ids("y0")
        self.first_control = tokenizer.convert_tokens_to_ids(CONTROLS[0])
        self.before = size.prompts * (1 + len(CONTROLS))
        self.width = self.before + (size.prompts * size.outcomes if said else 1)

    def forward(self, input_ids: Tensor, **_) -> SimpleNamespace:
        def seen(first: int, count: int) -> Tensor:
            """Number within its kind of the last token of a kind so far; -1 before there is one."""
            number = input_ids - first
            return torch.where((number >= 0) & (number < count), number, -1).cummax(-1).values

        prompt = seen(self.first_prompt, self.prompts).clamp_min(0)
        outcome = seen(self.first_outcome, self.outcomes)
        asked = prompt * (1 + len(CONTROLS)) + seen(self.first_control, len(CONTROLS)) + 1
        told = self.before + (prompt * self.outcomes + outcome if self.said else 0)
        state = torch.where(outcome >= 0, told, asked)
        return SimpleNamespace(last_hidden_state=F.one_hot(state, self.width).float())


class OneLogitEach(nn.Module):
    """Logits of a one-hot state: one parameter for each outcome at each prompt; after an outcome, EOS for certain."""

    def __init__(self, states: int, outcomes: int, first_outcome: int, eos: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(states, outcomes))
        self.first_outcome, self.eos = first_outcome, eos

    def forward(self, hidden: Tensor) -> Tensor:
        told = hidden[..., -1:]
        logits = hidden.new_full((*hidden.shape[:-1], self.first_outcome + self.weight.shape[1]), NEVER)
        logits[..., self.first_outcome :] = hidden[..., :-1] @ self.weight + NEVER * told
        logits[..., self.eos] = NEVER * (1 - told[..., 0])
        return logits


class TabularModel(nn.Module):
    """A softmax over outcomes, in the shape of a causal language model."""

    def __init__(self, size: Size, tokenizer):
        super().__init__()
        from transformers import LlamaConfig

        self.base_model = Asked(size, tokenizer, said=False)
        self.outcomes = OneLogitEach(
            self.base_model.before, size.outcomes, self.base_model.first_outcome, tokenizer.eos_token_id
        )
        self.config = LlamaConfig(
            vocab_size=self.base_model.first_outcome + size.outcomes,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=16,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.outcomes

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_) -> SimpleNamespace:
        hidden = self.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.outcomes(hidden[:, -logits_to_keep:]))


class TabularReward(nn.Module):
    """A reward for each prompt and outcome, in the shape of a sequence classifier with one label."""

    def __init__(self, size: Size, tokenizer, rewards: Tensor):
        super().__init__()
        from transformers import LlamaConfig

        self.base_model = Asked(size, tokenizer, said=True)
        self.score = nn.Linear(self.base_model.width, 1, bias=False)
        with torch.no_grad():
            self.score.weight.zero_()
            self.score.weight[0, self.base_model.before :] = rewards.flatten()
        self.config = LlamaConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=tokenizer.pad_token_id
        )
        self.config.reward_shift, self.config.reward_scale = 0.0, 1.0


def tabular(size: Size, seed: int) -> Problem:
    """Problem 1: random reference and rewards, both of unit spread."""
    words = [*CONTROLS, *(f"p{i}" for i in range(size.prompts)), *(f"y{i}" for i in range(size.outcomes))]
    tokenizer = word_tokenizer(words)
    rng = np.random.default_rng(seed)
    model = TabularModel(size, tokenizer)
    logits = torch.from_numpy(rng.normal(size=(size.prompts, 1, size.outcomes))).float()
    with torch.no_grad():  # the reference says the same whatever the control token
        model.outcomes.weight.copy_(logits.expand(-1, 1 + len(CONTROLS), -1).flatten(0, 1))
    rewards = torch.from_numpy(rng.normal(size=(size.prompts, size.outcomes))).float()
    scorer = Scorer(TabularReward(size, tokenizer, rewards))
    known = tokenizer.convert_tokens_to_ids
    return Problem(
        "tabular",
        Policy(model, temperature=1.0).to(device()),
        tokenizer,
        scorer.to(device()),
        _named("tabular", [[tokenizer.bos_token_id, known(f"p{i}")] for i in range(size.prompts)]),
        [[known(f"y{i}"), tokenizer.eos_token_id] for i in range(size.outcomes)],
        unfinished_reward=0.0,  # every response ends
    )


def transformer(seed: int) -> Problem:
    """Problem 2: a one-layer Llama that says at most two tokens of six; a reward model of the same shape.

    Responses end at once, end second, or never end: 1 + 5 * 6 of them.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = word_tokenizer(["a", "b"])
    torch.manual_seed(seed)
    shape = {"width": 32, "heads": 2, "feed_forward": 48}
    model = from_scratch(Scratch(layers=1, context=16, bpe_vocabulary=300, **shape), tokenizer)
    model.generation_config.suppress_tokens = None  # all six tokens are said: outcomes are counted over the vocabulary
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5)  # far from uniform
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    settings.reward_shift, settings.reward_scale = 0.0, 2.0
    scorer = Scorer(LlamaForSequenceClassification(settings).eval())
    scorer.model.config.pad_token_id = tokenizer.pad_token_id  # after the weights: PAD is a token like others here
    eos, vocabulary = tokenizer.eos_token_id, range(len(tokenizer))
    return Problem(
        "transformer",
        Policy(model, temperature=1.0).to(device()),
        tokenizer,
        scorer.to(device()),
        _named("transformer", [[tokenizer.bos_token_id, 4], [tokenizer.bos_token_id, 5, 4]]),
        [[eos], *([a, b] for a, b in itertools.product(vocabulary, vocabulary) if a != eos)],
        unfinished_reward=-1.0,
    )


def _named(problem: str, prompts: list[list[int]]) -> Prompts:
    return Prompts(prompts, [f"{problem}-{i}" for i in range(len(prompts))])
