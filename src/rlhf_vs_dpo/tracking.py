"""MLflow and DVC, and nowhere else: where a stage gets its parameters, and where its numbers go.

One flat MLflow run for each executed stage: those that make a policy in the experiment `rlhf-vs-dpo`, one row each, the
others in `rlhf-vs-dpo stages`. The id is a stage output (runs/<name>.json, cached by DVC), so that it comes
back from the run cache with the weights it belongs to, and evaluation lands on the run of the policy it measured.
Nothing here can change a number of a table or a model: no stage depends on this file.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import DataError, UserError
from rlhf_vs_dpo.launch import is_main
from rlhf_vs_dpo.progress import bar

EXPERIMENT = "rlhf-vs-dpo"  # a row per policy
STAGES = "rlhf-vs-dpo stages"  # everything else that ran
REGISTERED = "rlhf-vs-dpo-policy"  # the registered model whose versions are policies
UI = "http://127.0.0.1:5000"  # of `make ui`
VIEW = "comparison"  # the view of the runs that `make ui` opens
SYSTEM_SECONDS = 5  # between two looks at processor, memory and GPU
FLUSH_SECONDS = 5.0
# What "dirty" looks at: DVC itself removes the committed metrics and curves of a stage before it runs.
WRITTEN_BY_HAND = ("src", "stages", "data/mini_tldr", "dvc.yaml", "params.yaml", "constraints.txt")
BATCH = 1000  # metrics that MLflow takes at once


def root() -> Path:
    """The repository, also inside a queued experiment, whose own folder is deleted when it ends."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root()}/mlflow.db")


def stage_params(stage: str | None) -> dict[str, Any]:
    """The parameters that DVC tracks for this stage, and no other: what is read is what invalidates.

    params.yaml is checked whole first. Outside DVC (a stage started by hand) all of it is returned.
    """
    whole = config.read_params()
    config.check(whole)
    if stage is None:
        return whole
    import dvc.api

    return dvc.api.params_show(stages=stage)


class Run:
    """What a stage is handed: its parameters, and where to put its numbers."""

    def __init__(self, params: dict[str, Any], run_id: str | None):
        self.params, self.run_id = params, run_id
        self.rows: list[dict[str, float]] = []
        self.cost: dict[str, float] = {}
        self._logged = {"step"}  # names of metrics, and that of the column of curves
        self._buffer: list[Any] = []
        self._flushed = time.monotonic()

    def section(self, name: str, method: str | None = None) -> Any:
        """A section of params.yaml as its type from `config`."""
        return config.section(self.params, name, method)

    @property
    def seed(self) -> int:
        return self.section("seed")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of a step: onto MLflow, and into the rows of the stage's curve (`heldout/` is kept as samples)."""
        training = {name: value for name, value in metrics.items() if not name.startswith("heldout/")}
        if training:
            self.rows.append({"step": step} | training)
        self._logged |= metrics.keys()
        self._send(metrics, step)

    def _send(self, metrics: dict[str, float], step: int) -> None:
        if self.run_id is None:
            return
        self._buffer += _metrics(metrics, step)
        if time.monotonic() - self._flushed > FLUSH_SECONDS or len(self._buffer) >= BATCH:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            for start in range(0, len(self._buffer), BATCH):
                _client().log_batch(self.run_id, metrics=self._buffer[start : start + BATCH])
        self._buffer, self._flushed = [], time.monotonic()

    def reads(self, *paths: Path) -> None:
        """Inputs of the run, with the md5 that dvc.lock knows them by: a tag each, and tables as MLflow datasets.

        `stage` is given those that are always read; this is for what only some settings open.
        """
        if self.run_id is None:
            return
        from mlflow.entities import RunTag

        known = locked()
        used = {str(path): known[str(path)] for path in paths if str(path) in known}
        _client().log_batch(self.run_id, tags=[RunTag(f"dvc.dep.{path}", md5) for path, md5 in used.items()])
        if tables := [_dataset(path, md5) for path, md5 in used.items() if path.endswith(".parquet")]:
            _client().log_inputs(self.run_id, tables)

    def warn(self, name: str, message: str) -> None:
        """A named warning: in the log, and as the tag `warning.<name>` of the run."""
        if is_main():
            print(f"\nwarning [{name}]: {message}", file=sys.stderr)
        if self.run_id is not None:
            _client().set_tag(self.run_id, f"warning.{name}", message)

    def spent(self, **cost: float) -> None:
        """Cost for the report: `parameters` of a network, tokens trained, generated and read, models held at once."""
        self.cost |= cost

    def finish(self, metrics: dict[str, Any], path: Path, step: int = 0) -> None:
        """The final metrics of the stage: a JSON file for DVC; on MLflow those that no step has logged (nested keys joined by /)."""
        if is_main():
            write_json(metrics, path)
            self._send({name: value for name, value in _flat(metrics).items() if name not in self._logged}, step)

    def curve(self, path: Path) -> None:
        """The rows logged so far as CSV, six digits, one column per metric."""
        if is_main():
            write_curve(self.rows, path)

    def artifact(self, path: Path) -> None:
        """Copy a small file (a figure, a table) to the run."""
        if self.run_id is not None:
            _client().log_artifact(self.run_id, str(path))


def write_json(content: dict[str, Any], path: Path) -> None:
    """Atomically, with six significant digits: what git shows as a change is one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_rounded(content), indent=2) + "\n")
    temporary.replace(path)


def write_curve(rows: list[dict[str, float]], path: Path) -> None:
    import pandas as pd

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w\-./ ]", "_", str(key))  # what MLflow takes; a slash is a level
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}/")
        elif isinstance(value, (int, float)):
            flat[name] = float(value)
    return flat


def _metrics(values: dict[str, float], step: int = 0) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in values.items() if math.isfinite(value)]


def _params(values: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in _leaves(values).items()]


def _client():
    import logging

    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it narrates the making of its tables

    return MlflowClient(tracking_uri=tracking_uri())


def _experiment(name: str) -> str:
    """Id of an experiment, made if need be; locked, for four first starts at once leave one survivor otherwise."""
    from filelock import FileLock

    with FileLock(root() / ".mlflow.lock"):
        client = _client()
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise DataError(
                f"the MLflow experiment {name!r} has been deleted: `mlflow experiments restore -x {found.experiment_id}` brings it "
                "back, `mlflow gc` removes it for good"
            )
        if found is not None:
            return found.experiment_id
        place = (root() / "mlartifacts").as_uri() if tracking_uri().startswith("sqlite") else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's layout for training runs
        return client.create_experiment(name, artifact_location=place, tags=kind)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def locked() -> dict[str, str]:
    """md5 of every output that dvc.lock knows, by path."""
    from ruamel.yaml import YAML

    lock = Path("dvc.lock")
    if not lock.exists():
        return {}
    stages = (YAML(typ="safe").load(lock.read_text()) or {}).get("stages", {})
    return {out["path"]: out.get("md5", "") for stage in stages.values() for out in stage.get("outs", [])}


def _tags(name: str, tags: dict[str, str]) -> dict[str, str]:
    """What one filters on in the UI: stage, method, commit, profile, the DVC experiment."""
    from rlhf_vs_dpo import profiles

    tags = {"dvc.stage": name, "profile": profiles.current(), **tags}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.exp"] = experiment
    if commit := _git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--", *WRITTEN_BY_HAND))).lower()
    return tags | {"processes": os.environ.get("WORLD_SIZE", "1")}


def _device_name() -> str:
    torch = sys.modules.get("torch")  # stages without torch need not import it to say so
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


@contextmanager
def stage(name: str, inputs: list[Path], run_file: Path | None = None, **tags: str) -> Iterator[Run]:
    """The frame of every stage: parameters, one MLflow run, errors a user can act on.

    `name` is used where DVC does not say who we are (a stage started by hand); `inputs` are what it always reads.
    `run_file` receives the run's id and cost when the stage has succeeded. A UserError is printed without a traceback
    and ends the process with status 1; the run is marked FAILED at any exception.
    """
    started = time.monotonic()
    run_id = None
    try:
        params = stage_params(os.environ.get("DVC_STAGE"))
        if is_main():
            run_id = _create(os.environ.get("DVC_STAGE", name), tags)
            _client().log_batch(run_id, params=_params(params))
        run = Run(params, run_id)
        run.reads(*inputs)
        with _watching(run_id):
            yield run
        if is_main():
            run.flush()
            seconds = time.monotonic() - started
            spent = {"seconds": round(seconds, 1), "peak_memory_mib": round(_peak_memory(), 1), **run.cost}
            content = {"run_id": run_id, "device": _device_name(), **spent}
            _client().log_batch(run_id, metrics=_metrics({f"cost/{name}": value for name, value in spent.items()}))
            _client().set_tag(run_id, "device", content["device"])
            if run_file is not None:
                write_json(content, run_file)
            _client().set_terminated(run_id, "FINISHED")
    except BaseException as error:
        if run_id is not None:
            _client().set_terminated(run_id, "FAILED")
        if isinstance(error, UserError):
            print(f"\nerror: {error}\n", file=sys.stderr)
            raise SystemExit(1) from None
        raise


def _create(name: str, tags: dict[str, str]) -> str:
    experiment = _experiment(EXPERIMENT if "policy" in tags and "family" in tags else STAGES)
    return _client().create_run(experiment, run_name=tags.get("policy", name), tags=_tags(name, tags)).info.run_id


def _dataset(path: str, md5: str):
    """A table that a run read, as MLflow shows it: its digest is DVC's, so that `dvc` can bring it back."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": path, "dvc.md5": md5})
    dataset = Dataset(name=Path(path).stem, digest=md5[:36], source_type="local", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "input")])


def _peak_memory() -> float:
    """Most memory that this process held, in MiB: on the GPU where there is one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


@contextmanager
def _watching(run_id: str | None) -> Iterator[None]:
    """System metrics of the run, every SYSTEM_SECONDS, while the body works."""
    if run_id is None:
        yield
        return
    import logging

    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=SYSTEM_SECONDS, tracking_uri=tracking_uri())
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def link(run_id: str) -> str | None:
    """Address of a run in the UI that `make ui` starts; None where this store does not have it."""
    import mlflow.exceptions

    try:
        experiment = _client().get_run(run_id).info.experiment_id
    except mlflow.exceptions.MlflowException:
        return None
    return f"{_ui()}/#/experiments/{experiment}/runs/{run_id}"


def _ui() -> str:
    """Address of the UI: a tracking server has its own, everything else that of `make ui`."""
    uri = tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else UI


def publish(entries: list[dict[str, Any]], judge: str, say: Callable[[str], None]) -> None:
    """Put what was measured of each policy onto the MLflow run that made it, and register the policy.

    Entries are those of `evaluation.tables.for_tracking`. A run that is not in this store (weights pulled from a
    colleague) is only mentioned. Every policy is a version of the registered model REGISTERED, an external one, for its
    weights stay in DVC; the alias `best` is the one that is best on validation prompts. The UI gets a view of all runs,
    ordered by `judge`.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(tracking_uri())
    client, known = _client(), locked()
    versions: dict[str, str] = {}
    with bar(len(entries), "MLflow", "policy") as progress:
        for entry in entries:
            progress.update()
            try:
                run_id = _run_of(entry)
                found = client.get_run(run_id)
                if found.info.lifecycle_stage == "deleted":
                    raise MlflowException("the run has been deleted")
                _put(entry, found, known)
                if md5 := known.get(f"models/{entry['folder']}"):
                    versions[entry["folder"]] = _register(entry, run_id, md5)
            except MlflowException as error:
                say(f"{entry['folder']}: nothing was added to its MLflow run: {str(error).splitlines()[0]}")
    _share_view(judge)
    judged = {entry["folder"]: entry["validation"] for entry in entries if entry["validation"] is not None}
    judged = {folder: value for folder, value in judged.items() if math.isfinite(value)}
    best = max(judged, key=judged.__getitem__, default=None)
    if best is not None and best not in versions:
        say(
            f"best on validation prompts: {best} ({judged[best]:.2f}), whose run is not here; {REGISTERED}@best stays what it was"
        )
    elif best is not None and "DVC_EXP_NAME" not in os.environ:  # an experiment is a question, not yet an answer
        client.set_registered_model_alias(REGISTERED, "best", versions[best])
        say(f"best on validation prompts: {best} ({judged[best]:.2f}); MLflow model {REGISTERED}@best")


def _put(entry: dict[str, Any], run: Any, known: dict[str, str]) -> None:
    """Metrics, parameters, samples and the experiments that used it, onto the run of a policy."""
    from rlhf_vs_dpo import profiles

    client, run_id = _client(), run.info.run_id
    # MLflow appends: what a run has already is not said again when evaluation runs again.
    told = {(key, 0): value for key, value in run.data.metrics.items() if key in entry["metrics"]}
    for key in {key for _, row in entry["steps"] for key in row}:
        for point in sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp):
            told[key, point.step] = point.value  # the last word of each step
    batch = [m for step, row in [(0, entry["metrics"]), *entry["steps"]] for m in _metrics(row, step)]
    batch = [m for m in batch if told.get((m.key, m.step)) != m.value]
    for start in range(0, len(batch), BATCH):
        client.log_batch(run_id, metrics=batch[start : start + BATCH])
    settings = _params({"method": entry["settings"]})
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


def _share_view(judge: str) -> None:
    """A view of the runs worth opening: best first, with the columns of the report. (A tag, as the UI's share button sets.)"""
    metrics = (
        judge,
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
        "searchFilter": "", "orderByKey": f"metrics.`evaluation/{judge}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": columns,
    }  # fmt: skip
    _client().set_experiment_tag(_experiment(EXPERIMENT), f"mlflow.sharedViewState.{VIEW}", json.dumps(state))


def address() -> str:
    """Where the UI of `make ui` shows the comparison."""
    return f"{_ui()}/#/experiments/{_experiment(EXPERIMENT)}/runs?viewStateShareKey={VIEW}"


def _run_of(entry: dict[str, Any]) -> str:
    """The run of a policy; best-of-n without training has none, and gets one of its own beside the pool's."""
    folder = entry["folder"]
    if entry["family"] != "best_of_n":
        return read_run(Path("runs") / f"{folder}.json")["run_id"]
    pool = read_run(Path("runs") / "pool.json")["run_id"]
    client, experiment = _client(), _experiment(EXPERIMENT)
    found = client.search_runs([experiment], f"tags.policy = '{folder}' and tags.`pool.run` = '{pool}'", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {"policy": folder, "method": folder, "family": "best_of_n", "pool.run": pool}
    created = client.create_run(experiment, run_name=folder, tags=_tags("evaluate", tags)).info.run_id
    Run({}, created).reads(Path("data/pool.parquet"))
    client.set_terminated(created, "FINISHED")
    return created


def _register(entry: dict[str, Any], run_id: str, md5: str) -> str:
    """The version under which a policy is registered; made if it is new."""
    import contextlib
    import io

    import mlflow

    client = _client()
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


def read_run(path: Path) -> dict[str, Any]:
    """The content of a runs/*.json file."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); `dvc repro` makes it") from None


if __name__ == "__main__":  # `make ui`
    print(address())
