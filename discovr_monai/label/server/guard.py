"""Who may talk to the server, from where, how much and how long: before anything is parsed."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
NO_TOKEN = ("/auth/", "/auth/token")  # how a client learns that it needs one, and gets it
LEAST_TOKEN = 16  # letters


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        upload: bytes of a request that sends files; body: of any other.
        pause: seconds between two pieces of a request.
        seconds: until an answer begins; slow_seconds: of an inference.
        slowest: bytes a second that a request must come with to get more time.
    """

    upload: int = 1 << 30
    body: int = 1 << 20
    pause: float = 30.0
    seconds: float = 120.0
    slow_seconds: float = 660.0
    slowest: float = 50e3


class _RefusedError(Exception):
    """Ends a request with a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """ASGI middleware around the whole server.

    Without a token only this machine's names are answered (no other site's page gets in by
    rebinding its name), and never a page of another origin; with one, every request must bear it.

    Args:
        app: what is guarded.
        token: "" for none.
        limits: see :class:`Limits`.
    """

    def __init__(self, app: App, token: str = "", limits: Limits = Limits()) -> None:
        if token and len(token) < LEAST_TOKEN:
            raise ValueError(f"the token has under {LEAST_TOKEN} letters: take a longer one")
        self.app, self.token, self.limits = app, token, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers, refuses or passes on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        begun = False
        late: list[_RefusedError] = []  # found while the app read: its own answer must not hide it

        async def once(message: Message) -> None:
            nonlocal begun
            if late and not begun:
                raise late[0]
            begun = True
            await send(message)

        try:
            headers = _headers(scope)
            self._check(scope, headers)
            bounded = self._bounded(headers, receive, late)
            if scope["path"].startswith("/auth/"):
                await self._auth(scope, bounded, once)
                return
            await self._in_time(scope, bounded, once)
        except _RefusedError as refused:
            if not begun:
                await _answer(send, refused.status, {"detail": refused.sentence})

    def _check(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self.token and _name(host) not in LOCAL_NAMES:
            raise _RefusedError(403, "this server answers to localhost only")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise _RefusedError(403, "pages of other sites may not use this server")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise _RefusedError(403, "pages of other sites may not use this server")
        if self.token and scope["path"] not in NO_TOKEN and not self._bears(headers):
            raise _RefusedError(401, "a token is needed: Authorization: Bearer TOKEN")

    def _bears(self, headers: dict[str, str]) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(value.strip().encode(), self.token.encode())
        return kind.lower() == "bearer" and same

    def _bounded(
        self, headers: dict[str, str], receive: Receive, late: list[_RefusedError]
    ) -> Receive:
        """The request's body, piece by piece, up to its limits."""
        sends_files = headers.get("content-type", "").startswith("multipart/form-data")
        most = self.limits.upload if sends_files else self.limits.body
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise _RefusedError(413, f"a request may have {most} bytes")
        seen, over = 0, False

        async def bounded() -> Message:
            nonlocal seen, over
            if over:  # a later wait is for the end of the connection, which may take its time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.pause)
            except TimeoutError:
                late.append(_RefusedError(408, "the request stopped coming"))
                raise late[0] from None
            seen += len(message.get("body", b""))
            if seen > most:
                late.append(_RefusedError(413, f"a request may have {most} bytes"))
                raise late[0]
            over = not message.get("more_body", False)
            return message

        return bounded

    async def _in_time(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Until the answer begins; what brings much gets more time, what drips does not."""
        slow = scope["path"].startswith("/infer/")
        seconds = self.limits.slow_seconds if slow else self.limits.seconds
        try:
            async with asyncio.timeout(seconds) as limit:

                async def begin(message: Message) -> None:
                    if not limit.expired():
                        limit.reschedule(None)
                    await send(message)

                async def uploading() -> Message:
                    message = await receive()
                    if not limit.expired() and (end := limit.when()) is not None:
                        limit.reschedule(end + len(message.get("body", b"")) / self.limits.slowest)
                    return message

                await self.app(scope, uploading, begin)
        except TimeoutError:
            raise _RefusedError(504, f"no answer within {seconds:g} s") from None

    async def _auth(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """MONAI Label's clients ask here whether to log in: any name, the token as password."""
        path, method = scope["path"], scope["method"]
        if (method, path) == ("GET", "/auth/"):
            await _answer(send, 200, {"enabled": bool(self.token), "client_id": "", "realm": ""})
        elif (method, path) == ("GET", "/auth/token/valid"):
            await _answer(send, 200, {"username": "annotator"})
        elif (method, path) == ("POST", "/auth/token") and self.token:
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            given = parse_qs(body.decode("latin-1")).get("password", [""])[0]
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise _RefusedError(401, "this is not the token that the server printed")
            await _answer(send, 200, {"access_token": self.token, "token_type": "bearer"})
        else:
            raise _RefusedError(404, "Not Found")


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    """Lower-case names; one that comes twice is refused where we decide by it."""
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in found and name in ("host", "origin", "authorization", "content-length"):
            raise _RefusedError(400, f"the header {name} comes twice")
        found[name] = value.decode("latin-1")
    return found


def _name(host: str) -> str:
    """Of "name:port" and "[::1]:port"."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
