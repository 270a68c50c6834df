"""By how much lines differ: the standard deviations that the simulation of planned questions starts from (docs/statistics.md).

    python benchmarks/spread_of_lines.py [--folder .]

The folder holds a reproduced run of three lines or more (`make profile NAME=seeds && make repro`). A value of method m in line s on
prompt p, the mean over its answers, is taken as

    method_m + line_s + (method in line)_ms + prompt_p + rest_msp

with a spread for each. They are estimated from the mean squares of that table (two-way analysis of variance of methods and lines, prompts
crossed with both; Searle, Casella and McCulloch 1992, chapter 4); an estimate below zero is shown as 0.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer


def spreads(values: np.ndarray) -> dict[str, float]:
    """Standard deviations of lines, of methods in lines, of prompts and of the rest, from (methods, lines, prompts) values."""
    methods, lines, prompts = values.shape
    values = values - values.mean((1, 2), keepdims=True)  # what methods are worth is no spread
    cells = values.mean(2)  # (methods, lines)
    by_line, by_prompt = cells.mean(0), values.mean((0, 1))
    within = cells - by_line
    rest = values - cells[..., None] - by_prompt
    residual = (rest**2).sum() / ((methods * lines - 1) * (prompts - 1))
    of_cells = (within**2).sum() / ((methods - 1) * (lines - 1))
    variances = {
        "line": by_line.var(ddof=1) - of_cells / methods,
        "method in line": of_cells - residual / prompts,
        "prompt": by_prompt.var(ddof=1) - residual / (methods * lines),
        "rest": residual,
    }
    return {name: float(max(variance, 0.0)) ** 0.5 for name, variance in variances.items()}


def main(folder: Annotated[Path, typer.Option(help="A reproduced run of three lines or more.")] = Path()) -> None:
    """Print the spreads of `preferred` and of gold, over all methods of the run but control tokens."""
    from rlhf_vs_dpo import config, tables
    from rlhf_vs_dpo.evaluation.measure import Asked, by_prompt

    params = config.read_params(folder / "params.yaml")
    policies, seeds = config.section(params, "policies"), config.section(params, "seeds")
    if len(seeds) < 3:
        raise typer.BadParameter(
            f"{folder / 'params.yaml'} has {len(seeds)} of `seeds`; the spread of lines needs three or more"
        )
    asked = Asked(config.section(params, "preferences").annotator.temperature, 0.0)

    def read(name: str) -> pd.DataFrame:
        return tables.read_table(folder / "samples" / f"{name}.parquet", "samples")

    found: dict[str, list] = {"preferred": [], "gold": []}
    start = {seed: by_prompt(read(f"sft-{seed}")[["prompt_id", "utility"]]) for seed in seeds}
    for method, folders in config.folders(policies, seeds).items():
        first = read(folders[0])
        if method == "sft" or first["suffix"].nunique() > 1:
            continue
        rows: dict[str, list] = {name: [] for name in found}
        for seed, name in zip(seeds, folders, strict=True):
            said = by_prompt(read(name)[["prompt_id", "utility", "gold"]])
            prompts = sorted(said)
            preferred = [asked.preferred(said[p]["utility"], start[seed][p]["utility"]).mean() for p in prompts]
            rows["preferred"].append(preferred)
            rows["gold"].append([np.nanmean(said[p]["gold"]) for p in prompts])
        for axis, of in rows.items():
            found[axis].append(of)
    for axis, values in found.items():
        table = np.array(values)
        parts = ", ".join(f"{name} {spread:.3f}" for name, spread in spreads(table).items())
        typer.echo(
            f"{axis}: {parts} (standard deviations; {table.shape[0]} methods, {table.shape[1]} lines, {table.shape[2]} prompts)"
        )


if __name__ == "__main__":
    typer.run(main)
