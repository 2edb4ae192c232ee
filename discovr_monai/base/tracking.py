"""MLflow: its store, how experiments look when they are opened, and the runs of evaluations.

Trainings are runs of one experiment. In the evaluations' experiment a run stands for a checkpoint
(on one data set, by one branch) and holds the few figures that sum its evaluations up; these are
its children. So one table says which checkpoint is best, and how it was trained.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from discovr_monai.base.running import end_dead_runs, hold, release

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VIEW = "discovr"  # the id of our view of an experiment


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
    shared, own = Path(bundle_root).resolve() / "output", Path(output_dir).resolve()
    folder = shared if own.is_relative_to(shared) else own
    return f"sqlite:///{folder / 'mlruns.db'}"


def versions() -> dict[str, str]:
    """Versions of what matters, and the git commit where there is one."""
    found = {p: version(p) for p in ("discovr-monai", "torch", "monai", "pytorch-ignite", "numpy")}
    try:
        here = Path(__file__).parent
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        found["git_commit"] = run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git_commit"] = "unknown"
    return found


def store_file(tracking_uri: str) -> Path | None:
    """The file of a SQLite store, None for other stores."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    from sqlalchemy import make_url

    return Path(make_url(tracking_uri).database or "mlruns.db")


def artifacts_place(tracking_uri: str) -> str | None:
    """Where a store's pictures and tables lie: "mlruns" beside a SQLite file; None: its own way."""
    file = store_file(tracking_uri)
    return None if file is None else (file.parent / "mlruns").resolve().as_uri()


def make_store(tracking_uri: str) -> None:
    """Makes the SQLite file of a store where it is missing; other stores are left alone.

    MLflow leads a new file through all of its past layouts and waits for the disk after each of
    some hundred statements. Here it does so in a temporary file without waiting, which is renamed
    once it is whole and on disk; a file that another process made meanwhile stays.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address.

    Raises:
        OSError: if the folder cannot be written.
    """
    file = store_file(tracking_uri)
    if file is None or file.exists():
        return
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    file.parent.mkdir(parents=True, exist_ok=True)
    ending = f".{uuid.uuid4().hex}.tmp"
    temporary = file.with_name(file.name + ending)
    event.listen(Pool, "connect", _never_wait)
    try:
        store = SqlAlchemyStore(tracking_uri + ending, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        try:
            file.hardlink_to(temporary)
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links
            temporary.replace(file)
    finally:
        event.remove(Pool, "connect", _never_wait)
        temporary.unlink(missing_ok=True)


def _never_wait(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a store that is made where it is missing, and says KILLED of what was killed."""
    from mlflow.tracking import MlflowClient

    make_store(tracking_uri)
    client = MlflowClient(tracking_uri)
    end_dead_runs(client, store_file(tracking_uri))
    return client


def begin_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str] | None = None
) -> str:
    """A new run, known to be alive until :func:`end_run` or the end of this process; its id."""
    run: str = client.create_run(experiment, run_name=name, tags=dict(tags or {})).info.run_id
    hold(store_file(client.tracking_uri), run)
    return run


def end_run(client: MlflowClient, run: str, status: str = "FINISHED") -> None:
    """Ends what :func:`begin_run` began."""
    client.set_terminated(run, status)
    release(store_file(client.tracking_uri), run)


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
    known = client.get_experiment(experiment).tags
    for key, value in tags.items():
        if key not in known:
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

    It listens on this machine only, sends nothing anywhere, and ends with Ctrl-C. Runs whose
    process was killed are marked first.

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
    connect(uri)
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
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = connect(tracking_uri)
    known = client.get_experiment_by_name(experiment)
    place = artifacts_place(tracking_uri)
    owner = known.experiment_id if known else client.create_experiment(experiment, place)
    save_view(client, owner, CHECKPOINTS)
    training = dict(settings.get("training") or {})
    own = {k: v for k, v in settings.items() if k != "training"}
    subject: dict[str, str] = {k: str(own[k]) for k in ("checkpoint", "branch", "data") if k in own}
    parent, name = _checkpoint_run(client, owner, subject, training)
    tags = {"kind": "evaluation", "task": task, "mlflow.parentRunId": parent}
    tags |= {**subject, **_words(training)}
    run = begin_run(client, owner, f"{task}: {name}", tags)
    _log(client, run, {"task": task, **training, **own}, {**metrics, **headlines})
    for file in artifacts:
        client.log_artifact(run, str(file))
    end_run(client, run)
    _log(client, parent, {}, headlines)


def _checkpoint_run(
    client: MlflowClient, owner: str, subject: Mapping[str, str], training: Mapping[str, Any]
) -> tuple[str, str]:
    """The run that stands for a checkpoint, made where it is missing: its id and name."""
    tags = {"kind": "checkpoint", **subject}
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([owner], wanted, max_results=1, order_by=["start_time ASC"])
    if found:
        return found[0].info.run_id, str(found[0].info.run_name)
    words = [str(training["preset"])] if "preset" in training else []
    words += [f"seed {training['seed']}"] if "seed" in training else []
    words += [subject["branch"].replace("_", " ")] if "branch" in subject else []
    name = ", ".join(words) or "checkpoint"
    if "checkpoint" in subject:
        name += f" ({subject['checkpoint'][:6]})"
    run = begin_run(client, owner, name, {**tags, **_words(training)})
    _log(client, run, {**training, **subject}, {})
    end_run(client, run)
    return run, name


def _words(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


def _log(
    client: MlflowClient, run: str, parameters: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    client.log_batch(
        run,
        metrics=[Metric(k, v, now, 0) for k, v in metrics.items() if math.isfinite(v)],
        params=[Param(k, v) for k, v in _words(parameters).items()],
        tags=[RunTag(k, v) for k, v in versions().items()],
    )
