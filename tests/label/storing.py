"""Servers of the datastore's routes that start in a moment: forked from one process.

MONAI Label's handlers, our datastore, routes and guard are the real ones. Two of MONAI Label's
modules that would import torch and monai for what storing never does are left out.

    python storing.py WORK      each line on stdin starts a server; its pid and port are printed
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import discovr_monai.label.server  # noqa: F401  before any module of MONAI Label


def leave_out() -> None:
    """Pure functions of one module, written again; of the other only a name is used."""
    app = ModuleType("monailabel.interfaces.app")
    app.MONAILabelApp = object
    generic = ModuleType("monailabel.utils.others.generic")
    generic.file_ext = lambda name: "".join(Path(name).suffixes)
    generic.remove_file = lambda path: Path(path).unlink(missing_ok=True)
    generic.get_mime_type = lambda file: "application/octet-stream"
    generic.file_checksum = lambda file, algo="SHA256": ""
    sys.modules |= {app.__name__: app, generic.__name__: generic}


class App:
    """What the handlers use of an app."""

    def __init__(self, datastore) -> None:
        self.datastore = lambda: datastore

    def on_save_label(self, image: str, label: str) -> None:
        """Nothing."""


def main(work: Path) -> None:
    leave_out()
    import uvicorn  # noqa: F401  before the fork
    from monailabel.config import settings
    from monailabel.endpoints import datastore
    from monailabel.interfaces.utils.app import apps

    from discovr_monai.label.archive.studies import Studies
    from discovr_monai.label.server.datastore import CineDatastore
    from discovr_monai.label.server.guard import Guard
    from discovr_monai.label.server.routes import DATASTORE, build
    from discovr_monai.label.server.start import run

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for _ in sys.stdin:
        if pid := os.fork():
            print("pid", pid, flush=True)
            continue
        Studies(work.parent / "studies", work, b"salt").prepare()
        app = App(CineDatastore(work))
        apps[f"{settings.MONAI_LABEL_APP_DIR}{settings.MONAI_LABEL_STUDIES}"] = app
        served = build([datastore.router], DATASTORE, app)
        presenter = threading.Thread(target=lambda: None)
        run(Guard(served), app, "127.0.0.1", 0, None, None, presenter)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
