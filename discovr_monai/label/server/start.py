"""Starts MONAI Label on an archive: reachable from this machine only, unless told otherwise."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import ssl
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from discovr_monai.base.notice import NOTICE
from discovr_monai.base.privacy import is_loopback
from discovr_monai.label.archive.studies import Studies
from discovr_monai.label.server.guard import Guard

APP = Path(__file__).parent / "app"
TOKEN_VARIABLE = "DISCOVR_MONAI_LABEL_TOKEN"


def serve(
    studies: str | Path,
    model: str | Path,
    *,
    work: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    view: str | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    readers: int = 1,
    tracking_uri: str | None = None,
) -> None:
    """Serves until it is stopped, and presents new cines in the background.

    Args:
        studies: the archive, which is never written to.
        model: with heads, such as the bundle's models/model.pt.
        work: where cines are presented and labels saved; ``studies``-label beside it if None.
        host: another address than this machine's own needs the token that is printed, or that
            $DISCOVR_MONAI_LABEL_TOKEN holds.
        port: 0 for any that is free.
        view: of the cines whose datalist row names none.
        certificate, key: PEM files, for https.
        readers: processes that read new cines.
        tracking_uri: MLflow's store for the trainings; one in :attr:`Studies.private` if None.

    Raises:
        ValueError, OSError: with what to do.
    """
    source = Path(studies)
    place = Path(work) if work is not None else source.with_name(f"{source.resolve().name}-label")
    archive = Studies(source.resolve(), place.resolve())
    if not Path(model).is_file():
        raise FileNotFoundError(f"model {Path(model).name!r} does not exist. Check --model")
    check_certificate(certificate, key)
    if find_spec("monailabel") is None:
        raise ValueError("MONAI Label is not installed: make label")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not is_loopback(host):
        token = secrets.token_urlsafe(32)
        print(f"Token: {token}", flush=True)
    archive.prepare()
    with (archive.private / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another server is at work on {archive.work.name!r}") from None
        conf = {
            "source": str(archive.source),
            "model": str(Path(model).resolve()),
            "view": view or "",
            "tracking_uri": tracking_uri or f"sqlite:///{archive.private / 'mlruns.db'}",
        }
        app = start_app(archive, conf, port)
        present = (archive, app.datastore(), readers)
        presenter = threading.Thread(target=_present, args=present, daemon=True)
        run(Guard(_application(app), token), app, host, port, certificate, key, presenter)


def check_certificate(certificate: str | Path | None, key: str | Path | None) -> None:
    """Refuses what https could not be served with, before anything is made.

    Args:
        certificate, key: PEM files; the key may stand in the certificate's.

    Raises:
        ValueError, OSError: with what to do.
    """
    if certificate is None:
        if key is not None:
            raise ValueError("--key needs --certificate beside it")
        return
    for option, file in (("certificate", certificate), ("key", key)):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(
                f"{option} {Path(file).name!r} does not exist. Check --{option}"
            )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:  # with any password, or ssl would ask the terminal for one
        context.load_cert_chain(certificate, key, password=lambda: "none")
    except OSError:  # an ssl error, whose own text helps nobody
        names = " and ".join(repr(Path(file).name) for file in (certificate, key) if file)
        raise ValueError(
            f"{names}: no certificate and its key, in PEM and without a password. "
            "Check --certificate and --key"
        ) from None


def start_app(archive: Studies, conf: dict[str, str], port: int) -> Any:
    """MONAI Label's app over prepared studies.

    Its settings are put into the environment, because trainings and scorings run in processes of
    their own. What clients send lies in a private folder for as long as it is looked at.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    temporary = archive.private / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed server or training left
    temporary.mkdir(mode=0o700)
    os.environ |= {
        "TMPDIR": str(temporary),
        "MONAI_LABEL_APP_DIR": str(APP),
        "MONAI_LABEL_STUDIES": str(archive.work),
        "MONAI_LABEL_APP_CONF": json.dumps(conf),
        "MONAI_LABEL_AUTH_ENABLE": "false",  # the guard asks for the token
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false",
        "MONAI_LABEL_SESSIONS": "false",
        "MONAI_LABEL_TRACKING_ENABLED": "false",
        "MONAI_LABEL_SERVER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    tempfile.tempdir = str(temporary)
    from monailabel.interfaces.utils.app import app_instance

    logging.getLogger("monailabel").setLevel(logging.WARNING)  # below, it logs requests and paths
    instance = app_instance()
    instance.server_mode(True)
    return instance


def _application(app: Any) -> Any:
    """The ASGI application of MONAI Label's routes that are served."""
    from monailabel.endpoints import (
        activelearning,
        batch_infer,
        datastore,
        infer,
        info,
        scoring,
        train,
    )

    from discovr_monai.label.server.routes import DATASTORE, TASKS, build

    modules = (activelearning, batch_infer, datastore, infer, info, scoring, train)
    return build([module.router for module in modules], DATASTORE | TASKS, app)


def run(
    guarded: Any,
    app: Any,
    host: str,
    port: int,
    certificate: str | Path | None,
    key: str | Path | None,
    presenter: threading.Thread,
) -> None:
    """Runs a guarded application until it is stopped.

    Once it is ready, it says what to open, and starts the presenter.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                bound = self.servers[0].sockets[0].getsockname()[1]
                name = f"[{host}]" if ":" in host else host
                address = f"{'https' if certificate else 'http'}://{name}:{bound}"
                count = len(app.datastore().list_images())
                print(
                    f"{count} cines so far; new ones are being read. {NOTICE}\n"
                    f"Ready. Open 3D Slicer, module MONAI Label, and enter the server {address}",
                    flush=True,
                )
                presenter.start()

    config = uvicorn.Config(
        guarded,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        limit_concurrency=64,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
        ssl_certfile=str(certificate) if certificate else None,
        ssl_keyfile=str(key) if key else None,
    )
    Server(config).run()


def _present(archive: Studies, datastore: Any, readers: int) -> None:
    """Lists the cines that were presented earlier, then presents the new ones."""
    try:
        datastore.take_in(archive.records())
        new = {}
        for record in archive.present(readers):
            new[record["id"]] = record
            if len(new) >= 16:
                datastore.take_in(new)
                new.clear()
        datastore.take_in(new)
        records = archive.records().values()
        bad = sum("bad" in r for r in records)
        print(f"{len(records) - bad} cines presented, {bad} files set aside", flush=True)
    except (ValueError, OSError) as error:
        print(f"Not all studies could be presented: {error}", file=sys.stderr, flush=True)
