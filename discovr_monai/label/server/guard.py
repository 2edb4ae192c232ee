"""Who may talk to the server, how much they may send and how long they may take.

This is checked before anything of a request is parsed. The checks are our own, because the
libraries' middleware does less: starlette's ``TrustedHostMiddleware`` compares the host only, not
the origin, and takes the first of two Host headers; fastapi's ``HTTPBearer`` reads a token but
compares it with nothing; neither limits sizes or times.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
NO_TOKEN = ("/auth/", "/auth/token")  # where a client learns that it needs a token, and gets it
LEAST_TOKEN = 16  # letters
ONCE = ("host", "origin", "authorization", "content-length")  # the headers that decide


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        upload: Bytes of a request that sends files.
        body: Bytes of any other request.
        pause: Seconds between two pieces of a request.
        seconds: Seconds until the answer to a request begins.
        slow_seconds: The same for an inference.
        slowest: Bytes per second at which a request must arrive to be given more time.
    """

    upload: int = 1 << 30
    body: int = 1 << 20
    pause: float = 30.0
    seconds: float = 120.0
    slow_seconds: float = 660.0
    slowest: float = 50e3


class _RefusedError(Exception):
    """Ends a request with a status and a sentence.

    It is no HTTPException, which the guarded app would catch and answer by itself.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """ASGI middleware around the whole server.

    Without a token the server answers only requests for a name of this machine, so that no web
    page gets in by rebinding its own name to 127.0.0.1. With a token every request must bear it.
    Pages of another origin are always refused.

    Args:
        app: The guarded application.
        token: At least 16 letters, or "" for none.
        limits: What one request may take.

    Raises:
        ValueError: The token is too short.
    """

    def __init__(self, app: ASGIApp, token: str = "", limits: Limits = Limits()) -> None:
        if token and len(token) < LEAST_TOKEN:
            raise ValueError(f"the token has under {LEAST_TOKEN} letters: take a longer one")
        self.app, self.token, self.limits = app, token, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, refuses it or passes it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        begun = False
        late: list[_RefusedError] = []  # raised while the app read: its answer must not hide it

        async def send_unless_refused(message: Message) -> None:
            nonlocal begun
            if late and not begun:
                raise late[0]
            begun = True
            await send(message)

        try:
            headers = _headers(scope)
            self._check(scope["path"], headers)
            bounded = self._bounded(headers, receive, late)
            if scope["path"].startswith("/auth/"):
                answer = await self._log_in(Request(scope, bounded))
                await answer(scope, bounded, send_unless_refused)
            else:
                await self._in_time(scope, bounded, send_unless_refused)
        except ClientDisconnect:
            return  # nobody waits for the answer
        except _RefusedError as refused:
            if not begun:
                await _answer({"detail": refused.sentence}, refused.status)(scope, receive, send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self.token and _host_name(host) not in LOCAL_NAMES:
            raise _RefusedError(403, "this server answers to localhost only")
        origin = headers.get("origin")
        foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign or (origin is not None and origin.partition("://")[2] != host):
            raise _RefusedError(403, "pages of other sites may not use this server")
        if self.token and path not in NO_TOKEN:
            kind, _, value = headers.get("authorization", "").partition(" ")
            if not self._is_token(value.strip()) or kind.lower() != "bearer":
                raise _RefusedError(401, "a token is needed: Authorization: Bearer TOKEN")

    def _is_token(self, value: str) -> bool:
        """Compares in a time that does not depend on where the two differ."""
        return hmac.compare_digest(value.encode(), self.token.encode())

    def _bounded(
        self, headers: dict[str, str], receive: Receive, late: list[_RefusedError]
    ) -> Receive:
        """A ``receive`` that raises, and notes in ``late``, what exceeds size or pause."""
        sends_files = headers.get("content-type", "").startswith("multipart/form-data")
        most = self.limits.upload if sends_files else self.limits.body
        too_large = _RefusedError(413, f"a request may have {most} bytes")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:  # the next message says that the client has gone, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.pause)
            except TimeoutError:
                late.append(_RefusedError(408, "the request stopped coming"))
                raise late[0] from None
            received += len(message.get("body", b""))
            if received > most:
                late.append(too_large)
                raise too_large
            complete = not message.get("more_body", False)
            return message

        return bounded

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app until its answer begins; bytes that arrive fast enough win more time."""
        slow = scope["path"].startswith("/infer/")
        seconds = self.limits.slow_seconds if slow else self.limits.seconds
        try:
            async with asyncio.timeout(seconds) as limit:

                async def begin(message: Message) -> None:
                    if not limit.expired():
                        limit.reschedule(None)
                    await send(message)

                async def receive_and_extend() -> Message:
                    message = await receive()
                    if not limit.expired() and (end := limit.when()) is not None:
                        limit.reschedule(end + len(message.get("body", b"")) / self.limits.slowest)
                    return message

                await self.app(scope, receive_and_extend, begin)
        except TimeoutError:
            raise _RefusedError(504, f"no answer within {seconds:g} s") from None

    async def _log_in(self, request: Request) -> JSONResponse:
        """MONAI Label's clients log in here, with any user name and the token as password."""
        route = request.method, request.scope["path"]  # request.url depends on the Host header
        if route == ("GET", "/auth/"):
            return _answer({"enabled": bool(self.token), "client_id": "", "realm": ""})
        if route == ("GET", "/auth/token/valid"):
            return _answer({"username": "annotator"})
        if route == ("POST", "/auth/token") and self.token:
            form = parse_qs((await request.body()).decode("latin-1"))
            if not self._is_token(form.get("password", [""])[0]):
                raise _RefusedError(401, "this is not the token that the server printed")
            return _answer({"access_token": self.token, "token_type": "bearer"})
        raise _RefusedError(404, "Not Found")


def _headers(scope: Scope) -> dict[str, str]:
    """Headers by their lower-case names; a header that decides may come once only."""
    headers: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in headers and name in ONCE:
            raise _RefusedError(400, f"the header {name} comes twice")
        headers[name] = value.decode("latin-1")
    return headers


def _host_name(host: str) -> str:
    """The name in "name:port" or "[::1]:port", "" for what is neither."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _answer(content: dict[str, Any], status: int = 200) -> JSONResponse:
    return JSONResponse(content, status, headers={"connection": "close"})
