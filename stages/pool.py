"""Sample the SFT policy many times for each prompt, and score what it says: best-of-n and its imitations draw on it."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch

CHUNK = 8192  # responses held in memory at once
ROWS = 1024  # generated together: many have the same prompt


def main(
    seed: Annotated[int, typer.Option(help="Line that this is of: the seed of all that is random here.")],
    sft: Annotated[Path, typer.Option(help="Policy to sample from.")],
    reward: Annotated[Path, typer.Option(help="Reward model.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: train to imitate, test to measure best-of-n on.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the pool goes.")],
    metrics: Annotated[Path, typer.Option(help="What the pool is like.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Write `pool`, part by part: what does not fit into memory need not."""
    with frame.stage(f"pool@{seed}", [sft, reward, prompts], run_file, [world], seed=str(seed)) as run:
        import numpy as np
        import pandas as pd

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import forward, heads, models, text
        from rlhf_vs_dpo.language.generation import decode, generate
        from rlhf_vs_dpo.language.logprobs import Policy
        from rlhf_vs_dpo.preferences import annotator, gold

        settings, sampling = run.section("pool"), run.section("sampling")
        preferences = run.section("preferences")
        train = tables.read_table(prompts, "prompts", "train").head(settings.train_prompts)
        validation = tables.read_table(prompts, "prompts", "validation").head(settings.validation_prompts)
        asked = tables.read_table(prompts, "prompts")
        test = asked[asked["split"] == "test"].head(
            settings.test_prompts
        )  # none, where they are to be kept out of sight
        deep = np.arange(len(test)) < settings.deep_prompts
        rows = pd.concat(
            [
                train.assign(samples=settings.train_samples),
                validation.assign(samples=settings.validation_samples),
                test.assign(samples=np.where(deep, settings.deep_samples, settings.test_samples)),
            ],
            ignore_index=True,
        )
        each = rows.loc[rows.index.repeat(rows["samples"])]
        each = each.assign(sample=each.groupby(level=0).cumcount()).reset_index(drop=True)
        model, tokenizer = models.load_policy(sft)
        policy = Policy(model, sampling.temperature)
        scorer, judge = heads.load_scorer(reward), gold.load(world)
        totals = {split: [0, 0, 0.0] for split in ("train", "validation", "test")}  # responses, tokens, how many ended
        read = {split: 0 for split in totals}

        def parts():
            for start in range(0, len(each), CHUNK):
                some = each.iloc[start : start + CHUNK].reset_index(drop=True)
                what = "pool" if len(each) <= CHUNK else f"pool, {start // CHUNK + 1} of {-(-len(each) // CHUNK)}"
                streams = [f"pool/{name}" for name in some["prompt_id"]]  # of its own: no sample is another table's
                asked = text.Prompts(text.encode_prompts(tokenizer, list(some["prompt"])), streams)
                responses, of_logp, of_reward = (
                    run.checkpoint.pieces(f"{name} from {start}") for name in ("responses", "logp", "reward")
                )
                drawn = generate(
                    policy, asked, list(some["sample"]), sampling.max_new_tokens, seed, what, ROWS, responses
                )
                logp = forward.log_likelihoods(policy, drawn.tokens, f"{what}: log pi", of_logp)
                table = some[["prompt_id", "split", "sample"]].assign(
                    response=decode(tokenizer, drawn.tokens),
                    response_ids=[tokens.response for tokens in drawn.tokens],
                    tokens=[len(tokens.response) for tokens in drawn.tokens],
                    finished=drawn.finished,
                    logp=logp,
                    reference_logp=logp,
                    reward=forward.scores(scorer, drawn.tokens, f"{what}: rewards", of_reward),
                )
                table["reward"] = table["reward"].where(table["finished"])
                for split, group in table.groupby("split"):
                    scored = [drawn.tokens[i] for i in group.index]
                    read[split] += forward.tokens_read(scored) + sum(len(p) for p in {tuple(t.prompt) for t in scored})
                    totals[split][0] += len(group)
                    totals[split][1] += int(group["tokens"].sum())
                    totals[split][2] += float(group["finished"].sum())
                table = table.join(gold.columns(judge, some["prompt"], some["facts"], table["response"]))
                yield table.assign(utility=annotator.column(table, preferences))

        tables.write_stream(parts(), "pool", out)
        run.spent(
            parameters=models.size(model), tokens_generated=sum(entry[1] for entry in totals.values()),
            tokens_read=sum(read.values()), models_held=2,
        )  # fmt: skip
        run.finish(
            {
                split: {"responses": count, "tokens": tokens, "tokens_read": read[split], "finished": ended / count}
                for split, (count, tokens, ended) in totals.items()
                if count
            },
            metrics,
        )


if __name__ == "__main__":
    launch.command(main)
