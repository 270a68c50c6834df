"""Problems that can be solved exactly, through the production losses and loops: who reaches the optimum, which bounds hold."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import atomic, frame, launch


def main(
    out: Annotated[Path, typer.Option(help="Distances to each optimum, bounds and identities.")],
    curves: Annotated[Path, typer.Option(help="KL to the optimum over training.")],
    figure: Annotated[Path, typer.Option(help="The same, drawn.")],
) -> None:
    """Needs no other stage: no data, no model."""
    with frame.stage("theory", [], family="theory") as run:
        import pandas as pd

        from rlhf_vs_dpo.theory import experiments, identities, problems, show

        settings, seed = run.section("theory"), run.section("seed")
        tabular, transformer = problems.tabular(settings.tabular, seed), problems.transformer(seed + 3)
        rows: list[dict] = []

        def log(problem: str, method: str, curve: list[tuple[int, float]]) -> None:
            end = max(step for step, _ in curve)
            rows.extend(
                {"problem": problem, "method": method, "step": step, "share": step / end, "kl_to_optimum": value}
                for step, value in curve
            )

        reached = experiments.study(settings, [tabular, transformer], seed, log)
        laws, bounds = identities.selection(settings, seed)
        kl, biased = identities.kl_estimators(settings, seed)
        ipo, runaway = identities.two_outcomes()
        equal = identities.gibbs(settings, seed) | identities.gradients(settings, seed) | kl | ipo | laws
        result = {
            **reached,
            "bounds": bounds,
            "identities": equal,
            "biased_kl_gradients": biased,
            "dpo_without_exception": runaway,
            "ppo_ptx_with_gamma_0_is_ppo": identities.ptx_off(transformer, settings.episodes, seed),
        }
        atomic.write_csv(pd.DataFrame(rows), curves)
        show.draw(rows, figure)
        run.artifact(figure)
        run.finish(result, out)


if __name__ == "__main__":
    launch.command(main)
