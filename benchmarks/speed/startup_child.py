"""What startup.py starts: one process, timed from its birth to the end of its first step.

    BORN=<time.time()> python startup_child.py ours OUT.json run training --config_file ...
    BORN=<time.time()> python startup_child.py plain OUT.json train.yaml '{"key": value}'

ours   the bundle's command, as `python -m monai.bundle` runs it
plain  torch and MONAI, and a step of the config's network without our trainer, data or store
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


def finish(out: str) -> NoReturn:
    """Writes the seconds and the modules, and ends the process: nothing after this is measured."""
    seconds = time.time() - float(os.environ["BORN"])
    Path(out).write_text(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
    os._exit(0)


def run_ours(out: str, command: list[str]) -> None:
    """``python -m monai.bundle COMMAND`` until the trainer has taken a step."""
    from ignite.engine import Events

    from discovr_monai.training.trainer import DiscovrTrainer

    build = DiscovrTrainer.__init__

    @functools.wraps(build)  # MONAI reads the signature
    def build_and_watch(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_event_handler(Events.ITERATION_COMPLETED, lambda _: finish(out))

    DiscovrTrainer.__init__ = build_and_watch  # type: ignore[method-assign]
    sys.argv = ["monai.bundle", *command]
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def run_plain(out: str, config: str, changed: str) -> None:
    """A forward, backward and optimiser step of the config's network on noise."""
    import torch
    from monai.bundle import ConfigParser

    from discovr_monai.configuration import resolve_precision
    from discovr_monai.training.trainer import PRECISIONS

    parser = ConfigParser()
    parser.read_config(config)
    for key, value in ({"steps_per_epoch": 1} | json.loads(changed)).items():
        parser[key] = value
    keys = ("batch_size", "num_frames", "image_size", "device")
    batch, frames, side, device = (parser.get_parsed_content(key) for key in keys)
    network, optimizer = (parser.get_parsed_content(key) for key in ("network", "optimizer"))
    masking, objective = (parser.get_parsed_content(key) for key in ("masking", "loss"))
    clip = torch.randn(batch, 3, frames, side, side, device=device)
    dtype = PRECISIONS[resolve_precision("auto", device)]
    masks = masking(
        0,
        range(len(clip)),
        video_grid=network.video.student.grid,
        image_grid=network.image.student.grid,
        frames=len(network.image.student_frames),
        device=device,
    )
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        output = network(clip, *masks)
    objective(output, 0)["loss"].backward()
    optimizer.step()
    network.update_teachers(0.99, output.video_teacher_logits, output.image_teacher_logits)
    finish(out)


if __name__ == "__main__":
    what, out, *command = sys.argv[1:]
    if what == "plain":
        run_plain(out, *command)
    run_ours(out, command)
