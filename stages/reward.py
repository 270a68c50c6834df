"""Train the reward model on preference pairs, and normalise it."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    seed: Annotated[int, typer.Option(help="Line that this is of: the seed of all that is random here.")],
    sft: Annotated[Path, typer.Option(help="Policy whose body the reward model starts from.")],
    pairs: Annotated[Path, typer.Option(help="Preference pairs.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, for the facts that a gold reward needs.")],
    demonstrations: Annotated[Path, typer.Option(help="Responses that score 0 on average after normalisation.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the reward model goes.")],
    demonstration_scores: Annotated[Path, typer.Option(help="Where the scores of held-out demonstrations go.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Bradley-Terry on a scalar head read at EOS; then a shift so that demonstrations score 0 on average."""
    launch.on_all_devices()
    with frame.stage(f"reward@{seed}", [sft, pairs, demonstrations], run_file, [prompts, world], seed=str(seed)) as run:
        import numpy as np
        import torch

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import forward, heads, models, text
        from rlhf_vs_dpo.preferences import gold
        from rlhf_vs_dpo.run.progress import Record
        from rlhf_vs_dpo.training import reward as training

        settings, adapter = run.section("reward"), run.section("adapter")
        torch.manual_seed(seed)
        scorer, tokenizer = heads.scorer_from_policy(sft, adapter, run.section("memory"))
        train, held = (tables.read_table(pairs, "pairs", split) for split in ("train", "validation"))
        demos = tables.read_table(demonstrations, "demonstrations")
        demo_tokens = text.encode(tokenizer, demos["prompt"], demos["response"], demos["prompt_id"], scorer.context)
        learned = text.encode_pairs(tokenizer, train, scorer.context)
        run.checkpoint.keep(scorer=scorer)
        record = Record(run.log, "reward", checkpoint=run.checkpoint)
        trained = training.train(scorer, learned, settings.training, seed, record)
        responses = learned.chosen + learned.rejected
        read = forward.tokens_read(demo_tokens) + forward.tokens_read(responses)  # to normalise; for the range
        run.spent(
            parameters=models.size(scorer.model),
            frozen=models.frozen(scorer.model),
            tokens_trained=trained,
            tokens_read=read,
            models_held=1,
        )
        if not launch.is_main():
            return
        raw = np.array(forward.scores(scorer, demo_tokens, "demonstrations"))
        normalising = raw[(demos["split"] == "train").to_numpy()]
        scorer.model.config.reward_shift = float(normalising.mean())
        scorer.model.config.reward_scale = float(normalising.std()) if settings.unit_scale else 1.0
        seen = forward.scores(scorer, responses, "range of scores on pairs")
        scorer.model.config.reward_range = [min(seen), max(seen)]  # beyond it, the model extrapolates
        judged = text.encode_pairs(tokenizer, held, scorer.context)
        scored = held.assign(
            chosen_reward=forward.scores(scorer, judged.chosen),
            rejected_reward=forward.scores(scorer, judged.rejected),
            chosen_tokens=[len(tokens.response) for tokens in judged.chosen],
            rejected_tokens=[len(tokens.response) for tokens in judged.rejected],
        )
        facts = held.merge(tables.read_table(prompts, "prompts")[["prompt_id", "facts"]], on="prompt_id", how="left")[
            "facts"
        ]
        judge = gold.load(world)
        for side in ("chosen", "rejected"):
            scored[f"{side}_gold"] = gold.columns(judge, held["prompt"], facts, held[side])["gold"]
        report = training.quality(scored, scorer.model.config.reward_scale) | {
            "reward_shift": scorer.model.config.reward_shift,
            "reward_scale": scorer.model.config.reward_scale,
            "demonstration_std": float(normalising.std()),
            "range_on_training_pairs": {"low": min(seen), "high": max(seen)},
        }
        scores = (raw - scorer.model.config.reward_shift) / scorer.model.config.reward_scale
        table = demos[["prompt_id", "split", "response"]].assign(reward=scores)[demos["split"] != "train"]
        tables.write_table(table.reset_index(drop=True), "demonstration_scores", demonstration_scores)
        models.save(scorer.model, tokenizer, out, sft, merge=adapter is not None and adapter.merge)
        run.curve(curves)
        run.finish(report, metrics, settings.training.steps)


if __name__ == "__main__":
    launch.command(main)
