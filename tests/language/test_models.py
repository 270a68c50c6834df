"""Model folders: what is loaded is whole, without dropout, and with a PAD of its own; what is saved is saved whole."""

import pytest
import torch
from conftest import ROOT, small_model

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language import heads, models
from rlhf_vs_dpo.language.text import bpe_tokenizer


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
