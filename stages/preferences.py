"""Make preference pairs: two samples from the SFT policy, chosen by the simulated annotator; or the data set's own pairs."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import tracking


def main(
    sft: Annotated[Path, typer.Option(help="Policy to sample from.")],
    prompts: Annotated[Path, typer.Option(help="Prompts; those of train and validation are used.")],
    dataset_pairs: Annotated[Path, typer.Option(help="Pairs that the data set brought.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the pairs go.")],
    metrics: Annotated[Path, typer.Option(help="What the pairs are like.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Write `pairs`: of train (to learn from) and of validation (to measure the reward model on)."""
    with tracking.stage("preferences", [sft, prompts], run_file) as run:
        from rlhf_vs_dpo import gold, schemas
        from rlhf_vs_dpo.errors import DataError

        settings = run.section("preferences")
        if settings.source == "dataset":
            pairs = schemas.read_table(dataset_pairs, "dataset_pairs")
            if not len(pairs):
                raise DataError(
                    f"{dataset_pairs}: the source brought no pairs; set `preferences.source: annotator` in params.yaml"
                )
            pairs = pairs[pairs["split"] != "test"].reset_index(drop=True)
            summary = {}
        else:
            judge = gold.load(world)
            if judge is None:
                raise DataError(
                    "the source has no gold reward for the annotator to choose by; set `preferences.source: dataset` in params.yaml"
                )
            pairs, summary = annotated(run, settings, sft, prompts, judge)
        for split in ("train", "validation"):
            if not (pairs["split"] == split).any():
                raise DataError(
                    f"{out}: no pair has split {split!r}; give the source more prompts (`data` in params.yaml)"
                )
        schemas.write_table(pairs, "pairs", out)
        run.finish(
            {"pairs": {split: int((pairs["split"] == split).sum()) for split in ("train", "validation")}} | summary,
            metrics,
        )


def annotated(run, settings, sft: Path, prompts: Path, judge):
    """(pairs, what they are like) from two samples per prompt."""
    import numpy as np
    import pandas as pd

    from rlhf_vs_dpo import annotator, gold, models, schemas, text
    from rlhf_vs_dpo.generation import decode, generate

    rows = pd.concat([schemas.read_table(prompts, "prompts", "train").head(settings.train_prompts),
                      schemas.read_table(prompts, "prompts", "validation").head(settings.validation_prompts)], ignore_index=True)  # fmt: skip
    model, tokenizer = models.load_policy(sft)
    both = pd.concat([rows.assign(sample=0), rows.assign(sample=1)], ignore_index=True)
    encoded = text.encode_prompts(tokenizer, list(both["prompt"]))
    drawn = generate(
        model,
        tokenizer,
        encoded,
        list(both["prompt_id"]),
        list(both["sample"]),
        run.section("sampling"),
        run.seed,
        "two samples per prompt",
    )
    run.spent(tokens_generated=sum(len(tokens.response) for tokens in drawn.tokens))
    both["response"] = decode(tokenizer, drawn.tokens)
    both["tokens"] = [len(tokens.response) for tokens in drawn.tokens]
    both["finished"] = drawn.finished
    scored = both.join(gold.columns(judge, both["prompt"], both["facts"], both["response"]))
    scored["utility"] = annotator.utility(
        scored["gold"].to_numpy(), scored["tokens"].to_numpy(), scored["filler"].to_numpy(), settings.annotator
    )
    a, b = scored.iloc[: len(rows)].reset_index(drop=True), scored.iloc[len(rows) :].reset_index(drop=True)
    choice = annotator.choose(
        a["utility"].to_numpy(), b["utility"].to_numpy(), settings.annotator, np.random.default_rng(run.seed)
    )
    first = pd.Series(choice.first)
    chosen, rejected = a.where(first, b), b.where(first, a)
    # Nothing can be learned from a pair of equal responses; and one that never ended, or says nothing, is no response.
    usable = (a["response"] != b["response"]) & a["finished"] & b["finished"]
    usable &= a["response"].str.strip().ne("") & b["response"].str.strip().ne("")
    pairs = pd.DataFrame(
        {
            "pair_id": "pair-" + rows["prompt_id"],
            "prompt_id": rows["prompt_id"],
            "split": rows["split"],
            "prompt": rows["prompt"],
            "chosen": chosen["response"],
            "rejected": rejected["response"],
            "annotator": "simulated",
            "p_chosen": choice.p_chosen,
        }
    )
    differ = usable & (a["gold"] != b["gold"])
    summary = {
        "dropped_share": float(1 - usable.mean()),
        "annotator_agrees_with_gold": float((chosen["gold"] > rejected["gold"])[differ].mean()),
        "annotator_mean_p_chosen": float(choice.p_chosen[usable].mean()),
    }
    for name in ("gold", "tokens", "filler"):
        summary[name] = {
            "chosen": float(chosen[name][usable].astype(float).mean()),
            "rejected": float(rejected[name][usable].astype(float).mean()),
        }
    return pairs[usable].reset_index(drop=True), summary


if __name__ == "__main__":
    typer.run(main)
