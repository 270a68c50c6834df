"""What evaluation found, put onto the MLflow runs that made the policies; the policies registered; a view for the UI."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.run import journal, store
from rlhf_vs_dpo.run.pipeline import locked, read_run
from rlhf_vs_dpo.run.progress import bar
from rlhf_vs_dpo.run.recorder import tags_of

REGISTERED = "rlhf-vs-dpo-policy"  # the registered model whose versions are policies


def publish(entries: list[dict[str, Any]], axes: list[str], say: Callable[[str], None]) -> None:
    """Put what was measured of each policy onto the MLflow run that made it, and register the policy.

    Entries are those of `evaluation.views.for_tracking`. A run that is not in this store (weights pulled from a
    colleague) is only mentioned. Every policy is a version of the registered model REGISTERED, an external one, for its
    weights stay in DVC; the alias `best` is the one that is best on validation prompts. The UI gets a view of all runs,
    ordered by the first of `axes`. Where MLflow is away it is waited for; where it stays away, that is said, and how to do it later.
    """
    import mlflow

    mlflow.set_tracking_uri(store.tracking_uri())
    try:
        _publish(entries, axes, say)
    except journal.Unanswered:
        say(
            "MLflow stays away: what was measured is in evaluation/results.json, and not yet on its runs. When MLflow answers again: "
            "dvc repro --force --single-item evaluate"
        )


def _publish(entries: list[dict[str, Any]], axes: list[str], say: Callable[[str], None]) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    client, known = store.client(), locked()
    versions: dict[str, str] = {}

    def sure(action: Callable[[], Any]) -> Any:
        return journal.patiently(action, say, "it is waited for", lambda: journal.SILENT_SECONDS)

    def one(entry: dict[str, Any]) -> None:
        run_id = _run_of(entry)
        found = client.get_run(run_id)
        if found.info.lifecycle_stage == "deleted":
            raise MlflowException("the run has been deleted", error_code=RESOURCE_DOES_NOT_EXIST)
        _put(entry, found, known)
        if md5 := known.get(f"models/{entry['folder']}"):
            versions[entry["folder"]] = _register(entry, run_id, md5)

    with bar(len(entries), "MLflow", "policy") as progress:
        for entry in entries:
            progress.update()
            try:
                sure(partial(one, entry))
            except MlflowException as error:
                say(f"{entry['folder']}: nothing was added to its MLflow run: {str(error).splitlines()[0]}")
    sure(partial(_share_view, axes))
    judged = {entry["folder"]: entry["validation"] for entry in entries if entry["validation"] is not None}
    judged = {folder: value for folder, value in judged.items() if math.isfinite(value)}
    best = max(judged, key=judged.__getitem__, default=None)
    if best is not None and best not in versions:
        say(
            f"best on validation prompts: {best} ({judged[best]:.2f}), whose run is not here; {REGISTERED}@best stays what it was"
        )
    elif best is not None and "DVC_EXP_NAME" not in os.environ:  # an experiment is a question, not yet an answer
        sure(partial(client.set_registered_model_alias, REGISTERED, "best", versions[best]))
        say(f"best on validation prompts: {best} ({judged[best]:.2f}); MLflow model {REGISTERED}@best")


def _put(entry: dict[str, Any], run: Any, known: dict[str, str]) -> None:
    """Metrics, parameters, samples and the experiments that used it, onto the run of a policy."""
    from rlhf_vs_dpo.run import profiles

    client, run_id = store.client(), run.info.run_id
    # MLflow appends: what a run has already is not said again when evaluation runs again.
    told = {(key, 0): value for key, value in run.data.metrics.items() if key in entry["metrics"]}
    for key in {key for _, row in entry["steps"] for key in row}:
        for point in sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp):
            told[key, point.step] = point.value  # the last word of each step
    batch = [m for step, row in [(0, entry["metrics"]), *entry["steps"]] for m in store.metrics(row, step)]
    batch = [m for m in batch if told.get((m.key, m.step)) != m.value]
    for start in range(0, len(batch), store.BATCH):
        client.log_batch(run_id, metrics=batch[start : start + store.BATCH])
    settings = store.params({"method": entry["settings"]})
    client.log_batch(run_id, params=[param for param in settings if param.key not in run.data.params])
    # A run that the run cache brought back was made under another profile, or in another experiment: it belongs to both.
    for tag, value in (("profiles", profiles.current()), ("dvc.exps", os.environ.get("DVC_EXP_NAME"))):
        before = run.data.tags.get(tag, "").split()
        if value and value not in before:
            client.set_tag(run_id, tag, " ".join([*before, value]))
    if entry["samples"] is not None:
        md5 = known.get(f"samples/{entry['folder']}.parquet", "unlocked")
        file = f"samples-{md5[:8]}.json"
        if file not in {artifact.path for artifact in client.list_artifacts(run_id)}:  # a table would be appended to
            client.log_table(run_id, entry["samples"], file)


def _share_view(axes: list[str]) -> None:
    """A view of the runs worth opening: best first, with the columns of the report. (A tag, as the UI's share button sets.)"""
    metrics = (
        *axes,
        "utility",
        "reward",
        "win_rate_vs_sft",
        "length_controlled_win_rate",
        "kl",
        "tokens",
        "filler",
        "corpus_perplexity",
    )
    columns = [
        "tags.`family`", *(f"metrics.`evaluation/{name}`" for name in dict.fromkeys(metrics)), "metrics.`cost/total_flops`",
        "metrics.`cost/seconds`", "params.`method.beta`", "tags.`seed`", "tags.`profiles`", "tags.`dvc.exps`",
    ]  # fmt: skip
    state = {
        "searchFilter": "", "orderByKey": f"metrics.`evaluation/{axes[0]}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": columns,
    }  # fmt: skip
    store.client().set_experiment_tag(
        store.experiment(store.EXPERIMENT), f"mlflow.sharedViewState.{store.VIEW}", json.dumps(state)
    )


def _run_of(entry: dict[str, Any]) -> str:
    """The run of a policy; best-of-n without training has none, and gets one of its own beside that of its line's pool."""
    folder, seed = entry["folder"], entry["seed"]
    if entry["family"] != "best_of_n":
        return store.known_as(read_run(Path("runs") / f"{folder}.json")["run_id"])
    pool = store.known_as(read_run(Path("runs") / f"pool-{seed}.json")["run_id"])
    client, experiment = store.client(), store.experiment(store.EXPERIMENT)
    found = client.search_runs([experiment], f"tags.policy = '{folder}' and tags.`pool.run` = '{pool}'", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {"policy": folder, "method": entry["method"], "family": "best_of_n", "seed": str(seed), "pool.run": pool}
    created = client.create_run(experiment, run_name=folder, tags=tags_of("evaluate", tags)).info.run_id
    samples = f"samples/pool-{seed}.parquet"
    if md5 := locked().get(samples):
        client.set_tag(created, f"dvc.dep.{samples}", md5)
        client.log_inputs(created, store.datasets({samples: md5}))
    client.set_terminated(created, "FINISHED")
    return created


def _register(entry: dict[str, Any], run_id: str, md5: str) -> str:
    """The version under which a policy is registered; made if it is new."""
    import contextlib
    import io

    import mlflow

    client = store.client()
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        client.create_registered_model(
            REGISTERED, description="Policies of the comparison; their weights are in DVC, under `dvc.path`."
        )
    for version in client.search_model_versions(f"name = '{REGISTERED}' and tags.run = '{run_id}'"):
        return version.version
    tags = {
        "run": run_id, "policy": entry["folder"], "method": entry["method"], "family": entry["family"],
        "dvc.path": f"models/{entry['folder']}", "dvc.md5": md5,
    }  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):  # it narrates every version
        model = mlflow.create_external_model(
            name=entry["folder"], source_run_id=run_id, model_type="policy", tags=tags,
            experiment_id=client.get_run(run_id).info.experiment_id,
        )  # fmt: skip
        return mlflow.register_model(f"models:/{model.model_id}", REGISTERED, tags=tags).version
