"""Try a method at many settings, each by the stage that trains it, on a line that no result uses."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    method: Annotated[str, typer.Option(help="A method of `tuning.spaces` in params.yaml.")],
    line: Annotated[
        Path, typer.Option(help="Folder of the line: sft, reward, pairs.parquet, reference.parquet, pool.parquet.")
    ],
    prompts: Annotated[Path, typer.Option(help="Prompts: train to learn on, validation to measure.")],
    demonstrations: Annotated[
        Path, typer.Option(help="Demonstrations, which the reward model must score 0 on average.")
    ],
    corpus: Annotated[Path, typer.Option(help="Pretraining text, for PPO-ptx.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the trials go, a row each.")],
) -> None:
    """Write `trials`: settings, what they are worth on validation prompts, cost, and how the run ended."""
    of_line = [line / name for name in ("sft", "reward", "pairs.parquet", "reference.parquet", "pool.parquet")]
    inputs = [*of_line, prompts, demonstrations, corpus, world]
    with frame.stage(f"tune@{method}", inputs, study=method) as run:
        import json
        import os
        import runpy
        import tempfile

        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.errors import ModelError, TrainingError
        from rlhf_vs_dpo.evaluation.cost import flops
        from rlhf_vs_dpo.language import heads
        from rlhf_vs_dpo.run import atomic
        from rlhf_vs_dpo.run.finished import Finished
        from rlhf_vs_dpo.run.pipeline import read_run
        from rlhf_vs_dpo.study import space, trial

        os.environ["RLHF_LAUNCHED"] = "1"  # the study shares devices out by method, not within a trial
        tuning, whole = run.section("tuning"), config.read_params()
        family, evaluate = config.family_of(whole, method), config.section(whole, "evaluate")
        # Watched before the first step, where the policy is the SFT policy, and after the last.
        whole |= {"monitor": {"points": 1, "prompts": run.section("pool").validation_prompts}}
        train = runpy.run_path(str(Path(__file__).with_name(f"{family}.py")))[
            "main"
        ]  # the stage of the comparison itself
        scorer = heads.load_scorer(line / "reward")
        rivals = tables.read_table(line / "pool.parquet", "pool", "validation")[["prompt_id", "utility"]]
        done = Finished(f"tune-{method}", run.params, inputs)
        if done.rows:
            typer.echo(f"{method}: {len(done.rows)} of {tuning.trials} trials are done")
        for number, settings in list(enumerate(space.settings(tuning, method), 1))[len(done.rows) :]:
            typer.echo(f"{method}, trial {number} of {tuning.trials}: {settings}")
            row = {
                "method": method,
                "trial": number,
                "settings": json.dumps(settings),
                "outcome": "finished",
                "said": "",
            }
            with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
                at = Path(folder)

                def measure(at: Path = at, row: dict = row) -> dict[str, float]:
                    heldout = tables.read_table(at / "heldout.parquet", "heldout")
                    found = trial.measured(heldout, scorer, rivals, run.section("preferences"), evaluate)
                    row["outcome"] = "collapsed" if found.pop("collapsed") else "finished"
                    row.update(found)
                    return found

                tags = {
                    "study": method,
                    "trial": str(number),
                    "policy": f"{method} {number}",
                    "mlflow.parentRunId": run.run_id() or "",
                }
                params = config.with_settings(whole, method, settings)
                given = {
                    "method": method, "seed": tuning.seed, "sft": line / "sft", "prompts": prompts, "world": world, "out": at / "policy",
                    "heldout": at / "heldout.parquet", "metrics": at / "metrics.json", "curves": at / "curves.csv", "run_file": at / "run.json",
                }  # fmt: skip
                pairs, model = {"pairs": line / "pairs.parquet"}, {"reward": line / "reward"}
                more = {
                    "rl": {**model, "demonstrations": demonstrations, "corpus": corpus},
                    "preference": {
                        **pairs,
                        "reference": line / "reference.parquet",
                        "pair_rewards": at / "rewards.parquet",
                    },
                    "imitation": {**model, **pairs, "pool": line / "pool.parquet"},
                }
                try:
                    with frame.trial(frame.Trial(params, f"{family}@{method}-{tuning.seed}", tags, measure)):
                        train(**given, **more[family])
                    cost = read_run(at / "run.json")
                    row |= {"seconds": cost["seconds"], "flops": flops(cost)}
                except (
                    ModelError,
                    TrainingError,
                ) as error:  # a setting at which this method cannot be trained is a result
                    row |= {"outcome": "diverged", "said": str(error).splitlines()[0]}
                    typer.echo(f"diverged: {row['said']}")
            done.add(row)
            run.log({name: value for name, value in row.items() if isinstance(value, float)}, number)
        trials = pd.DataFrame(done.rows).reindex(columns=list(tables.CONTRACTS["trials"].columns))
        atomic.write_csv(tables.validate(trials, "trials", str(out)), out)
        done.remove()


if __name__ == "__main__":
    launch.command(main)
