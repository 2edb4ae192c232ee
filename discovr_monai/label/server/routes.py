"""The part of MONAI Label's interface that is served, with checked arguments, in threads.

MONAI Label's own handlers do the work. They block while they work, so each runs in a thread.
Inferences have a few threads of their own, so that listing and saving never wait for them.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import math
import re
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelException,
)

from discovr_monai.label.archive.identifiers import check_filename, check_id, check_tag
from discovr_monai.label.server.datastore import KNOWN

Endpoint = Callable[..., Coroutine[Any, Any, Any]]
INFERENCES = 2  # that run at the same time
logger = logging.getLogger(__name__)

# What is served. Closed are models (upload, download), sessions (archives), proxy, logs, ohif,
# whole-slide inference, reload, removal, and lists that name places on the server.
DATASTORE = {
    "/datastore/": "GET PUT",  # PUT is 3D Slicer's way to send an image
    "/datastore/image": "GET HEAD PUT",
    "/datastore/image/info": "GET PUT",
    "/datastore/label": "GET HEAD PUT",
    "/datastore/label/info": "GET PUT",
    "/datastore/dataset": "GET",
}
TASKS = {
    "/info/": "GET",
    "/infer/{model}": "POST",
    "/batch/infer": "GET DELETE",
    "/batch/infer/{model}": "POST",
    "/activelearning/{strategy}": "POST",
    "/train/": "GET DELETE",
    "/train/{model}": "POST",
    "/scoring/": "GET DELETE",
    "/scoring/{method}": "POST",
}

# ---- arguments -----------------------------------------------------------------------------

# What clients send with everything, and what MONAI Label's own batch inference takes.
COMMON = {"client_id", "label_info", "result_extension", "result_dtype", "result_compress"}
BATCH = {"device", "multi_gpu", "gpus", "logging", "save_label", "label_tag", "max_workers",
         "max_batch_size", "images"}  # fmt: skip
SERVERS_WORD = {*KNOWN, "strategy", "path", "id", "ts", "name"}  # clients may not set these
TASKS_OF = {"infer": "_infers", "batch": "_infers", "train": "_trainers",
            "activelearning": "_strategies", "scoring": "_scoring_methods"}  # fmt: skip
KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
MOST_LETTERS, MOST_LEVELS, MOST_ITEMS = 2000, 6, 10_000


def check_value(value: Any, depth: int = 0) -> None:
    """Refuses a value that a config could run or look up, or that names a place.

    Args:
        value: of JSON.
        depth: how many lists and objects it lies in.

    Raises:
        ValueError: for "$..." (run), "@..." and "%..." (looked up), paths, and what is too large.
    """
    if depth > MOST_LEVELS:
        raise ValueError("the parameters are nested too deeply")
    if isinstance(value, dict):
        for each in (*value.keys(), *value.values()):
            check_value(each, depth + 1)
    elif isinstance(value, list):
        if len(value) > MOST_ITEMS:
            raise ValueError(f"a list of {len(value)} values is too long: {MOST_ITEMS} at most")
        for each in value:
            check_value(each, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number: it is refused")
    elif isinstance(value, str):
        if len(value) > MOST_LETTERS:
            raise ValueError(f"a text of {len(value)} letters is too long: {MOST_LETTERS} at most")
        text = value.strip()
        if text[:1] in tuple("$@%"):
            raise ValueError(f"{text[:40]!r} begins like a config's expression: it is refused")
        absolute = text[:1] in tuple("/\\~") or re.match(r"[A-Za-z]:[/\\]", text)
        if absolute or "\0" in text or "://" in text or ".." in re.split(r"[/\\]", text):
            raise ValueError(f"{text[:40]!r} names a place: it is refused")


def check_params(params: Any, allowed: set[str] | None) -> dict[str, Any]:
    """Parameters as a dict, if all keys are known and all values harmless.

    Args:
        params: a dict or its JSON; None and "" stand for {}.
        allowed: keys; None for any (what is only kept, not acted on).

    Raises:
        ValueError: naming the key or value.
    """
    if isinstance(params, str):
        params = json.loads(params) if params.strip() else {}
    params = {} if params is None else params
    if not isinstance(params, dict):
        raise ValueError("parameters must be a JSON object")
    for key in params:
        if not KEY.fullmatch(key) or (allowed is not None and key not in allowed):
            known = f": this task has {', '.join(sorted(allowed))}" if allowed is not None else ""
            raise ValueError(f"the parameter {key[:60]!r} is not known{known}")
    check_value(params)
    return params


def check_arguments(arguments: Mapping[str, Any], allowed: set[str] | None) -> None:
    """Refuses what a handler must not be called with.

    Args:
        arguments: of the handler, by name.
        allowed: keys of its "params"; None if they are only kept.

    Raises:
        ValueError: with the argument and what it may be.
    """
    for name in ("session_id", "run_sync"):
        if arguments.get(name):
            raise ValueError(f"{name} is not served")
    if getattr(arguments.get("file"), "filename", None) and "model" in arguments:
        raise ValueError("send the image to /datastore/image first, then infer it by its id")
    for name in ("file", "label"):
        if (filename := getattr(arguments.get(name), "filename", None)) is not None:
            check_filename(filename)
    for name, check in (("image", check_id), ("label", check_id), ("tag", check_tag)):
        value = arguments.get(name)
        if isinstance(value, str) and (value or name == "image"):
            check(value)
    for name in ("model", "strategy", "method"):
        if not KEY.fullmatch(str(arguments.get(name, "x"))):
            raise ValueError(f"there is no {name} {str(arguments[name])[:60]!r}")
    output = getattr(arguments.get("output"), "value", None)
    if output in ("train", "dicom_seg"):
        raise ValueError(f"output {output!r} is not served")
    keys = {*check_params(arguments.get("params"), allowed)}
    keys |= {*check_params(arguments.get("info"), None)}
    if allowed is None and (taken := SERVERS_WORD & keys):
        raise ValueError(f"{', '.join(sorted(taken))}: only the server says so")


def task_keys(app: Any, path: str, arguments: Mapping[str, Any]) -> set[str] | None:
    """Parameters that a task takes: those that its config names, and those that clients send.

    Args:
        app: a MONAILabelApp.
        path: of the route, such as "/train/{model}".
        arguments: of its handler.

    Returns:
        None for a route without a task.

    Raises:
        ValueError: the task does not exist.
    """
    section = path.split("/")[1]
    if section not in TASKS_OF:
        return None
    name = next((arguments[k] for k in ("model", "strategy", "method") if k in arguments), "")
    task = getattr(app, TASKS_OF[section]).get(name)
    if name and task is None:
        raise ValueError(f"there is no {name!r} here")
    config: Mapping[str, Any] = getattr(task, "config", dict)()
    return COMMON | set(config) | (BATCH if section == "batch" else set())


# ---- answers -------------------------------------------------------------------------------

RESULT = re.compile(r"Result: (.*)")  # what a task came to, the last line that it logs
SENTENCE = re.compile(r"[\w.]+Error: .*")  # the error that it ended with
PLACE = re.compile(r"(?:^|[\s'\"(=])(?:/|[A-Za-z]:\\)\w")


def without_places(answer: Any) -> Any:
    """A task's state, of whose log only its result, or the error that ended it, is left."""
    if isinstance(answer, list):
        return [without_places(each) for each in answer]
    if not isinstance(answer, dict) or "details" not in answer:
        return answer
    matches = (RESULT.search(line) or SENTENCE.match(line) for line in answer["details"])
    lines = [m[m.lastindex or 0] for m in matches if m]
    return {**answer, "details": [line for line in lines if not PLACE.search(line)]}


# ---- the application -----------------------------------------------------------------------


def build(routers: Sequence[APIRouter], routes: Mapping[str, str], app: Any) -> FastAPI:
    """Serves some routes of MONAI Label, and nothing else.

    Args:
        routers: MONAI Label's.
        routes: path -> methods.
        app: a MONAILabelApp, for the names of its parameters.

    Raises:
        RuntimeError: MONAI Label no longer has one of the routes.
    """
    served = FastAPI(title="DISCOVR", docs_url=None, redoc_url=None, openapi_url=None)
    served.router.redirect_slashes = False
    slow = ThreadPoolExecutor(INFERENCES, "infer")
    quick = ThreadPoolExecutor(16, "quick")
    handlers: dict[tuple[str, str], Endpoint] = {
        (method, route.path): route.endpoint  # type: ignore[attr-defined]
        for router in routers
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    wanted = [(method, path) for path, methods in routes.items() for method in methods.split()]
    for method, path in wanted:
        if (method, path) not in handlers:
            raise RuntimeError(f"MONAI Label has no {method} {path}: install monailabel==0.8.5")
        pool = slow if path.startswith("/infer/") else quick
        keys = functools.partial(task_keys, app, path)
        endpoint = threaded(handlers[method, path], pool, keys)
        served.add_api_route(path, endpoint, methods=[method], response_model=None)
    return served


def threaded(
    endpoint: Endpoint,
    pool: ThreadPoolExecutor,
    keys: Callable[[Mapping[str, Any]], set[str] | None],
) -> Endpoint:
    """A handler that checks its arguments, runs in a thread, and says what was wrong.

    Args:
        endpoint: async, but never waiting for anything: MONAI Label's are all so.
        pool: where it runs. Once nobody waits for it any more, it still runs to its end there.
        keys: gives the keys that its "params" may have, by its arguments.
    """

    @functools.wraps(endpoint)
    async def handler(**arguments: Any) -> Any:
        work: Future[Any] | None = None
        try:
            check_arguments(arguments, keys(arguments))
            work = pool.submit(_drive, endpoint, arguments)
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            if work is not None:
                work.add_done_callback(lambda _: _tidy(arguments))
            raise
        except Exception as error:
            _tidy(arguments)
            raise _http_error(endpoint, error) from None

    handler.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    return handler


def _http_error(endpoint: Endpoint, error: Exception) -> HTTPException:
    """What a client is told of an error."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, MONAILabelException):
        missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
        return HTTPException(404 if missing else 400, str(error.msg))
    if isinstance(error, ValueError):  # ours: a sentence that says what to do
        return HTTPException(400, str(error))
    if isinstance(error, TimeoutError):
        return HTTPException(504, str(error))
    place = traceback.extract_tb(error.__traceback__)[-1]  # the text may hold a path or a name
    where = f"{Path(place.filename).name}:{place.lineno}"
    logger.error("%s failed: %s in %s", endpoint.__name__, type(error).__name__, where)
    return HTTPException(500, f"the server failed ({type(error).__name__})")


def _tidy(arguments: Mapping[str, Any]) -> None:
    """Removes the files of a request, which is otherwise done once it is answered."""
    for task in getattr(arguments.get("background_tasks"), "tasks", ()):
        task.func(*task.args, **task.kwargs)


def _drive(endpoint: Endpoint, arguments: Mapping[str, Any]) -> Any:
    """Runs a coroutine that waits for nothing."""
    coroutine = endpoint(**arguments)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return without_places(done.value)
    coroutine.close()
    raise RuntimeError(f"{endpoint.__name__} waits for something: it cannot run in a thread")
