"""Small real things that the tests share: a tokenizer, a model, tables."""

import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
from rlhf_vs_dpo.run import arithmetic  # noqa: E402

# As in every stage, and before torch and numpy are imported: what a test computes here is what a stage computes.
os.environ.update(arithmetic.fixed_environment({}))
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # some tests import MLflow before the project does
os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # several processes talk to one another here alone
arithmetic.take_avx2()

import pytest  # noqa: E402
import torch  # noqa: E402

WORDS = ["the", "a", "dog", "cat", "sat", "ran", "on", "mat", "rug", "and", ",", ".", "tl;dr", ":"]


LONGEST = [
    "test_pipeline.py",
    "test_own_preferences.py",
    "test_side_by_side.py",
    "test_cells.py",
    "test_tune.py",
    "test_browser.py",
    "test_questions.py",
]


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: many tests wait for processes that wait themselves."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


def pytest_collection_modifyitems(items):
    """Files that take minutes first: begun last, one of them would keep everything waiting."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def tokenizer():
    """A new one for each test: a test that adds tokens to it changes no other."""
    from rlhf_vs_dpo.language.text import word_tokenizer

    return word_tokenizer(WORDS)


def small_model(tokenizer, seed: int = 0, scale: float = 3.0):
    """A one-layer Llama whose weights are large enough for its distribution to be far from uniform."""
    from rlhf_vs_dpo.config import Scratch
    from rlhf_vs_dpo.language.models import from_scratch

    torch.manual_seed(seed)
    model = from_scratch(
        Scratch(layers=1, width=32, heads=2, feed_forward=48, context=64, bpe_vocabulary=300), tokenizer
    )
    model.generation_config.suppress_tokens = (
        None  # every token may be said, so that plain logits are what to compare with
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def gpt2(tokenizer, layers: int = 2):
    """A GPT-2: no Llama, its matrices held the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf_vs_dpo.language.models import quiet

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    named = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return quiet(GPT2LMHeadModel(GPT2Config(**shape, **named)))


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer)


@pytest.fixture
def examples(tokenizer):
    """Twelve examples of very different lengths."""
    from rlhf_vs_dpo.language.text import Tokens

    rng = random.Random(0)
    ids = range(4, len(tokenizer))
    return [
        Tokens(
            [tokenizer.bos_token_id, *rng.choices(ids, k=rng.randint(1, 9))],
            [*rng.choices(ids, k=rng.randint(1, 12)), tokenizer.eos_token_id],
        )
        for _ in range(12)
    ]


# What the study may set anew in the default profile: tests of methods use these, whatever it found.
BEFORE_ANY_STUDY = {
    "trpo": {"max_kl": 0.02, "damping": 0.1}, "ppo_ptx": {"ptx_coefficient": 0.5},
    "dpo": {"beta": 0.1}, "cdpo": {"beta": 0.1, "label_smoothing": 0.1}, "ipo": {"tau": 0.1}, "ln_dpo": {"beta": 2.0},
    "simpo": {"beta": 2.0, "gamma": 0.5}, "dpo_online": {"beta": 0.1}, "rm_filtered": {"share": 0.25},
}  # fmt: skip


def untuned() -> dict:
    """The default parameters with the settings of methods as they were before any study; all else is the family's defaults."""
    from rlhf_vs_dpo import config

    params = config.read_params(ROOT / "profiles" / "default.yaml")
    for method, space in params["tuning"]["spaces"].items():
        entry = params[config.family_of(params, method)][method]
        for key in space:
            entry.pop(key, None)
        entry |= BEFORE_ANY_STUDY.get(method, {})
    return params
