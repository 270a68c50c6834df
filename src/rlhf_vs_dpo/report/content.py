"""What the report says, in the order in which a reader wants it."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pandas as pd

from rlhf_vs_dpo.preferences.gold import Gold
from rlhf_vs_dpo.report import words
from rlhf_vs_dpo.report.blocks import Block, Cell, Details, Heading, Responses, Table, Text
from rlhf_vs_dpo.report.charts import Figure
from rlhf_vs_dpo.report.marks import marked, visible
from rlhf_vs_dpo.report.words import NAMES

SHARED = ("sft", "preferences", "reward", "reference", "pool")  # stages of a line whose cost several methods share
COLUMNS = {  # metric -> (heading, digits)
    "preferred": ("preferred", 2),
    "gold": ("gold", 2),
    "utility": ("utility", 2),
    "objective": ("objective", 2),
    "reward": ("RM reward", 2),
    "win_rate_vs_sft": ("win vs SFT", 2),
    "length_controlled_win_rate": ("win at equal length", 2),
    "win_rate_vs_demonstration": ("win vs demo", 2),
    "kl": ("KL", 2),
    "tokens": ("tokens", 1),
    "finished": ("finished", 2),
    "filler": ("filler", 2),
    "distinct_2": ("distinct-2", 2),
    "corpus_perplexity": ("corpus ppl", 2),
    "fact_recall": ("fact recall", 2),
    "pair_accuracy": ("pairs", 2),
}


FIRST = (
    "preferred",
    "gold",
    "utility",
    "objective",
    "reward",
    "win_rate_vs_sft",
    "length_controlled_win_rate",
    "kl",
    "finished",
)


@dataclass(frozen=True)
class Trace:
    """Where a policy comes from: `stage` and `lock` of DVC, the parameters of its method; and, of the run that made it here,
    `run` and `link` of MLflow.

    For best-of-n without training: where the pool comes from.
    """

    folder: str
    stage: str
    lock: str
    run: str
    link: str | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Everything the report is made of.

    found            evaluation/results.json
    reward_quality   metrics of the reward stage of each line
    samples          first sample of each policy of the first line for each test prompt: method -> prompt_id -> response
    prompts          test prompts, `prompt_id, prompt, facts`
    demonstrations   prompt_id -> response
    traces           method -> its policies
    took             evaluation/machine.json: what each stage and method took of the machine
    """

    found: dict[str, Any]
    reward_quality: list[dict[str, Any]]
    samples: dict[str, dict[str, str]]
    prompts: pd.DataFrame
    demonstrations: dict[str, str]
    judge: Gold | None
    traces: dict[str, list[Trace]]
    took: dict[str, Any]
    examples: int
    figures: list[Figure]


def blocks(source: Source) -> list[Block]:
    """The whole report, top to bottom."""
    found = source.found
    drawn = {figure.name: figure for figure in source.figures}

    def figures(*names: str) -> list[Block]:
        return [drawn[name] for name in names if name in drawn]

    return [
        *(Text(sentence) for sentence in words.verdict(found)),
        *figures("questions" if found["answers"] else "comparison"),
        Heading("The comparison", "comparison"),
        Text(words.axes_explained(found)),
        *figures(*(["comparison"] if found["answers"] else [])),
        main_table(found, set(source.traces), FIRST),
        more_table(found),
        *(Text(sentence) for sentence in [*words.limits(found), *filter(None, [made_by(source.took["stages"])])]),
        Text(
            f"The reward model{'s order' if len(source.reward_quality) > 1 else ' orders'} held-out pairs as the annotator did in "
            + ", ".join(
                f"{q['accuracy']:.1%} (± {1.96 * q['accuracy_standard_error']:.1%})" for q in source.reward_quality
            )
            + " of cases"
            + ("; `pairs` says the same of a policy's implicit reward." if _known(found, "pair_accuracy") else ".")
        ),
        *figures("two_axes", "frontier"),
        Heading("Planned questions" if found["answers"] else "Differences", "differences"),
        *questions(found),
        *differences(found),
        *lines(found),
        Heading("Two ways to go wrong" if found["asked"]["tastes"] else "How it goes wrong", "overoptimisation"),
        *failed(found),
        *figures("overoptimisation", "best_of_n"),
        *overoptimisation(found),
        Heading("Three fair comparisons", "fair"),
        Text(
            "Each is fair in one respect, and is read off the paths of training on validation prompts: at equal KL "
            "(interpolated between watched points, linear in √KL; a dash where a method never goes so far; † where those two "
            "points lie further apart than the KL asked for, so that the number is a guess at what happened between them, which "
            "its interval does not cover; ‡ where it is read between several settings of the method on test prompts, which is "
            "what the KL of a finished policy means; a path says what a run passed through), at equal compute (FLOPs with all that a method needs before "
            "it starts; a dash where that alone is more than the budget), and each at its own best watched point, chosen on one "
            "half of the prompts and measured on the other. Best of n has no training: its n is chosen on validation prompts, and "
            "what it is worth is measured on test prompts, so that its last columns are of other prompts. Test prompts chose nothing."
        ),
        *fair(found),
        *figures("compute"),
        Heading("What it cost", "cost"),
        Text(
            "FLOPs = N (6 · tokens trained + 2 · (tokens generated + tokens read)) − 2 F · tokens trained, N being the weights outside the embedding "
            "(Kaplan et al. 2020) and F those of them that do not learn (with adapters); a token counts once for each network and pass that learns from it. Monitoring and evaluation "
            "are left out. Labels are counted nowhere. Seconds and memory are of the machine that ran it, and stand in run.html (run.md)."
            + "".join(
                f" {method} asks the annotator while it trains: pairs of its later rounds are new ones."
                for method in _online(source)
            )
        ),
        costs(found),
        shared_costs(source),
        *inference(found),
        *figures("cost"),
        Heading("What is bent: length, filler, diversity", "bent"),
        *figures("length", "diversity"),
        *bent(found),
        Heading("What is forgotten", "forgotten"),
        *figures("forgetting"),
        Heading("How training went", "training"),
        *figures("training"),
        *judged(found),
        Heading("The same prompt, answered by every policy", "texts"),
        Text(
            "Open a prompt: the first sample of each policy of the first line, and the best of the first n of the pool."
            + (
                " Marks are what the gold reward says of each clause: coverage, and what it adds; faithfulness, redundancy, filler "
                "and form, and what they cost."
                if _known(found, "gold_coverage")
                else ""
            )
        ),
        *texts(source),
        Heading("What theory allows", "theory"),
        Text(
            "A choice between two samples of the SFT policy, by whatever judge, is at most as selective as best-of-2 (pairs with equal, empty or "
            "unfinished responses are left out of the data, which the bound does not know); best-of-n has KL at most "
            "log n − (n−1)/n and wins at most n/(n+1) of comparisons (docs/from-rlhf-to-dpo.md)."
        ),
        Details("Bounds beside what was measured", [bounds(found)]),
        Heading("Where every number comes from", "traces"),
        Text(
            "`dvc repro <stage>` makes a policy again; its hash is that of its weights in dvc.lock (the same on every machine where docs/same-bytes.md holds); "
            "`dvc checkout` brings them back. Its MLflow run stands in run.html (run.md). All numbers are in evaluation/results.json."
        ),
        *traces(source.traces),
    ]


def run_blocks(source: Source) -> list[Block]:
    """What differs from one run to the next, and from one machine to another: seconds, memory, devices, MLflow runs."""
    runs = source.took["stages"]
    devices = sorted({f"{run['device']} ({run['arithmetic']})" for run in runs.values()})
    head = ["stage", "seconds", "peak MiB", "MLflow run"]
    linked = {trace.folder: trace for traced in source.traces.values() for trace in traced}
    rows = [
        [
            Cell(name), Cell(f"{run['seconds']:.0f}", run["seconds"]),
            Cell(f"{run['peak_memory_mib']:.0f}", run["peak_memory_mib"]),
            Cell(run["run_id"], link=linked[name].link if name in linked else None),
        ]
        for name, run in runs.items()
    ]  # fmt: skip
    taken = [
        [
            Cell(row), Cell(f"{spent['own_seconds']:.0f}", spent["own_seconds"]),
            Cell(f"{spent['total_seconds']:.0f}", spent["total_seconds"]),
            Cell(f"{spent['peak_memory_mib']:.0f}", spent["peak_memory_mib"]),
        ]
        for row, spent in source.took["methods"].items()
    ]  # fmt: skip
    return [
        Text(
            "What differs from one run to the next stands here, and here alone: all other pages of the report are the same on every machine where docs/same-bytes.md holds. "
            f"Computed on {'; '.join(devices)}."
        ),
        Text(
            "Seconds are wall time of whole stages, which may have shared the machine with others; peak memory is that of the process (of "
            "the GPU, where there is one): with small models mostly that of the libraries. `make ui` opens MLflow, where the run ids are."
        ),
        Table(
            ["policy", "own s", "total s", "peak MiB"],
            taken,
            "Each method, with what it needs upstream; means over lines",
            "taken",
        ),
        Table(head, rows, "Each stage", "stages"),
    ]


def made_by(runs: dict[str, dict[str, Any]]) -> str | None:
    """A sentence where not all was computed with the arithmetic that is the same everywhere; else None."""
    kinds = sorted({run["device"] for run in runs.values() if not run["device"].startswith("CPU")})
    own = sorted({run["arithmetic"] for run in runs.values() if run["arithmetic"].startswith("native")})
    said = []
    if kinds:
        said.append(f"Computed on {', '.join(kinds)}: another kind of device gives other bytes.")
    if own:
        said.append("Computed with RLHF_NATIVE: these bytes are one machine's own, and another machine gives others.")
    return " ".join(said) or None


def _online(source: Source) -> list[str]:
    """Methods of the DPO family that train in several rounds."""
    return [
        method
        for method, policies in source.traces.items()
        if source.found["families"].get(method) == "preference" and policies[0].settings.get("rounds", 1) > 1
    ]


def _known(found: dict[str, Any], metric: str) -> bool:
    return any(row[metric]["mean"] is not None for row in found["methods"].values())


def anchor(row: str) -> str:
    return "trace-" + "".join(c if c.isalnum() else "-" for c in row).strip("-")


def cell(entry: words.Entry | None, digits: int) -> Cell:
    """Mean with half the width of its 95 % interval, or a dash where the source cannot tell."""
    if entry is None or entry["mean"] is None:
        return Cell("–")
    return Cell(f"{entry['mean']:.{digits}f} ± {(entry['high'] - entry['low']) / 2:.{digits}f}", entry["mean"])


def _ranked(found: dict[str, Any]) -> list[str]:
    first = found["axes"][0]
    value = {row: m[first]["mean"] for row, m in found["methods"].items()}
    return sorted(value, key=lambda row: float("-inf") if value[row] is None else value[row], reverse=True)


def main_table(found: dict[str, Any], traced: set[str], metrics: Collection[str] = COLUMNS.keys()) -> Table:
    """Every row with its metrics, linked to where it comes from; columns without any value are left out."""
    shown = {m: COLUMNS[m] for m in metrics if any(row[m]["mean"] is not None for row in found["methods"].values())}
    rows = []
    for row in _ranked(found):
        method = found["method_of"][row]
        link = f"#{anchor(method)}" if method in traced else None
        rows.append(
            [Cell(row, link=link), *(cell(found["methods"][row][m], digits) for m, (_, digits) in shown.items())]
        )
    return Table(["policy", *(heading for heading, _ in shown.values())], rows,
                 f"Test prompts, in the order of {NAMES[found['axes'][0]]}; ± is half a 95 % interval. Names lead to stage, parameters and hash.", "main")  # fmt: skip


def more_table(found: dict[str, Any]) -> Table:
    """What the first table has no room for."""
    shown = [m for m in COLUMNS if m not in FIRST and _known(found, m)]
    rows = [[Cell(row), *(cell(found["methods"][row][m], COLUMNS[m][1]) for m in shown)] for row in _ranked(found)]
    return Table(["policy", *(COLUMNS[m][0] for m in shown)], rows, "The same policies: what else was measured", "more")


def questions(found: dict[str, Any]) -> list[Block]:
    """The planned questions: answers from three lines on, before that differences alone."""
    asked = found["questions"][found["axes"][0]]
    if not asked:
        return [Text("No question was planned (`evaluate.questions` in params.yaml) whose two rows were both run.")]
    answer = found["answers"]
    head = ["a", "b"]
    for axis in found["axes"]:
        head += [f"a − b in {NAMES[axis]}", *(["p", "p (Holm)", "answer"] if answer else [])]
    rows = []
    for number, question in enumerate(asked):
        row = [Cell(question["a"]), Cell(question["b"])]
        for axis in found["axes"]:
            entry = found["questions"][axis][number]
            row.append(Cell(words.signed(entry), entry["mean"]))
            if answer:
                said = {"a": f"{entry['a']} higher", "b": f"{entry['b']} higher", "open": "open", None: "–"}[
                    entry["answer"]
                ]
                row += [
                    Cell(words.p_value(entry["p"]), entry["p"]), Cell(words.p_value(entry["p_holm"]), entry["p_holm"]), Cell(said),
                ]  # fmt: skip
        rows.append(row)
    intro = (
        "These pairs stand in params.yaml (`evaluate.questions`), written down before the lines that answer them were run. Differences are taken within each line and prompt; "
        "p comes from an interval that is a little wider than the one shown (docs/statistics.md), corrected on each axis by Holm over the questions."
        if answer
        else "These pairs stand in params.yaml (`evaluate.questions`), written down before the lines that will answer them; they are answered from three lines on. Here are "
        "the differences between these policies."
    )
    return [Text(intro), Table(head, rows, "The planned questions", "questions")]


def differences(found: dict[str, Any]) -> list[Block]:
    head = ["a", "b", *(f"a − b in {NAMES[axis]}" for axis in found["axes"]), "a wins"]

    def line(entry: dict[str, Any]) -> list[Cell]:
        return [
            Cell(entry["a"]), Cell(entry["b"]), *(Cell(words.signed(entry[axis]), entry[axis]["mean"]) for axis in found["axes"]),
            Cell("–" if entry["wins"] is None else f"{entry['wins']:.2f}", entry["wins"]),
        ]  # fmt: skip

    ranked = _ranked(found)
    neighbours = [words.pair(found, a, b) for a, b in pairwise(ranked)]
    return [
        Text(
            "Pairs that were not planned are exploratory: of so many, some differ by chance. `a wins` is the share of direct comparisons that "
            f"a wins by {NAMES[found['judge']]}, a tie half a win."
        ),
        Details(
            f"Exploratory: each row against the next, and all {len(found['differences'])} pairs",
            [
                Table(head, [line(e) for e in neighbours], "Each row against the next one of the table", "neighbours"),
                Table(head, [line(e) for e in found["differences"]], "Every two rows", "pairs"),
            ],
        ),
    ]


def failed(found: dict[str, Any]) -> list[Block]:
    """Bias amplified and reward model exploited, of every path."""
    if not found["failures"]:
        return []
    kinds = {  # kind -> (what it is called, what was gained, what was given for it)
        "bias_amplified": ("Bias amplified", "utility gained", "gold given for it"),
        "reward_model_exploited": ("Reward model exploited", "RM reward gained", "utility given for it"),
    }
    tables: list[Block] = []
    for kind, (name, gained, lost) in kinds.items():
        if kind == "bias_amplified" and not found["asked"]["tastes"]:
            continue  # utility is gold
        rows = []
        for path, both in found["failures"].items():
            entry = both[kind]
            begins = entry["begins"]["mean"] if entry["share"] else None
            rows.append(
                [
                    Cell(path), Cell(words.signed(entry["gained"]), entry["gained"]["mean"]), Cell(words.signed(entry["lost"]), entry["lost"]["mean"]),
                    Cell("–" if begins is None else f"{begins:.2f}", begins),
                    Cell(f"{entry['share']:.0%}", entry["share"]), Cell("yes" if entry["shown"] else "–"),
                ]
            )  # fmt: skip
        head = ["path", gained, lost, "from KL on", "resamples that show it", name.lower()]
        tables.append(Table(head, rows, f"{name}: what was gained, and what was given for it", f"failures-{kind}"))
    bias = (
        "Bias amplified: between the point of training at which gold is highest and that at which utility is highest, utility rose and gold "
        "fell; the labels were obeyed, and were wrong. "
        if found["asked"]["tastes"]
        else "No bias can be amplified: these annotators value gold alone. "
    )
    return [
        Text(
            f"{bias}Reward model exploited: after the point at which utility is highest the RM reward "
            "rose and utility fell; the reward model was wrong. Points are chosen on one half of the prompts and measured on the other, and the other "
            "way round, for the highest of noisy points looks higher than it is. `yes` where both intervals leave out 0. Methods are read over "
            "training on validation prompts, best of n over n on the test prompts that have the most samples."
        ),
        *tables,
    ]


def lines(found: dict[str, Any]) -> list[Block]:
    if len(found["seeds"]) == 1:
        return []
    rows = [
        [
            Cell(row), Cell(str(s["lines"]), s["lines"]),
            *(
                Cell("–" if s[axis][key] is None else f"{s[axis][key]:.3f}", s[axis][key])
                for axis in found["axes"]
                for key in ("standard_deviation", "lowest", "highest")
            ),
            Cell(f"{s['collapsed']:.0%}", s["collapsed"]),
        ]
        for row, s in found["spread"].items()
        if row in found["paths"] or row == "sft"
    ]  # fmt: skip
    return [
        Table(
            ["policy", "lines", *(f"{NAMES[axis]}: {what}" for axis in found["axes"] for what in ("standard deviation", "lowest", "highest")), "collapsed"],
            rows, "Spread of means between lines; what counts as collapsed is `evaluate.collapse` in params.yaml", "lines",
        )
    ]  # fmt: skip


def overoptimisation(found: dict[str, Any]) -> list[Block]:
    rows = []
    for method, laws in found["overoptimisation"].items():
        for metric in ("gold", "utility", "reward"):
            law = laws.get(metric)
            if law is None:
                continue
            peak = "not within reach" if law["peak_kl"] is None else f"{law['peak_kl']:.2f}"
            if law["peak_kl"] is not None:
                low = f"{law['peak_kl_low']:.2f}"
                high = "beyond" if law["peak_kl_high"] is None else f"{law['peak_kl_high']:.2f}"
                peak += f" ({low} to {high})"
            rows.append(
                [
                    Cell(method), Cell(NAMES[metric]),
                    Cell(f"{law['alpha']:.2f} ({law['alpha_low']:.2f} to {law['alpha_high']:.2f})", law["alpha"]),
                    Cell(f"{law['beta']:.2f} ({law['beta_low']:.2f} to {law['beta_high']:.2f})", law["beta"]),
                    Cell("–" if law["r_squared"] is None else f"{law['r_squared']:.2f}", law["r_squared"]),
                    Cell(f"{law['reached_kl']:.2f}", law["reached_kl"]), Cell(peak, law["peak_kl"]),
                    Cell(f"{law['peaks']:.0%}", law["peaks"]),
                    Cell(
                        "–" if law["lost"] is None else f"{law['lost']:.2f} ({law['lost_low']:.2f} to {law['lost_high']:.2f})",
                        law["lost"],
                    ),
                ]
            )  # fmt: skip
    return [
        Text(
            "Fits of Gao et al. (2023), with d = √KL: R = d (α − β d) for best of n, R = d (α − β log d) for what is trained. "
            "`lost` is what training past the peak cost, by the fit."
        ),
        Details(
            "Fits",
            [
                Table(["method", "reward", "α", "β", "R²", "KL reached", "KL at the peak", "resamples that peak", "lost"], rows,
                      "Over-optimisation, on validation prompts", "laws")
            ],
        ),
    ]  # fmt: skip


def fair(found: dict[str, Any]) -> list[Block]:
    return [_fair(found, axis) for axis in found["equal_kl"]]


def _fair(found: dict[str, Any], axis: str) -> Table:
    at_kl, own_best = found["equal_kl"][axis], found["own_best"][axis]
    kls = list(next(iter(at_kl.values()), {}))
    budgets = found["equal_compute"]["flops"]
    head = [
        "method", *(f"at KL {kl}" for kl in kls), *(f"at {flops:.2g} FLOPs" for flops in budgets.values()),
        "at its own best", "gained by stopping", "where",
    ]  # fmt: skip
    rows = []
    for method in at_kl:
        best = own_best.get(method)
        compute = found["equal_compute"]["axes"][axis].get(method, {})
        where = (
            "–"
            if best is None
            else f"n = {best['at']:g} (test)"
            if best["on"] == "test"
            else f"{best['at']:.0%} of training"
        )
        rows.append(
            [
                Cell(method), *(_at_kl(at_kl[method][kl], float(kl)) for kl in kls),
                *(cell(compute.get(share), 2) for share in budgets),
                cell(best["value"] if best else None, 2), cell(best["gained"] if best else None, 2), Cell(where),
            ]
        )  # fmt: skip
    caption = f"{_capital(NAMES[axis])} at equal KL, at equal compute, and at each method's own best"
    return Table(head, rows, caption, f"fair-{axis}")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _at_kl(entry: dict[str, Any] | None, kl: float) -> Cell:
    shown = cell(entry, 2)
    if entry is None or entry["mean"] is None:
        return shown
    marks = " ‡" * (entry["read"] == "settings") + " †" * (entry["between"][1] - entry["between"][0] > kl)
    return replace(shown, text=f"{shown.text}{marks}")


def costs(found: dict[str, Any]) -> Table:
    rows = []
    for row, spent in found["cost"].items():
        total, own = spent["total"], spent["own"]
        rows.append(
            [
                Cell(row), Cell(", ".join(spent["needs"])),
                *(Cell(f"{total[key]:,.0f}", total[key]) for key in ("tokens_trained", "tokens_generated", "tokens_read")),
                Cell(f"{own['flops']:.2e}", own["flops"]), Cell(f"{total['flops']:.2e}", total["flops"]),
                Cell(str(spent["models_held"]), spent["models_held"]),
                Cell(f"{spent['hyperparameters']} + {spent['hyperparameters_upstream']}", spent["hyperparameters"]),
                Cell(f"{spent['tokens_per_answer']:.1f}", spent["tokens_per_answer"]),
            ]
        )  # fmt: skip
    return Table(
        ["policy", "needs", "tokens trained", "tokens generated", "tokens read", "own FLOPs", "total FLOPs", "models held", "hyper-parameters (own + upstream)", "tokens per answer / SFT's"],
        rows, "Cost of one run of each method with what it needs upstream; the SFT policy is everybody's and left out", "cost",
    )  # fmt: skip


def shared_costs(source: Source) -> Table:
    counted = ("tokens_trained", "tokens_generated", "tokens_read")
    names = ["base", *(f"{name}-{seed}" for seed in source.found["seeds"] for name in SHARED)]
    runs = source.took["stages"]
    rows = [[Cell(name), *(Cell(f"{runs[name].get(k, 0):,}", runs[name].get(k, 0)) for k in counted)] for name in names]
    return Table(["stage", "tokens trained", "tokens generated", "tokens read"], rows,
                 "Stages that methods share; of the pool, only the share that methods learn from counts above", "shared")  # fmt: skip


def inference(found: dict[str, Any]) -> list[Block]:
    """What an answer costs where more is sampled for it than is given."""
    return [
        Text(
            f"{row} needs no training and pays for each answer: {found['methods'][row]['sampled_tokens']['mean']:.0f} tokens "
            f"sampled, and every sample scored by the reward model, for one answer of {found['methods'][row]['tokens']['mean']:.0f} "
            f"tokens: {spent['tokens_per_answer']:.1f} times what the SFT policy samples. That is in no total above."
        )
        for row, spent in found["cost"].items()
        if row not in found["paths"]
    ]


def bent(found: dict[str, Any]) -> list[Block]:
    data = found["biases"].get("pairs", {})
    varied = [m for m in ("entropy", "distinct_1", "distinct_2", "self_similarity") if _known(found, m)]
    of = {"tokens": 1, "filler": 2} if _known(found, "filler") else {"tokens": 1}  # with how many digits
    head = ["policy"]
    for name in of:
        head += [
            name,
            *(["tokens over SFT's"] if name == "tokens" else []),
            *([f"{name} over chosen"] if name in data else []),
        ]
    rows = []
    for row in _ranked(found):
        metrics, over_chosen = found["methods"][row], found["biases"].get("methods", {}).get(row, {})
        cells = [Cell(row)]
        for name, digits in of.items():
            cells.append(cell(metrics[name], digits))
            if name == "tokens":
                cells.append(cell(found["length"]["over_sft"][row], digits))
            if name in data:
                more = over_chosen[name]
                cells.append(Cell("–" if more is None else f"{more:+.{digits}f}", more))
        rows.append([*cells, *(cell(metrics[m], 2) for m in varied)])
    head += [m.replace("_", "-") for m in varied]
    said = []
    if "filler" in data:
        said.append(
            f"{data['filler']['chosen']:.0%} of chosen and {data['filler']['rejected']:.0%} of rejected responses have a filler phrase"
        )
    if "tokens" in data:
        said.append(
            f"chosen responses have {data['tokens']['chosen']:.1f} tokens and rejected ones {data['tokens']['rejected']:.1f}"
        )
    liked = [name for name, of in data.items() if of["chosen"] > of["rejected"]]
    amplified = (
        f" What a policy has of {words.listed(liked)} beyond the chosen responses, it has amplified."
        + (" (Of length, a part may be what a better response needs.)" if "tokens" in liked else "")
        if liked
        else ""
    )
    before = [Text(f"In the preference data {', and '.join(said)}.{amplified}")] if said else []
    return [*before, Table(head, rows, "Length, filler and diversity on test prompts", "bent")]


def judged(found: dict[str, Any]) -> list[Block]:
    judges = found["judges"]
    if not judges:
        return []
    methods = list(dict.fromkeys(m for judge in judges.values() for m in judge["methods"]))
    rows = [[Cell(m), *(cell(judge["methods"].get(m), 2) for judge in judges.values())] for m in methods]
    notes = []
    for name, judge in judges.items():
        parts = [f"{judge['comparisons']} comparisons"]
        if judge["unanswered"]:
            parts.append(f"{judge['unanswered']:.1%} without a usable answer")
        if judge["inconsistent"] is not None:
            parts.append(
                f"{judge['inconsistent']:.1%} in which its two answers disagree, {judge['shown_first']:.0%} of answers name what was shown first"
            )
        parts += [
            f"agrees with {other} in {share:.1%}" for other, share in judge["agreement"].items() if share is not None
        ]
        notes.append(Text(f"Judge {name}: " + "; ".join(parts) + "."))
    return [
        Heading("Judges", "judges"),
        Text(
            "Each policy's first sample against the SFT policy's first, one comparison for each prompt, whether it ended or not; a tie is half a win."
        ),
        Table(["policy", *judges], rows, "Win rate against the SFT policy by each judge", "judges-table"),
        *notes,
    ]


def texts(source: Source) -> list[Block]:
    asked = source.prompts[source.prompts["prompt_id"].isin(source.samples["sft"].keys())]
    parts: list[Block] = []
    for row in asked.head(source.examples).itertuples():
        who = (
            [("demonstration", source.demonstrations[row.prompt_id])] if row.prompt_id in source.demonstrations else []
        )
        who += [(method, said[row.prompt_id]) for method, said in source.samples.items() if row.prompt_id in said]
        scored = []
        for name, response in who:
            pieces = [
                piece._replace(text=visible(piece.text))
                for piece in marked(source.judge, row.prompt, row.facts, response)
            ]
            worth = source.judge.score(row.prompt, row.facts, response)["gold"] if source.judge else None
            scored.append((name, worth, pieces))
        words_of = visible(" ".join(row.prompt.split()))
        parts.append(
            Details(words_of[:110] + ("…" if len(words_of) > 110 else ""), [Responses(visible(row.prompt), scored)])
        )
    return parts


def bounds(found: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(name), Cell(f"{e['mean']:.3f}", e["mean"]), Cell(f"{e['low']:.3f} to {e['high']:.3f}", e["low"]),
            Cell(f"{e['bound']:.3f}", e["bound"]),
            Cell("yes" if e["mean"] <= e["bound"] else "within its interval" if e["holds"] else "NO"),
        ]
        for name, e in found["bounds"].items()
    ]  # fmt: skip
    return Table(["what", "measured", "95 %", "bound", "holds"], rows, "Bounds", "bounds")


def traces(found: dict[str, list[Trace]]) -> list[Block]:
    parts: list[Block] = []
    for method, policies in found.items():
        rows = [[Cell(p.folder), Cell(p.stage), Cell(p.lock)] for p in policies]
        settings = ", ".join(f"{key} = {value}" for key, value in policies[0].settings.items())
        parts.append(Heading(method, anchor(method)))
        parts.append(Table(["policy", "DVC stage", "md5 in dvc.lock"], rows, f"Policies of {method}", anchor(method)))
        if settings:
            parts.append(Text(f"Parameters: `{settings}`."))
    return parts
