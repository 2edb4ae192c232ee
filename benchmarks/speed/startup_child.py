"""What startup.py starts: one process, timed from its birth.

    BORN=<time.time()> python startup_child.py ours OUT.json run training --config_file ...
    BORN=<time.time()> python startup_child.py plain OUT.json train.yaml '{"key": value}'

ours   the bundle's command as `python -m monai.bundle` runs it, until the first step is done
calls  the same to its end: seconds of every call that an epoch is made of
plain  torch and MONAI, and a step of the config's network without our trainer, data or store

Parts are timed by wrapping their functions here, so the library knows nothing of it.
"""

from __future__ import annotations

import time

NOW = time.time()  # before anything else is imported: the interpreter's own start lies behind

import builtins  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

REST = "MONAI's workflow and config parser, and the rest"


class Clock:
    """Seconds by part; what runs inside another part counts for the inner one only.

    Attributes:
        own: part -> seconds without those of the parts inside.
        calls: part -> seconds of each call, parts inside included.
    """

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.calls: dict[str, list[float]] = {}
        self.inside: list[list[Any]] = []  # [name, seconds of inner parts] of the open parts

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what runs under it."""
        self.inside.append([name, 0.0])
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            _, inner = self.inside.pop()
            self.own[name] = self.own.get(name, 0.0) + spent - inner
            self.calls.setdefault(name, []).append(spent)
            if self.inside:
                self.inside[-1][1] += spent

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Times each call of ``owner.function`` under ``name``."""
        original: Callable[..., Any] = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, function, timed)

    def watch_imports(self) -> None:
        """Times what is imported on the way, under the name of the outermost package."""
        original, known = builtins.__import__, {name.partition(".")[0] for name in sys.modules}

        def timed(name: str, *rest: Any, **keywords: Any) -> Any:
            busy = any(part.startswith("import") for part, _ in self.inside)
            relative = len(rest) == 4 and rest[3]
            if busy or relative or name in sys.modules:
                return original(name, *rest, **keywords)
            package = name.partition(".")[0]
            with self.part(f"import {'more of ' * (package in known)}{package}"):
                return original(name, *rest, **keywords)

        builtins.__import__ = timed


def finish(clock: Clock, born: float, out: str) -> None:
    """Writes what was found and ends the process at once: nothing after this is measured."""
    found = {
        "seconds": time.time() - born,
        "processor": time.process_time(),
        "parts": clock.own,
        "calls": clock.calls,
        "modules": sorted(sys.modules),
    }
    Path(out).write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wrap_ours(clock: Clock) -> None:
    """What lies between the command and the first step."""
    import torch
    from monai.bundle.workflows import ConfigWorkflow

    from discovr_monai import configuration
    from discovr_monai.data.clips import dataset
    from discovr_monai.data.lists import scan
    from discovr_monai.data.read import loader
    from discovr_monai.networks import discovr, heads, vit
    from discovr_monai.phantom import dataset as phantom
    from discovr_monai.training import checkpoint, handlers, mlflow_handler, trainer

    tracking = mlflow_handler.Tracking
    for owner, function, name in (
        (ConfigWorkflow, "__init__", "read the config (MONAI)"),
        (configuration, "check_command_line", "check the command line"),
        (phantom, "ensure_demo_data", "make the demo data"),
        (scan, "load_datalist", "find or scan the cines"),
        (loader.CineLoader, "load", "decode or map cines"),
        (dataset.ClipDataset, "__getitem__", "cut clips"),
        *((c, "__init__", "build the network") for c in (discovr.Discovr, vit.VisionTransformer)),
        *((c, "__init__", "build the network") for c in (heads.ProjectionHead, heads.Decoder)),
        (torch.optim.AdamW, "__init__", "make the optimiser"),
        (mlflow_handler, "make_store", "make MLflow's store"),
        (tracking, "__init__", "open MLflow's store"),
        (tracking, "start", "begin MLflow's run"),
        (tracking, "_tag", "begin MLflow's run"),
        (trainer.DiscovrTrainer, "__init__", "build the trainer"),
        (checkpoint.Checkpoints, "attach", "look for a checkpoint"),
        (trainer.DiscovrTrainer, "_iteration", "first step"),
    ):
        clock.wrap(owner, function, name)


def wrap_calls(clock: Clock) -> None:
    """What an epoch is made of."""
    from discovr_monai.data.clips import dataset
    from discovr_monai.training import checkpoint, handlers, mlflow_handler, trainer

    for owner, function, name in (
        (trainer.DiscovrTrainer, "_iteration", "step"),
        (trainer, "diagnose", "diagnosis"),
        (dataset.ClipDataset, "__getitem__", "clip"),
        (handlers.ValidationLoss, "_validate", "validation"),
        (handlers.Pictures, "_epoch_completed", "pictures"),
        (checkpoint.Checkpoints, "save", "checkpoint"),
        (mlflow_handler.Tracking, "_log_iteration", "MLflow, a step"),
        (mlflow_handler.Tracking, "_write", "MLflow, a write"),
        (handlers.Progress, "_advance", "screen, a step"),
        (handlers.EpochMeans, "_add", "means, a step"),
        (handlers.CollapseWatch, "_look", "collapse watch, a step"),
    ):
        clock.wrap(owner, function, name)


def run_ours(clock: Clock, born: float, out: str, command: list[str], *, first: bool) -> None:
    """``python -m monai.bundle COMMAND``, to its first step or to its end."""
    from discovr_monai.training.trainer import DiscovrTrainer

    if first:
        wrap_ours(clock)
        timed = DiscovrTrainer._iteration

        def once(*args: Any) -> None:
            timed(*args)
            open_parts = [name for name, _ in clock.inside]
            assert open_parts == [REST], open_parts
            clock.own[REST] = time.perf_counter() - begun - clock.inside[0][1]
            finish(clock, born, out)

        DiscovrTrainer._iteration = once  # type: ignore[method-assign]
    else:
        wrap_calls(clock)
    sys.argv = ["monai.bundle", *command]
    begun = time.perf_counter()
    with clock.part(REST):
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    finish(clock, born, out)


def run_plain(clock: Clock, born: float, out: str, config: str, changed: str) -> None:
    """A forward, backward and optimiser step of the config's network on noise."""
    import torch
    from monai.bundle import ConfigParser

    from discovr_monai.configuration import resolve_precision
    from discovr_monai.training.trainer import PRECISIONS

    with clock.part("read the config (MONAI)"):
        parser = ConfigParser()
        parser.read_config(config)
        for key, value in ({"steps_per_epoch": 1} | json.loads(changed)).items():
            parser[key] = value
        keys = ("batch_size", "num_frames", "image_size", "device")
        batch, frames, side, device = (parser.get_parsed_content(key) for key in keys)
    with clock.part("build the network"):
        network = parser.get_parsed_content("network")
    with clock.part("make the optimiser"):
        optimizer = parser.get_parsed_content("optimizer")
    clip = torch.randn(batch, 3, frames, side, side, device=device)
    with clock.part("build the objective and masks"):
        masking, objective = (parser.get_parsed_content(key) for key in ("masking", "loss"))
    dtype = PRECISIONS[resolve_precision("auto", device)]
    with clock.part("first step"):
        masks = masking(
            0,
            range(len(clip)),
            video_grid=network.video_student.grid,
            image_grid=network.image_student.grid,
            frames=len(network.student_frames),
            device=device,
        )
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = network(clip, *masks)
        objective(output, 0)["loss"].backward()
        optimizer.step()
        network.update_teachers(0.99, output.video_teacher_logits, output.image_teacher_logits)
    finish(clock, born, out)


def main() -> None:
    """Runs what the command line says."""
    what, out, *command = sys.argv[1:]
    born = float(os.environ["BORN"])
    clock = Clock()
    clock.own["interpreter"] = NOW - born
    with clock.part("import torch"):
        import torch  # noqa: F401
    with clock.part("import MONAI"):
        import fire  # noqa: F401
        import monai.bundle  # noqa: F401
    clock.watch_imports()
    if what == "plain":
        run_plain(clock, born, out, *command)
    run_ours(clock, born, out, command, first=what == "ours")


if __name__ == "__main__":
    main()
