"""The guard and the checks of arguments, without a server."""

from __future__ import annotations

import asyncio
import json
import selectors
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovr_monai.base.privacy import is_loopback
from discovr_monai.label.archive.identifiers import check_filename, check_id, check_tag
from discovr_monai.label.server.guard import Guard, Limits
from tests.label.conftest import wait_until

TOKEN = "a token of over sixteen letters"
SMALL = Limits(upload=1000, body=100)


async def echo(scope, receive, send):
    """Reads the whole body and says how long it was."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


async def sleeper(scope, receive, send):
    await asyncio.sleep(10_000)


class Instantly(selectors.SelectSelector):
    """A clock that jumps to the next timer instead of waiting for it."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0
        return super().select(0)


def loop() -> asyncio.AbstractEventLoop:
    clock = Instantly()
    made = asyncio.SelectorEventLoop(clock)
    made.time = lambda: clock.now
    return made


def ask(app, method="GET", path="/info/", pieces=(b"",), **headers) -> tuple[int, bytes]:
    """Status and body of one request; a piece None never comes."""
    fields = {"host": "127.0.0.1:8000"} | {k.replace("_", "-"): v for k, v in headers.items()}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(k.encode(), v.encode()) for k, v in fields.items()]
    left, sent = list(pieces), []

    async def receive():
        piece = left.pop(0) if left else None
        if piece is None:
            await asyncio.sleep(10_000)
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_without_a_token_only_this_machines_names_are_answered():
    guard = Guard(echo)
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert ask(guard, host=host)[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "", "[::1"):
        assert ask(guard, host=host)[0] == 403, host


@pytest.mark.parametrize("token", ["", TOKEN])
def test_pages_of_other_sites_are_refused(token):
    guard, own = Guard(echo, token), {"authorization": f"Bearer {token}"}
    assert ask(guard, origin="http://127.0.0.1:8000", **own)[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000", "http://["):
        status, body = ask(guard, origin=origin, **own)
        assert (status, b"other sites" in body) == (403, True)
    assert ask(guard, sec_fetch_site="cross-site", **own)[0] == 403


def test_a_token_is_asked_of_every_request():
    guard = Guard(echo, TOKEN)
    assert ask(guard, host="any.example", authorization=f"Bearer {TOKEN}")[0] == 200
    for bad in ("", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"):
        for path in ("/info/", "/auth/token/valid", "/", "//auth/", "/auth/x"):
            assert ask(guard, path=path, authorization=bad)[0] == 401, (bad, path)


def test_clients_log_in_with_the_token_as_password():
    guard = Guard(echo, TOKEN)
    assert json.loads(ask(guard, path="/auth/")[1])["enabled"] is True
    assert json.loads(ask(Guard(echo), path="/auth/")[1])["enabled"] is False
    right = f"username=me&password={TOKEN.replace(' ', '+')}&grant_type=password".encode()
    status, body = ask(guard, "POST", "/auth/token", (right,))
    assert (status, json.loads(body)) == (200, {"access_token": TOKEN, "token_type": "bearer"})
    assert ask(guard, "POST", "/auth/token", (right[:-30],))[0] == 401
    assert ask(guard, path="/auth/token/valid", authorization=f"Bearer {TOKEN}")[0] == 200
    with pytest.raises(ValueError, match="under 16 letters"):
        Guard(echo, "short")


def test_bodies_are_bounded_by_what_they_say_and_by_what_they_are():
    guard = Guard(echo, limits=SMALL)
    assert ask(guard, pieces=(b"x" * 60, b"x" * 40))[1] == b"100"
    assert ask(guard, pieces=(b"x" * 60, b"x" * 41))[0] == 413
    assert ask(guard, content_length="101")[0] == 413
    assert ask(guard, content_length="-1")[0] == 413
    form = {"content_type": "multipart/form-data; boundary=x"}
    assert ask(guard, pieces=(b"x" * 1000,), **form)[1] == b"1000"
    assert ask(guard, pieces=(b"x" * 1000, b"x"), **form)[0] == 413


def test_slow_requests_and_slow_answers_end():
    assert ask(Guard(echo), pieces=(b"x", None))[0] == 408
    status, body = ask(Guard(sleeper))
    assert (status, b"within 120 s" in body) == (504, True)
    status, body = ask(Guard(sleeper), path="/infer/x")
    assert (status, b"within 660 s" in body) == (504, True)


def test_a_request_that_drips_ends_and_one_that_flows_does_not():
    async def slowly(scope, receive, send):
        async def late():
            await asyncio.sleep(20)
            return await receive()

        await echo(scope, late, send)

    def after(size: int) -> int:
        """Status of a request whose twenty pieces come every 20 s: 400 s in all."""
        guard = Guard(slowly, limits=Limits(slowest=1e3))
        return ask(guard, "PUT", pieces=(b"x" * size,) * 20)[0]

    assert (after(10), after(20_000)) == (504, 200)


def test_what_an_app_says_of_a_broken_body_does_not_hide_the_limit():
    async def hides(scope, receive, send):
        try:
            await receive()
        except Exception:
            await send({"type": "http.response.start", "status": 400, "headers": []})

    assert ask(Guard(hides, limits=SMALL), pieces=(b"x" * 101,))[0] == 413


def test_a_header_that_decides_may_not_come_twice():
    guard = Guard(echo)
    scope = {"type": "http", "method": "GET", "path": "/"}
    scope["headers"] = [(b"host", b"localhost"), (b"Host", b"evil.example")]
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, None, send))
    assert sent[0]["status"] == 400


def test_a_client_that_hangs_up_while_it_logs_in_gets_no_answer():
    scope = {"type": "http", "method": "POST", "path": "/auth/token", "headers": []}
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(echo, TOKEN)(scope, receive, send))
    assert sent == []


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))


# ---- arguments -----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=80))
def test_no_name_leaves_a_folder(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp() / "root"
    for check in (check_id, check_tag):
        try:
            name = check(text)
        except ValueError:
            continue
        place = (root / name).resolve()
        assert place.parent == root.resolve() and place.name == text and text[0] != "."


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/x",
        "a..b",
        "a\0",
        "é",
        "a.nii.gz",
        "a" * 65,
        "a\n",
    ],
)
def test_bad_ids(bad):
    with pytest.raises(ValueError, match="is no id"):
        check_id(bad)


@pytest.mark.parametrize(
    "bad", ["x.exe", "x", "x.nii/y", ".nii\0.gz", "x.nii.gz.sh", "model.pt", ""]
)
def test_bad_files(bad):
    with pytest.raises(ValueError, match=r"send .nii.gz"):
        check_filename(bad)


def test_the_path_of_a_file_is_left_out():
    for path in ("x.NII.gz", "/home/me/x.NII.gz", "..\\..\\x.NII.gz", "../x.NII.gz"):
        assert check_filename(path) == "x.NII.gz"


@pytest.fixture
def routes():
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")
    from discovr_monai.label.server import routes

    return routes


HARMFUL = ["$__import__('os').getcwd()", " $x", "@network", "%/etc/passwd", "/etc/passwd", "~/x",
           "C:\\x", "a/../../b", "..", "http://evil.example/x", "file:///x", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("value", HARMFUL)
def test_harmful_values_are_found_wherever_they_are(routes, value):
    for params in ({"a": value}, {"a": [1, {"b": [value]}]}, {"a": {value: 1}}):
        with pytest.raises(ValueError, match="refused"):
            routes.check_params(params, {"a"})
        with pytest.raises(ValueError, match="refused"):
            routes.check_params(json.dumps(params), None)


def test_harmless_parameters_pass_and_unknown_ones_do_not(routes):
    routes.check_params({"a": ["LV cavity", 3, None, True, 0.5, {"b": "A4C, at 50 %"}]}, {"a"})
    routes.check_params("", {"a"})
    for bad, said in (
        ({"a": float("nan")}, "no number"),
        ({"a": [float("inf")]}, "no number"),
        ({"b": 1}, "'b' is not known: this task has a"),
        ({"image": "x"}, "'image' is not known"),
        ({"train#trainer#max_epochs": 1}, "is not known"),
        ([1], "must be a JSON object"),
        ({"a": "x" * 2001}, "too long"),
        ({"a": [0] * 10_001}, "too long"),
        ({"a": [[[[[[[0]]]]]]]}, "too deeply"),
    ):
        with pytest.raises(ValueError, match=said):
            routes.check_params(bad, {"a"})


def test_clients_do_not_say_what_the_archive_says(routes):
    routes.check_arguments({"info": '{"comment": "blurred"}'}, None)
    for own in ({"patient": "y"}, {"view": "A4C"}, {"strategy": "x"}, {"path": "y"}):
        with pytest.raises(ValueError, match="only the server says so"):
            routes.check_arguments({"info": json.dumps(own)}, None)


def test_what_was_sent_is_removed_when_the_request_fails(routes, tmp_path):
    from fastapi import BackgroundTasks

    went_on = threading.Event()

    async def refuses(background_tasks):
        background_tasks.add_task((tmp_path / "a").unlink)
        raise ValueError("no")

    async def takes_long(background_tasks):
        background_tasks.add_task((tmp_path / "b").unlink)
        assert went_on.wait(10)
        background_tasks.add_task((tmp_path / "result").unlink)

    async def both():
        handlers = [routes.threaded(f, ThreadPoolExecutor(1), lambda _: set())
                    for f in (refuses, takes_long)]  # fmt: skip
        with pytest.raises(Exception, match="no"):
            await handlers[0](background_tasks=BackgroundTasks())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handlers[1](background_tasks=BackgroundTasks()), 0.05)

    for name in ("a", "b", "result"):
        (tmp_path / name).touch()
    asyncio.run(both())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "result"]
    went_on.set()
    wait_until(lambda: not any(tmp_path.iterdir()), 10)


def test_a_slow_inference_does_not_hold_the_others(routes):
    asked, over = threading.Event(), threading.Event()

    async def slow():
        asked.set()
        assert over.wait(10)
        return "slow"

    async def quick():
        return "quick"

    async def both():
        pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        handlers = [
            routes.threaded(f, p, lambda _: set())
            for f, p in zip((slow, quick), pools, strict=True)
        ]
        waiting = asyncio.ensure_future(handlers[0]())
        while not asked.is_set():
            await asyncio.sleep(0.01)
        first = await asyncio.wait_for(handlers[1](), 5)
        over.set()
        return first, await waiting

    assert asyncio.run(both()) == ("quick", "slow")


def test_a_failure_tells_no_path(routes, caplog):
    async def fails():
        raise KeyError("/secret/Smith^Mary")

    handler = routes.threaded(fails, ThreadPoolExecutor(1), lambda _: set())
    with pytest.raises(Exception, match="KeyError") as caught:
        asyncio.run(handler())
    assert caught.value.status_code == 500
    assert "Smith" not in f"{caught.value} {caplog.text}" and "test_guard.py" in caplog.text
