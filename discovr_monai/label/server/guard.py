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
from typing import Any, NoReturn
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
        upload: bytes of a request that sends files.
        body: bytes of any other request.
        pause: seconds between two pieces of a request.
        seconds: until the answer to a request begins.
        slow_seconds: the same for an inference.
        slowest: bytes per second at which a request must arrive to be given more time.
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
        self.status = status


class _Exchange:
    """One request and its answer, held to the limits of size and time.

    A refusal is raised in the app's reading or writing. The app may catch it and answer by itself:
    then :meth:`send` raises it again, so that the app's answer does not hide it.
    """

    def __init__(self, receive: Receive, send: Send, limits: Limits) -> None:
        self._receive, self._send, self._limits = receive, send, limits
        self.timer: asyncio.Timeout | None = None  # until the answer begins
        self.begun = False  # the answer
        self._most = limits.body
        self._received, self._complete = 0, False
        self._refusal: _RefusedError | None = None

    def expect(self, headers: dict[str, str]) -> None:
        """Refuses a request by the size that it declares."""
        if headers.get("content-type", "").startswith("multipart/form-data"):
            self._most = self._limits.upload
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            self._refuse(413, f"a request may have {self._most} bytes")

    async def receive(self) -> Message:
        """The next piece of the request; every piece wins some time."""
        if self._complete:  # the next message says that the client has gone, whenever that is
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._limits.pause)
        except TimeoutError:
            self._refuse(408, "the request stopped coming")
        size = len(message.get("body", b""))
        self._received += size
        if self._received > self._most:
            self._refuse(413, f"a request may have {self._most} bytes")
        self._complete = not message.get("more_body", False)
        if self.timer and not self.timer.expired() and (end := self.timer.when()) is not None:
            self.timer.reschedule(end + size / self._limits.slowest)
        return message

    async def send(self, message: Message) -> None:
        """Sends a piece of the answer, if nothing was refused; it may take any time."""
        if self._refusal and not self.begun:
            raise self._refusal
        self.begun = True
        if self.timer and not self.timer.expired():
            self.timer.reschedule(None)
        await self._send(message)

    def _refuse(self, status: int, sentence: str) -> NoReturn:
        self._refusal = _RefusedError(status, sentence)
        raise self._refusal


class Guard:
    """ASGI middleware around the whole server.

    Without a token the server answers only requests for a name of this machine, so that no web
    page gets in by rebinding its own name to 127.0.0.1. With a token every request must bear it.
    Pages of another origin are always refused.

    Args:
        app: the guarded application.
        token: at least 16 letters, or "" for none.
        limits: what one request may take.

    Raises:
        ValueError: the token is too short.
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
        exchange, path = _Exchange(receive, send, self.limits), scope["path"]
        app = self._log_in if path.startswith("/auth/") else self.app
        slow = path.startswith("/infer/")
        seconds = self.limits.slow_seconds if slow else self.limits.seconds
        refusal = None
        try:
            headers = _headers(scope)
            self._check(path, headers)
            exchange.expect(headers)
            async with asyncio.timeout(seconds) as exchange.timer:
                await app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            return  # nobody waits for the answer
        except TimeoutError:
            refusal = _RefusedError(504, f"no answer within {seconds:g} s")
        except _RefusedError as error:
            refusal = error
        if refusal and not exchange.begun:
            await _answer({"detail": str(refusal)}, refusal.status)(scope, receive, send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        """Refuses other names of this machine, pages of other sites, and who has no token."""
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

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """MONAI Label's clients log in here, with any user name and the token as password."""
        route = scope["method"], scope["path"]
        if route == ("GET", "/auth/"):
            content: dict[str, Any] = {"enabled": bool(self.token), "client_id": "", "realm": ""}
        elif route == ("GET", "/auth/token/valid"):
            content = {"username": "annotator"}
        elif route == ("POST", "/auth/token") and self.token:
            form = parse_qs((await Request(scope, receive).body()).decode("latin-1"))
            if not self._is_token(form.get("password", [""])[0]):
                raise _RefusedError(401, "this is not the token that the server printed")
            content = {"access_token": self.token, "token_type": "bearer"}
        else:
            raise _RefusedError(404, "Not Found")
        await _answer(content)(scope, receive, send)


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
