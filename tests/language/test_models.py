"""Model folders: what is loaded is whole, without dropout, and with a PAD of its own; what is saved is saved whole."""

import json

import pytest
import torch
from conftest import ROOT, small_model

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language import heads, models
from rlhf_vs_dpo.language.generation import generate
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, Tokens, bpe_tokenizer, collate


def base(**changes):
    settings = config.section(config.read_params(ROOT / "profiles" / "default.yaml"), "base")
    return settings.model_copy(update=changes)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    models.save(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_policy_comes_back(folder, model, tokenizer):
    loaded, words = models.load_policy(folder)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert words.decode(words("the cat sat .")["input_ids"]) == "the cat sat ."
    assert words.pad_token_id == tokenizer.pad_token_id and not loaded.training


def test_saving_twice_gives_the_same_bytes(tmp_path, model, tokenizer):
    for name in ("a", "b"):
        models.save(model, tokenizer, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_save_that_fails_leaves_nothing(tmp_path, model):
    class Broken:
        init_kwargs = ()

        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError):
        models.save(model, Broken(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_pretrained_from_a_local_folder(folder):
    model, tokenizer = models.pretrained(base(pretrained=str(folder)))
    assert model.config.hidden_size == 32 and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_pad_that_is_eos_is_replaced(tmp_path):
    tokenizer = bpe_tokenizer(["the cat sat"] * 5, 280)
    model = small_model(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    models.save(model, tokenizer, tmp_path / "model")
    loaded, given = models.pretrained(base(pretrained=str(tmp_path / "model")))
    assert given.pad_token_id != given.eos_token_id
    assert given.pad_token_id < loaded.get_input_embeddings().num_embeddings
    assert loaded.config.pad_token_id == given.pad_token_id and loaded.config.eos_token_id == given.eos_token_id


def test_a_new_pad_takes_no_probability_from_a_model_whose_logits_lie_far_below_zero(tmp_path):
    """As GPT-2's do. A random row of PAD would have a logit near 0, and all of the probability."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = bpe_tokenizer(["the cat sat on the mat"] * 5, 280)
    tokenizer.pad_token = tokenizer.eos_token
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    ).eval()
    with torch.no_grad():  # every logit is about -35
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight.sub_(35 / 32)
    models.save(model, tokenizer, tmp_path / "far")
    ids = torch.tensor([tokenizer("the cat sat on the mat")["input_ids"]])
    before = model(ids).logits
    assert before.mean() < -30

    loaded, given = models.pretrained(base(pretrained=str(tmp_path / "far")))
    rows = loaded.get_input_embeddings().weight
    assert torch.allclose(rows[given.pad_token_id], rows[: given.pad_token_id].mean(0), atol=1e-5)
    after = loaded(ids).logits.log_softmax(-1)
    assert after[..., given.pad_token_id].exp().max() < 0.05
    assert torch.allclose(after[..., : len(tokenizer)], before.log_softmax(-1), atol=0.05)


def test_pad_and_bos_are_never_said(folder, tokenizer, tmp_path):
    """By our sampling and log-probabilities, and by whoever generates from the folder."""
    from transformers import AutoModelForCausalLM

    scratch = models.from_scratch(base().scratch, tokenizer)
    silent = sorted([tokenizer.pad_token_id, tokenizer.bos_token_id])
    assert scratch.generation_config.suppress_tokens == silent
    loaded, given = models.pretrained(base(pretrained=str(folder)))
    assert loaded.generation_config.suppress_tokens == silent
    batch = collate([Tokens([given.bos_token_id, 5], [6, given.eos_token_id])], given.pad_token_id)
    said = Policy(loaded, 1.0).distributions(batch).exp()
    assert said[:, silent].max() < 1e-9 and torch.allclose(said.sum(-1), torch.ones(2))
    with torch.no_grad():  # even where the model wants nothing else
        loaded.get_output_embeddings().weight[silent] *= 100
    drawn = generate(
        Policy(loaded, 1.0), Prompts([[given.bos_token_id, 5]] * 50, [f"p{i}" for i in range(50)]), [0] * 50, 8, 0
    )
    assert not {token for tokens in drawn.tokens for token in tokens.response} & set(silent)
    models.sampled_at(loaded, 0.7)
    models.save(loaded, given, tmp_path / "policy")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    asked = torch.tensor([[given.bos_token_id, 5]])
    assert not {*theirs.generate(asked, max_new_tokens=20)[0, 2:].tolist()} & (set(silent) - {given.pad_token_id})


def test_a_bos_that_is_eos_may_be_said(tmp_path):
    tokenizer = bpe_tokenizer(["the cat sat"] * 5, 280)
    tokenizer.bos_token = tokenizer.eos_token
    models.save(small_model(tokenizer), tokenizer, tmp_path / "one")
    loaded, given = models.pretrained(base(pretrained=str(tmp_path / "one")))
    assert loaded.generation_config.suppress_tokens == [given.pad_token_id]


def test_a_folder_says_at_which_temperature_its_policy_is_sampled(tmp_path, model, tokenizer):
    from transformers import GenerationConfig

    models.sampled_at(model, 0.7)
    models.save(model, tokenizer, tmp_path / "policy")
    config_of = GenerationConfig.from_pretrained(tmp_path / "policy")
    assert (config_of.do_sample, config_of.temperature, config_of.top_p) == (True, 0.7, 1.0) and not config_of.top_k


def test_heads_are_float32_whatever_autocast_says(model, tokenizer):
    """bf16 would step by 1/8 between logits of 16 and 32."""
    batch = collate([Tokens([tokenizer.bos_token_id, 5, 6], [7, 8, tokenizer.eos_token_id])], tokenizer.pad_token_id)
    policy = Policy(model, 1.0)
    hidden = 20 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    exact = (hidden @ model.lm_head.weight.T).detach()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.lm_head(hidden).dtype == torch.bfloat16
        assert torch.equal(policy.project(hidden), exact) and exact.dtype == torch.float32
        assert policy.distributions(batch).dtype == torch.float32


def test_dropout_is_off_for_good():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    models.quiet(model)
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_reward_model_starts_from_the_policy_and_keeps_its_normalisation(folder, model, tmp_path):
    torch.manual_seed(0)
    scorer, tokenizer = heads.scorer_from_policy(folder)
    assert torch.equal(scorer.model.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert scorer.head.weight.shape == (1, 32)
    drawn = torch.cat([heads.scorer_from_policy(folder)[0].head.weight for _ in range(40)])
    assert drawn.std().item() == pytest.approx(33**-0.5, rel=0.1)
    scorer.model.config.reward_shift = 1.5
    models.save(scorer.model, tokenizer, tmp_path / "reward")
    assert heads.load_scorer(tmp_path / "reward").model.config.reward_shift == 1.5


def test_bytes_do_not_say_whether_somebody_was_offline(folder, tmp_path):
    model, tokenizer = models.load_policy(folder)
    for offline in (False, True):
        tokenizer.init_kwargs["local_files_only"] = offline  # as HF_HUB_OFFLINE=1 has it when a tokenizer is read
        models.save(model, tokenizer, tmp_path / str(offline))
    ours, theirs = ((tmp_path / str(of) / "tokenizer_config.json").read_text() for of in (False, True))
    assert ours == theirs


def test_folders_that_cannot_be_used_say_why(folder, tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        models.pretrained(base(pretrained="./nowhere"))
    with pytest.raises(ModelError, match=r"give `base.revision` a commit hash"):
        models.pretrained(base(pretrained="someone/model"))
    with pytest.raises(ModelError, match="reward_shift"):
        models.save(heads.scorer_from_policy(folder)[0].model, models.load_policy(folder)[1], tmp_path / "raw")
        config_path = tmp_path / "raw" / "config.json"
        config_path.write_text(config_path.read_text().replace('"reward_shift": 0.0,', ""))
        heads.load_scorer(tmp_path / "raw")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    with pytest.raises(ModelError, match="several GGUF files"):
        models.pretrained(base(pretrained=str(tmp_path / "two")))


def test_a_folder_that_lacks_a_weight_is_refused(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights missing.*up_proj"):
        models.load_policy(folder)


def test_how_a_pretrained_model_was_sampled_elsewhere_does_not_matter(tmp_path, model, tokenizer):
    """A temperature without `do_sample` is a folder that transformers would not save again; penalties would stay in force unseen."""
    from transformers import GenerationConfig

    models.save(model, tokenizer, tmp_path / "theirs")
    told = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    told |= {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.3}
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(told))
    loaded, given = models.pretrained(base(pretrained=str(tmp_path / "theirs")))
    models.save(loaded, given, tmp_path / "ours")
    saved = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert saved.temperature in (None, 1.0) and saved.top_p in (None, 1.0) and saved.repetition_penalty in (None, 1.0)
    assert saved.eos_token_id == given.eos_token_id and saved.suppress_tokens
