"""Optimise the SFT policy against the reward model: REINFORCE, RLOO, TRPO, PPO, PPO-ptx."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import alarms, frame, launch


def main(
    method: Annotated[str, typer.Option(help="Entry of `rl` in params.yaml.")],
    seed: Annotated[int, typer.Option(help="Line that this cell belongs to: the seed of all that is random here.")],
    sft: Annotated[Path, typer.Option(help="Policy to start from, and to stay close to.")],
    reward: Annotated[Path, typer.Option(help="Reward model.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: train to learn on, validation to watch.")],
    demonstrations: Annotated[
        Path, typer.Option(help="Demonstrations, which the reward model must score 0 on average.")
    ],
    corpus: Annotated[Path, typer.Option(help="Pretraining text, for PPO-ptx.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward, to watch.")],
    out: Annotated[Path, typer.Option(help="Where the policy goes.")],
    heldout: Annotated[Path, typer.Option(help="Samples taken while training.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Reinforcement learning with a KL penalty towards the SFT policy."""
    launch.on_all_devices()
    tags = {"family": "rl", "method": method, "seed": str(seed), "policy": f"{method}-{seed}"}
    inputs, others = [sft, reward, prompts, demonstrations], [corpus, world]
    with frame.stage(f"rl@{method}-{seed}", inputs, run_file, others, **tags) as run:
        import torch

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import heads, models, text
        from rlhf_vs_dpo.language.logprobs import Policy
        from rlhf_vs_dpo.preferences import gold
        from rlhf_vs_dpo.run.progress import Record
        from rlhf_vs_dpo.training import invariants, policy_gradient
        from rlhf_vs_dpo.training.learner import Networks
        from rlhf_vs_dpo.training.monitor import HeldOut

        settings, sampling = run.section("rl", method), run.section("sampling")
        torch.manual_seed(seed)
        adapter = run.section("adapter")
        half = settings.algorithm != "trpo"  # which needs float32 throughout
        model, tokenizer = models.load_learner(sft, adapter, run.section("memory"), half)
        start = models.start_of(model, sft)
        policy, reference = Policy(model, sampling.temperature), Policy(start, sampling.temperature)
        train = tables.read_table(prompts, "prompts", "train")
        documents = []
        if getattr(settings, "ptx_coefficient", 0.0) > 0:
            documents = tables.read_table(corpus, "corpus", "train")["text"]
            run.reads(corpus)
        watched = HeldOut(
            tables.read_table(prompts, "prompts", "validation"), gold.load(world), reference, tokenizer,
            run.section("monitor"), sampling.max_new_tokens, seed, settings.iterations,
        )  # fmt: skip
        scorer = heads.load_scorer(reward, beside=None if adapter is None else start)
        shown = tables.read_table(demonstrations, "demonstrations", "train")
        shown = shown.iloc[:: max(1, -(-len(shown) // 512))]  # of the whole table, for it may be in some order
        invariants.check_normalised(
            scorer,
            text.encode(tokenizer, shown["prompt"], shown["response"], shown["prompt_id"], policy.context),
        )
        heard = alarms.Listening(run.log, run.warn, settings.iterations)
        run.checkpoint.keep(policy=policy, watched=watched, alarms=heard)
        totals = policy_gradient.train(
            Networks(policy, reference, scorer), text.prompts_of(tokenizer, train),
            text.documents(tokenizer, documents, policy.context, run.params["data"]["max_document_tokens"]), settings, sampling.max_new_tokens, seed,
            Record(heard, method, watched, run.checkpoint),
        )  # fmt: skip
        # Policy, reference, reward model, value network; TRPO holds the old policy, too.
        held = 3 + policy_gradient.ATTEMPTS[settings.algorithm].critic + (settings.algorithm == "trpo")
        run.spent(
            parameters=models.size(policy.model),
            frozen=models.frozen(policy.model),
            models_held=held,
            **totals._asdict(),
        )
        if launch.is_main():
            models.save(policy.model, tokenizer, out, sft, merge=adapter is not None and adapter.merge)
            tables.write_table(watched.table(), "heldout", heldout)
            run.curve(curves)
            run.finish(run.rows[-1] | watched.final(), metrics, settings.iterations)


if __name__ == "__main__":
    launch.command(main)
