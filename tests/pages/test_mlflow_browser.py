"""``discovr-monai mlflow`` in a browser: tables that say which is best, a run's curves and pictures."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from ignite.engine import Engine, Events
from mlflow.tracking import MlflowClient
from PIL import Image

from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import mean_metric
from discovr_monai.pages.overlay import save_overlay
from discovr_monai.training.mlflow_handler import Tracking
from tests.pages.test_pages_browser import browser  # noqa: F401 (fixture)

PATIENCE = 120_000  # ms: the pages are large and the machine may be busy
TRAINING = "discovr, seed 0 (abc123)"
METHODS = {"discovr": 6.0, "videomae": 7.5, "sigma": 9.0}  # -> error of the EF


def train(store: str, folder: Path) -> None:
    """A training of three epochs whose loss falls, with a picture."""

    def step(engine, _):
        return [{"loss": 9.0 / engine.state.iteration, "clips": 2.0}]

    Image.fromarray(np.full((40, 90), 90, np.uint8)).save(folder / "tokens.png")
    engine = Engine(step)
    parameters = {"preset": "discovr", "seed": 0, "epochs": 3, "cines": 8, "embed_dim": 24}
    tracking = Tracking(store, TRAINING, parameters)
    tracking.attach(engine)

    last = Events.EPOCH_COMPLETED(once=3)
    engine.add_event_handler(last, lambda _: tracking.log_picture(folder / "tokens.png"))
    engine.run([None] * 4, max_epochs=3)


def evaluate(store: str, folder: Path, method: str, error: float) -> None:
    """An evaluation with a headline, an animation and its report."""
    settings = {
        "checkpoint": hashlib.sha256(method.encode()).hexdigest()[:16],
        "training": {"preset": method, "seed": 0, "epochs": 3, "cines": 8, "weights": {"video": 1.0}},
        "data": "0f0f0f0f",
        "branch": "video_teacher",
    }  # fmt: skip
    rows = [{"image": f"{i}.avi", "id": f"id{i}", "patient": f"p{i}"} for i in range(4)]
    results = Results("lvef", folder / method, settings=settings, draws=10, tracking_uri=store)
    values = error + np.arange(4) / 10
    results.add(
        "test",
        "ridge",
        rows,
        lambda w: {"mae": mean_metric(values, w)},
        headlines={"mae": "EF MAE"},
    )
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 16)).astype(np.uint8)
    labels = np.zeros((5, 16, 16), np.uint8)
    labels[:, 4:12, 4:12] = 1
    results.draw("best.gif", "Best.", save_overlay, frames, labels, labels, 10.0)
    results.finish()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Experiment -> the address that the command printed, while its server runs."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = tmp_path_factory.mktemp("store")
    store = f"sqlite:///{folder / 'mlruns.db'}"
    train(store, folder)
    for method, error in METHODS.items():
        evaluate(store, folder, method, error)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "discovr_monai.cli", "mlflow", "mlruns.db", "--port", port]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
    try:
        for _ in range(1500):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        else:
            server.terminate()
        assert server.poll() is None, (folder / "log").read_text()
        yield dict(re.findall(r"^(\S+): (http://\S+)$", (folder / "log").read_text(), re.M))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
        server.wait(30)


@pytest.fixture
def page(browser, pages):  # noqa: F811
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    context.set_default_timeout(PATIENCE)
    asked = []
    opened = context.new_page()
    opened.on("request", lambda r: asked.append(r.url))
    yield opened
    own = next(iter(pages.values())).split("/#")[0]
    assert {a.split("/", 3)[2] for a in asked if a.startswith("http")} == {own.split("//")[1]}
    context.close()


def cell(page, row: str, column: str) -> str:
    """Text of a cell of the table of runs."""
    line = page.locator(".ag-row", has=page.get_by_role("link", name=row)).first
    number = line.get_attribute("row-index")
    found = page.locator(f".ag-row[row-index='{number}'] .ag-cell[col-id*='{column}']").first
    return found.inner_text().strip()


def test_the_first_table_says_which_is_best(page, pages):
    page.goto(pages["discovr-evaluation"])
    names = [f"{m}, seed 0, video teacher" for m in METHODS]
    page.get_by_role("link", name=names[0]).first.wait_for()
    links = page.locator(".ag-row a[href*='/runs/']")
    shown = [t for t in links.all_inner_texts() if t.strip()]
    assert [t.split(" (")[0] for t in shown] == names  # sorted by the error, one row a checkpoint
    assert float(cell(page, names[0], "EF MAE")) == pytest.approx(6.15, abs=0.01)
    assert cell(page, names[2], "preset") == "sigma"


def seen(page, *names: str) -> int:
    """Opens a file among a run's artifacts, folder by folder; the width of the picture shown."""
    for name in names:
        page.get_by_text(name, exact=True).first.click()
    ready = "i => i.naturalWidth && i.src.match(/blob:|artifact/) && i.naturalWidth"
    found = page.wait_for_function(
        f"[...document.querySelectorAll('img')].map({ready}).find(Boolean)", timeout=PATIENCE
    )
    return found.json_value()


def test_an_evaluation_shows_its_animation_and_report(page, pages):
    server = pages["discovr-evaluation"].split("/#")[0]
    client = MlflowClient(server)
    owner = client.get_experiment_by_name("discovr-evaluation").experiment_id
    (run,) = client.search_runs([owner], "tags.task = 'lvef' and tags.preset = 'discovr'")
    page.goto(f"{server}/#/experiments/{owner}/runs/{run.info.run_id}/artifacts")
    assert seen(page, "best.gif") == 2 * 224
    page.get_by_text("report.html", exact=True).first.click()
    page.frame_locator("iframe").locator(".headlines strong").first.wait_for()


def test_a_training_shows_curves_parameters_and_pictures(page, pages):
    page.goto(pages["discovr"])
    link = page.get_by_role("link", name=TRAINING).first
    link.wait_for()
    assert cell(page, TRAINING, "cines") == "8"
    address = page.url.split("/#")[0] + "/" + link.get_attribute("href").lstrip("/").split("?")[0]
    page.goto(address)
    page.get_by_text("embed_dim").first.wait_for()
    page.goto(f"{address}/model-metrics")
    page.locator(".scatterlayer path.js-line").nth(2).wait_for(state="attached")
    lines = "all => Math.max(...all.map(line => line.getAttribute('d').split('L').length))"
    points = page.locator(".scatterlayer path.js-line").evaluate_all(lines)
    assert 8 <= points <= 12  # of the losses' 12 steps: those in one line are drawn as one
    page.goto("about:blank")
    page.goto(f"{address}/artifacts")
    assert seen(page, "pictures", "tokens.png") == 90
