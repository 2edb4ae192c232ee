"""Photographs MLflow's pages for the documentation, while `discovr-monai mlflow` serves them.

    python benchmarks/compare/comparison_mlflow.py --store output/pictures/mlruns.db
    discovr-monai mlflow output/pictures/mlruns.db
    python benchmarks/pictures/mlflow_pictures.py checkpoints    docs/images/mlflow_checkpoints.png

    make train && make mlflow
    python benchmarks/pictures/mlflow_pictures.py training       docs/images/mlflow_training.png

Needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mlflow.tracking import MlflowClient
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHOWN = {"checkpoints": "discovr-comparison", "training": "discovr"}  # the experiment of each
NO_PANEL = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"  # else a chat covers a third of it
PATIENCE = 120_000  # ms: the pages are large


def address(server: str, what: str) -> str:
    """The page to photograph: an experiment's saved view, or the curves of its last run."""
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(SHOWN[what])
    if experiment is None:
        raise SystemExit(f"this server has no experiment {SHOWN[what]!r}; see the top of this file")
    base = f"{server}/#/experiments/{experiment.experiment_id}"
    if what == "checkpoints":
        from discovr_monai.base.tracking import VIEW

        return f"{base}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    run = client.search_runs([experiment.experiment_id], max_results=1)[0]
    return f"{base}/runs/{run.info.run_id}/model-metrics"


def photograph(page: Page, what: str) -> None:
    """Waits until the page shows its figures."""
    page.wait_for_selector(".ag-row" if what == "checkpoints" else ".js-plotly-plot")
    page.wait_for_timeout(5000)  # the rest is drawn one by one
    page.screenshot(path=IMAGES / f"mlflow_{what}.png")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SHOWN)
    parser.add_argument("--server", default="http://127.0.0.1:5000")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 880})
        page.set_default_timeout(PATIENCE)
        page.add_init_script(f"localStorage.setItem({NO_PANEL!r}, 'true')")
        page.goto(address(options.server, options.what))
        photograph(page, options.what)
        browser.close()


if __name__ == "__main__":
    main()
