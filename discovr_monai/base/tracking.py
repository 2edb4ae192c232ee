"""MLflow: its store, how experiments look when they are opened, and the runs of evaluations.

Trainings are runs of one experiment. In the evaluations' experiment a run stands for a checkpoint
(on one data set, by one branch) and holds the few figures that sum its evaluations up; these are
its children. So one table says which checkpoint is best, and how it was trained.

Only a run itself tells MLflow that it has ended: one that is killed would stay RUNNING. Runs are
therefore tagged with a salted hash of their output folder, and the next run that starts in the same
folder and experiment marks those before it as KILLED.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from discovr_monai.base.privacy import load_salt, salted_id

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VIEW = "discovr"  # the id of our view of an experiment
FOLDER_TAG = "output_folder"  # of a run: the salted hash of where it writes


class View(NamedTuple):
    """How an experiment's table looks: a saved view of MLflow's pages.

    Attributes:
        name: in the list of views.
        about: the experiment's description.
        parameters, metrics: columns.
        order: the metric that rows are sorted by; its smallest first if ``ascending``.
        only: MLflow's filter of rows.
    """

    name: str
    about: str
    parameters: Sequence[str]
    metrics: Sequence[str]
    order: str
    ascending: bool
    only: str = ""


TRAININGS = View(
    "Trainings",
    "Pretrainings. A run has its loss curves, its settings, pictures of what the network sees, and "
    "figures that tell a collapse.",
    ("preset", "seed", "epochs", "cines", "global_batch"),
    ("epoch_loss", "val_loss", "epoch_video_information", "epoch_image_information"),
    "val_loss",
    True,
)
CHECKPOINTS = View(
    "Which is best, and why",
    "What checkpoints are worth. A row is a checkpoint as seen by one branch on one data set; it "
    "opens to its evaluations, each with figures, intervals, pictures and report.html.",
    ("preset", "seed", "branch", "epochs", "cines", "weights"),
    (
        "kNN macro F1",
        "kNN AUROC",
        "probe macro F1",
        "probe AUROC",
        "anomaly AUROC",
        "EF MAE",
        "EF R2",
        "Dice",
    ),
    "EF MAE",
    True,
    "tags.kind = 'checkpoint'",
)


def unique_run_name(prefix: str = "discovr") -> str:
    """A run name that no other run has: MLflow would otherwise join unfinished runs."""
    return f"{prefix} ({uuid.uuid4().hex[:6]})"


def training_store(bundle_root: str, output_dir: str) -> str:
    """The store of a training: with all others in the bundle's output folder, or in its own.

    So that one page compares everything made in a bundle, and a training whose output goes
    elsewhere (a cluster's volume) writes nowhere else.
    """
    shared, output = Path(bundle_root).resolve() / "output", Path(output_dir).resolve()
    folder = shared if output.is_relative_to(shared) else output
    return f"sqlite:///{folder / 'mlruns.db'}"


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result, and the git commit where there is one."""
    names = ("discovr-monai", "torch", "monai", "pytorch-ignite", "numpy")
    by_package = {name: version(name) for name in names}
    command = ["git", "rev-parse", "HEAD"]
    try:
        here = Path(__file__).parent
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        by_package["git_commit"] = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        by_package["git_commit"] = "unknown"
    return by_package


def store_file(tracking_uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores.

    >>> str(store_file("sqlite:////data/mlruns.db"))
    '/data/mlruns.db'
    >>> store_file("http://127.0.0.1:5000") is None
    True
    """
    if not tracking_uri.startswith("sqlite:///"):
        return None
    from sqlalchemy import make_url

    return Path(make_url(tracking_uri).database or "mlruns.db")


def artifacts_place(tracking_uri: str) -> str | None:
    """The folder "mlruns" beside a SQLite file, for pictures and tables; None for other stores."""
    file = store_file(tracking_uri)
    return None if file is None else (file.parent / "mlruns").resolve().as_uri()


def make_store(tracking_uri: str) -> None:
    """Makes the SQLite file of a store where it is missing; other stores are left alone.

    MLflow leads a new file through all of its past layouts and waits for the disk after each of
    some hundred statements. Here it does so in a temporary file without waiting, which is renamed
    once it is whole and on disk. A file that another process has made meanwhile stays.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address.

    Raises:
        OSError: if the folder cannot be written.
    """
    file = store_file(tracking_uri)
    if file is None or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_schema(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        try:
            file.hardlink_to(temporary)
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _write_schema(file: Path) -> None:
    """MLflow's tables in a new SQLite file, without waiting for the disk."""
    from mlflow.store.db.utils import _initialize_tables
    from sqlalchemy import create_engine

    def unsynchronised() -> sqlite3.Connection:
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")
        return connection

    engine = create_engine("sqlite://", creator=unsynchronised)
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a store, which is made if it is missing."""
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # not each table that it makes
    make_store(tracking_uri)
    return MlflowClient(tracking_uri)


def open_experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, which is made if it is missing."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    return str(client.create_experiment(name, artifacts_place(client.tracking_uri)))


def folder_tag(output_dir: str | Path | None) -> dict[str, str]:
    """The tag of a run that writes to a folder: the same for the same folder, and no path."""
    if output_dir is None:
        return {}
    return {FOLDER_TAG: salted_id(str(Path(output_dir).resolve()), load_salt())}


def end_killed_runs(client: MlflowClient, experiment: str, output_dir: str | Path | None) -> int:
    """Marks the RUNNING runs of an experiment and folder as KILLED when their last metric came.

    To be called when a run starts in ``output_dir``: the one before it there is over. Runs of other
    folders and experiments are not touched.

    Args:
        client: of the store.
        experiment: its id.
        output_dir: of the run that starts; None marks nothing.

    Returns:
        How many were marked.
    """
    tag = folder_tag(output_dir)
    if not tag:
        return 0
    wanted = f"attributes.status = 'RUNNING' and tags.`{FOLDER_TAG}` = '{tag[FOLDER_TAG]}'"
    runs = client.search_runs([experiment], wanted)
    for run in runs:
        times = [metric.timestamp for metric in run.data._metric_objs]
        client.set_terminated(run.info.run_id, "KILLED", max([run.info.start_time, *times]))
    return len(runs)


def save_view(client: MlflowClient, experiment: str, view: View) -> None:
    """Gives an experiment its description and its view, unless it has them already."""
    columns = [f"params.`{name}`" for name in view.parameters]
    columns += [f"metrics.`{name}`" for name in view.metrics]
    state = {
        "selectedColumns": columns,
        "columnWidths": {"attributes.`Run Name`": 320},
        "orderByKey": f"metrics.`{view.order}`",
        "orderByAsc": view.ascending,
        "searchFilter": view.only,
    }
    now = int(time.time() * 1000)
    content = {"name": view.name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    tags = {
        "mlflow.note.content": view.about,
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW}": json.dumps(content),
    }
    present = client.get_experiment(experiment).tags
    for key, value in tags.items():
        if key not in present:
            client.set_experiment_tag(experiment, key, value)


def addresses(tracking_uri: str, server: str) -> dict[str, str]:
    """Experiment -> the address of its table under a server's address."""
    from mlflow.tracking import MlflowClient

    kind = "workflowType=machine_learning"
    return {
        e.name: f"{server}/#/experiments/{e.experiment_id}/runs?{kind}"
        + (f"&viewStateShareKey={VIEW}" if f"mlflow.sharedViewState.{VIEW}" in e.tags else "")
        for e in MlflowClient(tracking_uri).search_experiments()
        if e.name != "Default"
    }


def serve(store: str | Path, port: int = 5000) -> None:
    """Says where the experiments of a store are to be seen and becomes MLflow's server.

    It listens on this machine only, sends nothing anywhere, and ends with Ctrl-C.

    Args:
        store: the SQLite file.
        port: of the server.

    Raises:
        ValueError: if there is no such file.
    """
    file = Path(store)
    if not file.is_file():
        raise ValueError(f"{file.name} does not exist: train or evaluate first, or name the store")
    uri, server = f"sqlite:///{file.resolve()}", f"http://127.0.0.1:{port}"
    for name, address in addresses(uri, server).items():
        print(f"{name}: {address}", flush=True)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # nine processes that nobody asks
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--default-artifact-root", str(artifacts_place(uri)), "--workers", "1"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port)])


def log_evaluation(
    tracking_uri: str,
    *,
    experiment: str,
    task: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    headlines: Mapping[str, float],
    artifacts: Sequence[Path],
    output_dir: Path | None = None,
) -> None:
    """Writes one finished evaluation, and its headlines to the run of its checkpoint.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address; its artifacts lie
            beside a SQLite file.
        experiment: is made where it is missing.
        task: "knn", "lvef", ...
        settings: never a path or a patient's name. "checkpoint", "branch" and "data" tell whose
            evaluation it is; "training" is how the checkpoint was made.
        metrics: of the evaluation; those that are not finite are left out.
        headlines: what sums it up.
        artifacts: files.
        output_dir: of the evaluation; one that was killed while it wrote from there is marked.
    """
    client = connect(tracking_uri)
    owner = open_experiment(client, experiment)
    end_killed_runs(client, owner, output_dir)
    save_view(client, owner, CHECKPOINTS)
    training = dict(settings.get("training") or {})
    evaluation = {k: v for k, v in settings.items() if k != "training"}
    subject = {k: str(settings[k]) for k in ("checkpoint", "branch", "data") if k in settings}
    folder = folder_tag(output_dir)
    parent, name = _checkpoint_run(client, owner, subject, training, folder)
    tags = {"kind": "evaluation", "task": task, "mlflow.parentRunId": parent}
    tags |= {**subject, **_as_text(training), **folder}
    run = client.create_run(owner, run_name=f"{task}: {name}", tags=tags).info.run_id
    _log(client, run, {"task": task, **training, **evaluation}, {**metrics, **headlines})
    for file in artifacts:
        client.log_artifact(run, str(file))
    client.set_terminated(run)
    _log(client, parent, {}, headlines)


def _checkpoint_run(
    client: MlflowClient,
    experiment: str,
    subject: Mapping[str, str],
    training: Mapping[str, Any],
    folder: Mapping[str, str],
) -> tuple[str, str]:
    """The run that stands for a checkpoint, made where it is missing: its id and name."""
    tags = {"kind": "checkpoint", **subject}
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([experiment], wanted, max_results=1, order_by=["start_time ASC"])
    if runs:
        return runs[0].info.run_id, str(runs[0].info.run_name)
    words = [str(training["preset"])] if "preset" in training else []
    words += [f"seed {training['seed']}"] if "seed" in training else []
    words += [subject["branch"].replace("_", " ")] if "branch" in subject else []
    name = ", ".join(words) or "checkpoint"
    if "checkpoint" in subject:
        name += f" ({subject['checkpoint'][:6]})"
    tags |= {**_as_text(training), **folder}
    run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    _log(client, run, {**training, **subject}, {})
    client.set_terminated(run)
    return run, name


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


def _log(
    client: MlflowClient, run: str, parameters: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    client.log_batch(
        run,
        metrics=[Metric(k, v, now, 0) for k, v in metrics.items() if math.isfinite(v)],
        params=[Param(k, v) for k, v in _as_text(parameters).items()],
        tags=[RunTag(k, v) for k, v in versions().items()],
    )
