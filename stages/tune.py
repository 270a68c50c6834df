"""Try a method at many settings, each by the stage that trains it, on a line that no result uses."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    method: Annotated[str, typer.Option(help="A method of `tuning.spaces` in params.yaml.")],
    line: Annotated[Path, typer.Option(help="Folder of the line: sft, reward, pairs, reference and pool.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: train to learn on, validation to measure.")],
    demonstrations: Annotated[Path, typer.Option(help="Demonstrations, which the reward model scores 0 on average.")],
    corpus: Annotated[Path, typer.Option(help="Pretraining text, for PPO-ptx.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the trials go, a row each.")],
) -> None:
    """Write `trials`: settings, what they are worth on validation prompts, cost, and how the run ended."""
    model, pairs = {"reward": line / "reward"}, {"pairs": line / "pairs.parquet"}
    pool, reference = {"pool": line / "pool.parquet"}, {"reference": line / "reference.parquet"}
    everybody = {"sft": line / "sft", "prompts": prompts, "world": world}
    of_family = {
        "rl": model | {"demonstrations": demonstrations, "corpus": corpus},
        "preference": pairs | reference,
        "imitation": model | pairs | pool,
    }
    inputs = list((everybody | model | pairs | pool | reference | of_family["rl"]).values())
    untuned = (
        line / "untuned" / f"{method}.json"
    )  # what is not searched: trials of other settings are no trials of these
    with frame.stage(f"tune@{method}", inputs, may_read=[untuned], study=method) as run:
        import os
        import runpy

        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.language import heads
        from rlhf_vs_dpo.run import atomic
        from rlhf_vs_dpo.study import space, trial

        os.environ["RLHF_LAUNCHED"] = "1"  # the study shares devices out by method, not within a trial
        tuning, params = run.section("tuning"), config.read_params()
        family = config.family_of(params, method)
        stage = runpy.run_path(str(Path(__file__).with_name(f"{family}.py")))["main"]  # that of the comparison itself
        # Watched before the first step, where the policy is the SFT policy, and after the last.
        params |= {"monitor": {"points": 1, "prompts": run.section("pool").validation_prompts}}
        drawn = tables.read_table(line / "pool.parquet", "pool", "validation")
        trial.check_criterion(tuning.criterion, drawn)
        rivals = drawn[["prompt_id", "utility"]]
        ruler = trial.Ruler(
            heads.load_scorer(line / "reward"), rivals, run.section("preferences"), config.section(params, "evaluate")
        )
        done = run.checkpoint.pieces("trials")
        if len(done):
            typer.echo(f"{method}: {len(done)} of {tuning.trials} trials are done")
        for number, settings in list(enumerate(space.settings(tuning, method), 1))[len(done) :]:
            typer.echo(f"{method}, trial {number} of {tuning.trials}: {settings}")
            tags = {"study": method, "trial": str(number), "policy": f"{method} {number}"}
            given = everybody | of_family[family] | {"method": method, "seed": tuning.seed}
            tried = frame.Trial(
                config.with_settings(params, method, settings), f"{family}@{method}-{tuning.seed}",
                tags | {"mlflow.parentRunId": run.run_id()},
            )  # fmt: skip
            row = {"method": method, "trial": number} | one(stage, given, tried, ruler, settings)
            run.log({name: value for name, value in row.items() if isinstance(value, float)}, number)
            done.append(row)
            run.checkpoint.save()
        trials = pd.DataFrame(list(done)).reindex(columns=list(tables.CONTRACTS["trials"].columns))
        atomic.write_csv(tables.validate(trials, "trials", str(out)), out)


def one(stage: Callable[..., None], given: dict[str, Any], tried: frame.Trial, ruler: Any, settings: dict) -> dict:
    """Train by a stage of the comparison, into a folder that is thrown away; returns the trial's row."""
    import json
    import tempfile

    from rlhf_vs_dpo import tables
    from rlhf_vs_dpo.errors import ModelError, TrainingError
    from rlhf_vs_dpo.evaluation.cost import flops
    from rlhf_vs_dpo.run.pipeline import read_run

    row: dict[str, Any] = {"settings": json.dumps(settings), "outcome": "finished", "said": ""}
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        at = Path(folder)
        outputs = {
            "out": at / "policy", "heldout": at / "heldout.parquet", "metrics": at / "metrics.json",
            "curves": at / "curves.csv", "run_file": at / "run.json",
        }  # fmt: skip
        if "reference" in given:
            outputs["pair_rewards"] = at / "pair-rewards.parquet"

        def measure() -> dict[str, float]:
            found, collapsed = ruler.measure(tables.read_table(at / "heldout.parquet", "heldout"))
            row.update(found, outcome="collapsed" if collapsed else "finished")
            return found

        try:
            with frame.trial(tried._replace(measure=measure)):
                stage(**given, **outputs)
        except (ModelError, TrainingError) as error:  # settings at which this method cannot be trained are a result
            said = str(error).splitlines()[0]
            typer.echo(f"diverged: {said}")
            return row | {"outcome": "diverged", "said": said}
        spent = read_run(at / "run.json")
        return row | {"seconds": spent["seconds"], "flops": flops(spent)}


if __name__ == "__main__":
    launch.command(main)
