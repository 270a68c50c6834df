"""Compute log pi_ref of every pair, once, for all losses that need it."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    sft: Annotated[Path, typer.Option(help="The reference policy.")],
    pairs: Annotated[Path, typer.Option(help="Preference pairs.")],
    out: Annotated[Path, typer.Option(help="Where the log-probabilities go.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Write `reference`: log-probability and length of both responses of each pair."""
    with frame.stage(f"reference@{sft.name}", [sft, pairs], run_file) as run:
        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import forward, models, text
        from rlhf_vs_dpo.language.logprobs import Policy

        rows = tables.read_table(pairs, "pairs")
        model, tokenizer = models.load_policy(sft)
        policy = Policy(model, run.section("sampling").temperature)
        encoded = text.encode_pairs(tokenizer, rows, policy.context)
        table, read = rows[["pair_id"]].copy(), 0
        for side, tokens in (("chosen", encoded.chosen), ("rejected", encoded.rejected)):
            table[f"{side}_logp"] = forward.log_likelihoods(policy, tokens, side, run.checkpoint.pieces(side))
            read += forward.tokens_read(tokens)
            table[f"{side}_tokens"] = [len(example.response) for example in tokens]
        run.spent(parameters=models.size(model), tokens_read=read, models_held=1)
        tables.write_table(table, "reference", out)


if __name__ == "__main__":
    launch.command(main)
