"""Fine-tune the SFT policy on texts that were liked: chosen responses, control tokens, RM-filtered samples, best of n."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    method: Annotated[str, typer.Option(help="Entry of `imitation` in params.yaml.")],
    seed: Annotated[int, typer.Option(help="Line that this cell belongs to: the seed of all that is random here.")],
    sft: Annotated[Path, typer.Option(help="Policy to start from.")],
    pairs: Annotated[Path, typer.Option(help="Preference pairs; opened only by recipes that imitate them.")],
    pool: Annotated[Path, typer.Option(help="Scored samples; opened only by recipes that imitate them.")],
    reward: Annotated[Path, typer.Option(help="Reward model; opened only for a second round.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: train to learn on, validation to watch.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward, to watch.")],
    out: Annotated[Path, typer.Option(help="Where the policy goes.")],
    heldout: Annotated[Path, typer.Option(help="Samples taken while training.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Maximum likelihood of what a recipe keeps, once or in several rounds of sampling and keeping."""
    launch.on_all_devices()
    tags = {"family": "imitation", "method": method, "seed": str(seed), "policy": f"{method}-{seed}"}
    others = [pairs, pool, reward, world]
    with frame.stage(f"imitation@{method}-{seed}", [sft, prompts], run_file, others, **tags) as run:
        import torch

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.errors import TrainingError
        from rlhf_vs_dpo.language import heads, models, text
        from rlhf_vs_dpo.language.logprobs import Policy
        from rlhf_vs_dpo.preferences import gold
        from rlhf_vs_dpo.run.checkpoint import Values
        from rlhf_vs_dpo.run.progress import Record
        from rlhf_vs_dpo.training import imitation, supervised
        from rlhf_vs_dpo.training.monitor import HeldOut
        from rlhf_vs_dpo.training.optimise import round_seed

        settings, sampling = run.section("imitation", method), run.section("sampling")
        torch.manual_seed(seed)
        adapter = run.section("adapter")
        model, tokenizer = models.load_learner(sft, adapter, run.section("memory"))
        told = settings.recipe == "control_tokens"
        # To measure KL at the watched points; training never sees it. New tokens would change a reference that shares its embeddings.
        start = models.load_policy(sft)[0] if told else models.start_of(model, sft)
        if told:
            models.add_control_tokens(model, tokenizer, [imitation.GOOD, imitation.BAD], settings.weight_decay)
        policy, frozen = Policy(model, sampling.temperature), Policy(start, sampling.temperature)
        known, samples = text.Prompts([], []), 0
        if imitation.NEEDS[settings.recipe] == "pairs":
            learned = tables.read_table(pairs, "pairs", "train")
            run.reads(pairs)
            examples = imitation.from_pairs(settings.recipe, learned, tokenizer, policy.context)
        else:
            drawn = tables.read_table(pool, "pool", "train")
            run.reads(pool, *([reward] if settings.rounds > 1 else []))
            asked = tables.read_table(prompts, "prompts", "train")
            known = text.prompts_of(tokenizer, asked[asked["prompt_id"].isin(drawn["prompt_id"])])
            samples = int(drawn["sample"].max()) + 1
            examples = imitation.from_pool(settings, drawn, known)
        planned = settings.rounds * supervised.steps_over(settings, len(examples.tokens))
        watched = HeldOut(
            tables.read_table(prompts, "prompts", "validation"), gold.load(world), frozen, tokenizer,
            run.section("monitor"), sampling.max_new_tokens, seed, planned,
        )  # fmt: skip
        at = Values(round=0, drawn=None, trained=0, generated=0, read=0, taken=0)  # rounds before, and this one's pool
        run.checkpoint.keep(policy=policy, watched=watched, rounds=at)
        for number in range(at.round, settings.rounds):
            if number > 0:
                if number > at.round:
                    at.round = number
                    at.drawn, sampled, prompted = imitation.draw_pool(
                        policy,
                        heads.load_scorer(reward),
                        known,
                        samples,
                        sampling.max_new_tokens,
                        round_seed(seed, number),
                    )
                    at.generated, at.read = at.generated + sampled, at.read + prompted
                examples = imitation.from_pool(settings, at.drawn, known)
                if len(examples.tokens) < settings.batch:
                    raise TrainingError(
                        f"round {number + 1}: the policy's samples left {len(examples.tokens)} examples, fewer than "
                        f"`batch` ({settings.batch}): most never end. Fewer `rounds`, or a lower `learning_rate`"
                    )
            last = number + 1 == settings.rounds
            steps = planned - at.taken if last else planned // settings.rounds
            at.trained += supervised.likelihood(
                policy, examples, supervised.as_training(settings, steps), seed,
                Record(run.log, method, watched, run.checkpoint, at.taken),
            )  # fmt: skip
            at.taken += steps
        run.spent(
            parameters=models.size(policy.model), frozen=models.frozen(policy.model), tokens_trained=at.trained, tokens_generated=at.generated, tokens_read=at.read,
            models_held=1 + (settings.rounds > 1),
        )  # fmt: skip
        if launch.is_main():
            # With other embeddings than those of the SFT policy it is saved whole.
            models.save(policy.model, tokenizer, out, sft, merge=told or (adapter is not None and adapter.merge))
            tables.write_table(watched.table(), "heldout", heldout)
            run.curve(curves)
            run.finish(run.rows[-1] | watched.final() | {"examples": len(examples.tokens)}, metrics, at.taken)


if __name__ == "__main__":
    launch.command(main)
