"""Optimise the SFT policy directly on preference pairs: DPO, cDPO, IPO, LN-DPO, SimPO; offline, or in rounds."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    method: Annotated[str, typer.Option(help="Entry of `preference` in params.yaml.")],
    seed: Annotated[int, typer.Option(help="Line that this cell belongs to: the seed of all that is random here.")],
    sft: Annotated[Path, typer.Option(help="Policy to start from.")],
    pairs: Annotated[Path, typer.Option(help="Preference pairs.")],
    reference: Annotated[Path, typer.Option(help="log pi_ref of the pairs; opened only by losses that need it.")],
    prompts: Annotated[Path, typer.Option(help="Prompts of validation, to watch.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward, to watch.")],
    out: Annotated[Path, typer.Option(help="Where the policy goes.")],
    heldout: Annotated[Path, typer.Option(help="Samples taken while training.")],
    pair_rewards: Annotated[Path, typer.Option(help="Implicit rewards of the pairs of validation.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """One loop, one loss each; no reward model is part of it, and no sampling where there is one round."""
    launch.on_all_devices()
    tags = {"family": "preference", "method": method, "seed": str(seed), "policy": f"{method}-{seed}"}
    others = [reference, world]
    with frame.stage(f"preference@{method}-{seed}", [sft, pairs, prompts], run_file, others, **tags) as run:
        import numpy as np
        import pandas as pd
        import torch

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.errors import TrainingError
        from rlhf_vs_dpo.language import forward, models, text
        from rlhf_vs_dpo.language.logprobs import Policy
        from rlhf_vs_dpo.preferences import gold, labelling
        from rlhf_vs_dpo.run.checkpoint import Values
        from rlhf_vs_dpo.run.progress import Record
        from rlhf_vs_dpo.training import preference, supervised
        from rlhf_vs_dpo.training.monitor import HeldOut
        from rlhf_vs_dpo.training.optimise import round_seed

        settings, sampling = run.section("preference", method), run.section("sampling")
        torch.manual_seed(seed)
        adapter = run.section("adapter")
        model, tokenizer = models.load_learner(sft, adapter, run.section("memory"))
        start = models.start_of(model, sft)  # to measure KL at the watched points, and for pairs of later rounds
        policy, frozen = Policy(model, sampling.temperature), Policy(start, sampling.temperature)
        whole = tables.read_table(pairs, "pairs")
        asked, judge = tables.read_table(prompts, "prompts"), gold.load(world)
        stored = None
        if preference.NEEDS_REFERENCE[settings.loss]:
            stored = preference.stored_reference(whole, tables.read_table(reference, "reference"), reference)
            run.reads(reference)

        learning = whole.index[whole["split"] == "train"].to_numpy()
        if settings.rounds > 1:  # each round has a share of the prompts; a draw, for the table may be in some order
            learning = np.random.default_rng(seed).permutation(learning)
        parts = np.array_split(learning, settings.rounds)
        steps = [supervised.steps_over(settings, len(part)) for part in parts]
        watched = HeldOut(
            asked[asked["split"] == "validation"], judge, frozen, tokenizer,
            run.section("monitor"), sampling.max_new_tokens, seed, sum(steps),
        )  # fmt: skip
        at = Values(
            round=0, rows=None, known=None, trained=0, generated=0, read=0, taken=0
        )  # rounds before; this one's pairs
        run.checkpoint.keep(policy=policy, watched=watched, rounds=at)
        for number, part in list(enumerate(parts))[at.round :]:
            rows = whole.loc[part].reset_index(drop=True)
            known = None if stored is None else stored.loc[part].reset_index(drop=True)
            if number > at.round:  # online: pairs of the policy as it is now, on prompts that no round has had yet
                drawn = labelling.two_samples(
                    policy, tokenizer, asked[asked["prompt_id"].isin(rows["prompt_id"])], sampling.max_new_tokens,
                    round_seed(seed, number), f"pairs of round {number + 1}",
                )  # fmt: skip
                chooses = run.section("preferences").annotator
                at.rows, _ = labelling.label(drawn.table, judge, chooses, round_seed(seed, number))
                at.round, at.known = number, None
                at.generated += drawn.tokens_generated
                at.read += drawn.tokens_read
                if len(at.rows) < settings.batch:
                    raise TrainingError(
                        f"round {number + 1}: only {len(at.rows)} of {len(part)} prompts gave a pair, fewer than `batch` "
                        f"({settings.batch}): the policy says the same twice, or never ends. Fewer `rounds`, a lower "
                        "`learning_rate` or a higher beta keep it closer to the SFT policy"
                    )
            learned = text.encode_pairs(tokenizer, rows if number == 0 else at.rows, policy.context)
            if number > 0 and known is not None:
                if at.known is None:
                    at.known = pd.DataFrame(
                        {
                            "chosen_logp": forward.log_likelihoods(frozen, learned.chosen),
                            "rejected_logp": forward.log_likelihoods(frozen, learned.rejected),
                        }
                    )
                    at.read += forward.tokens_read(learned.chosen) + forward.tokens_read(learned.rejected)
                known = at.known
            record = Record(run.log, method, watched, run.checkpoint, at.taken)
            at.trained += preference.train(policy, learned, known, settings, steps[number], seed, record)
            at.taken += steps[number]
        run.spent(
            parameters=models.size(policy.model), frozen=models.frozen(policy.model), tokens_trained=at.trained, tokens_generated=at.generated, tokens_read=at.read,
            models_held=1 + (stored is not None and settings.rounds > 1),  # stored log-probabilities need no model
        )  # fmt: skip
        if launch.is_main():
            held = whole.index[whole["split"] == "validation"]
            known = None if stored is None else stored.loc[held]
            measured = text.encode_pairs(tokenizer, whole.loc[held], policy.context)
            judged = preference.implicit_rewards(policy, measured, known, settings)
            table = whole.loc[held, ["pair_id", "prompt_id"]].reset_index(drop=True).join(judged)
            tables.write_table(table, "pair_rewards", pair_rewards)
            models.save(policy.model, tokenizer, out, sft, merge=adapter is not None and adapter.merge)
            tables.write_table(watched.table(), "heldout", heldout)
            run.curve(curves)
            accuracy = float((table["chosen"] > table["rejected"]).mean())
            run.finish(
                run.rows[-1] | watched.final() | {"heldout/pair_accuracy": accuracy}, metrics, int(run.rows[-1]["step"])
            )


if __name__ == "__main__":
    launch.command(main)
