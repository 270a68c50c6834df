"""The MLflow store: where it is, how it is made, and what a user is told when it cannot be opened.

One flat run for each executed stage: those that make a policy in the experiment EXPERIMENT, one row each, the others in
STAGES. The run's id is a stage output (runs/<name>.json, cached by DVC), so that it comes back from the run cache with the
weights it belongs to, and evaluation lands on the run of the policy it measured.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.run import atomic
from rlhf_vs_dpo.run.pipeline import root

EXPERIMENT = "rlhf-vs-dpo"  # a row per policy
STAGES = "rlhf-vs-dpo stages"  # everything else that ran
STUDY = "rlhf-vs-dpo study"  # what `make tune` runs: trials, each under the search that it is part of
UI = "http://127.0.0.1:5000"  # of `make ui`
VIEW = "comparison"  # the view of the runs that `make ui` opens
BATCH = 1000  # metrics that MLflow takes at once
JOURNAL = "journal:"  # how the id of a run begins that MLflow did not know yet when its stage ended (run/journal.py)
LOCKED_SECONDS = 60  # how long a process waits for others that write to the same SQLite file

# MLflow would tell its makers of every run. Read when it is imported, which nothing does before this.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root()}/mlflow.db")


def database() -> Path | None:
    """The file of a local store; None where MLflow is a server, or another database."""
    uri = tracking_uri()
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def client():
    """A client of the store, which must be there: `experiment` makes it."""
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it narrates tables that are made, and locks
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # `journal` tries again, and says so
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    file = database()
    return MlflowClient(tracking_uri=tracking_uri() if file is None else f"sqlite:///{file}?timeout={LOCKED_SECONDS}")


def experiment(name: str) -> str:
    """Id of an experiment; it, and the store, are made if need be.

    Raises DataError where the store is damaged or out of reach, or the experiment deleted.
    """
    from filelock import FileLock

    # Locked: of four first starts at once, one would survive.
    with FileLock(root() / ".mlflow.lock"):
        try:
            _make()
            found = client().get_experiment_by_name(name)
        except Exception as error:  # MLflow lets through what SQLAlchemy, Alembic, SQLite and requests raise
            raise _unusable(error) from error
        if found is not None and found.lifecycle_stage == "deleted":
            raise DataError(
                f"the MLflow experiment {name!r} has been deleted: `mlflow experiments restore -x {found.experiment_id}` brings it "
                "back, `mlflow gc` removes it for good"
            )
        if found is not None:
            return found.experiment_id
        place = (root() / "mlartifacts").as_uri() if database() is not None else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's layout for training runs
        return client().create_experiment(name, artifact_location=place, tags=kind)


def _make() -> None:
    """The tables of a local store that is not there yet: made aside and renamed, for half of them can never be opened again."""
    file = database()
    if file is None or file.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    with atomic.writing(file) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary}", (root() / "mlruns").as_uri()).engine.dispose()


def _unusable(error: Exception) -> DataError:
    """What a user can do about a store that does not open."""
    file, said = database(), (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if file is None:
        return DataError(
            f"MLflow at {tracking_uri()} cannot be used ({said}); start it, or unset MLFLOW_TRACKING_URI for a store of this folder"
        )
    return DataError(
        f"{file}: MLflow cannot open its store ({said}). Set it aside with `mv {file} {file}.damaged` and run again: a new one is "
        "made; weights, tables and reports are DVC's and lose nothing, runs recorded so far stay in the file set aside"
    )


def metrics(values: dict[str, float], step: int = 0, at: int | None = None) -> list[Any]:
    """What MLflow can take of `values`: it has no NaN. `at` is when they were said, in milliseconds; None: now."""
    import math

    from mlflow.entities import Metric

    at = int(time.time() * 1000) if at is None else at
    return [Metric(name, float(value), at, step) for name, value in values.items() if math.isfinite(value)]


def params(values: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in _leaves(values).items()]


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def datasets(paths: dict[str, str]) -> list[Any]:
    """Tables that a run read, path -> md5, as MLflow shows them: the digest is DVC's, so that `dvc` can bring them back."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=Path(path).stem,
                digest=md5[:36],
                source_type="local",
                source=json.dumps({"uri": path, "dvc.md5": md5}),
            ),
            [InputTag("mlflow.data.context", "input")],
        )
        for path, md5 in paths.items()
        if path.endswith(".parquet")
    ]


def ui() -> str:
    """Address of the UI: a tracking server has its own, everything else that of `make ui`."""
    uri = tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else UI


def known_as(run_id: str) -> str:
    """The id of a run; of one that had none yet when its stage ended (`journal:<key>`) the id that it has got since.

    Raises MlflowException where this store does not have it.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    key = run_id.removeprefix(JOURNAL)
    if key == run_id:
        return run_id
    places = [place.experiment_id for place in client().search_experiments()]
    found = client().search_runs(places, f"tags.journal = '{key}'", max_results=1)
    if not found:
        raise MlflowException(f"{run_id} has not been sent to this store yet", error_code=RESOURCE_DOES_NOT_EXIST)
    return found[0].info.run_id


def link(run_id: str) -> str | None:
    """Address of a run in the UI that `make ui` starts; None where this store does not have it."""
    import mlflow.exceptions

    try:
        run_id = known_as(run_id)
        found = client().get_run(run_id).info.experiment_id
    except mlflow.exceptions.MlflowException:
        return None
    return f"{ui()}/#/experiments/{found}/runs/{run_id}"


def address() -> str:
    """Where the UI of `make ui` shows the comparison."""
    return f"{ui()}/#/experiments/{experiment(EXPERIMENT)}/runs?viewStateShareKey={VIEW}"


if __name__ == "__main__":  # `make ui`
    import sys

    try:
        print(address())
    except DataError as error:
        sys.exit(f"error: {error}")
