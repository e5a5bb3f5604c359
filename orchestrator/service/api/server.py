"""Serving the API: the listeners, and what every request has to go through before it is answered.

HTTP/1.1, one request a connection, JSON; an error is `{"code", "message", "hint"}`. Invariants:
- nobody who is connected can hold up the end, or keep others out (`connection`);
- what is refused is logged, but not more often than once a second for each reason;
- by TCP, nothing is changed without the token.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from orchestrator import aio
from orchestrator.config import Address, DaemonSettings
from orchestrator.errors import (
    AdmissionError,
    AgentError,
    ConfigError,
    MonitorError,
    RefusedError,
    StateError,
    StorageError,
    TargetError,
    ToolError,
    UnknownName,
    VmfleeceError,
)
from orchestrator.service.api import guard, openapi, pages, stream, unix
from orchestrator.service.api.base import Answers, Service
from orchestrator.service.api.connection import Connections
from orchestrator.service.api.routes import EVENTS, METRICS, OPENAPI, ROUTES, Call, Route
from orchestrator.service.api.token import read_token
from orchestrator.service.documents import ErrorBody

log = structlog.get_logger(__name__)

SHUTDOWN_SECONDS = 1.0
BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
LINGER_SECONDS = 0.5
"""How long what is still being sent is read after a refusal, which would be lost otherwise."""
LOG_SECONDS = 1.0
BACKLOG = 128
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUSES: tuple[tuple[type[VmfleeceError], int], ...] = (
    (UnknownName, 404),
    (ConfigError, 400),
    (RefusedError, 409),
    (AdmissionError, 409),
    (stream.TooMany, 503),
    (MonitorError, 502),
    (AgentError, 502),
    (StorageError, 502),
    (TargetError, 502),
    (ToolError, 502),
)
STATE_STATUSES = {"locked": 409, "stopping": 503}

# What it logs about clients would reach the terminal: nobody sets a handler.
logging.getLogger("aiohttp").setLevel(logging.CRITICAL)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def served(settings: DaemonSettings, answers: Answers) -> AsyncIterator["Served"]:
    """Answer on the control socket for the block, and of a daemon also by TCP, if that is configured.

    Makes run_dir if it is missing. Raises StateError: `run-dir-in-use` if somebody serves there already,
    `state-unusable` if no socket can be made there, `listen-unusable` if the address cannot be had; and
    VmfleeceError, `token-file`, if there is a token that cannot be used. The socket is gone at the end, however
    the block ends.
    """
    path = unix.socket_path(settings.run_dir)
    server = _Server(settings, answers, path, await asyncio.to_thread(pages.load))
    tcp = Served(server, answers.service)
    await tcp.check(settings)
    with unix.bound(path) as listener, contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        stack.callback(tcp.close)
        tcp.take(settings)
        runner = web.AppRunner(
            server.application(),
            access_log=None,
            shutdown_timeout=SHUTDOWN_SECONDS,
            lingering_time=LINGER_SECONDS,
        )
        local: asyncio.Server | None = None
        try:
            await runner.setup()
            assert runner.server is not None  # noqa: S101  setup() made it
            loop = asyncio.get_running_loop()
            server.local = Connections(runner.server, server.dropped)
            server.remote = Connections(runner.server, server.dropped)
            local = await loop.create_unix_server(server.local, sock=listener, start_serving=False)
            await tcp.settle()
            await local.start_serving()
            yield tcp
        finally:
            answers.feed.end()
            if local is not None:
                local.close()
            tcp.close()
            await aio.finish(runner.cleanup())


class Served:
    """Where is answered by TCP, which may be changed: `check`, then `take`, then `settle`."""

    def __init__(self, server: "_Server", service: Service) -> None:
        self._server = server
        self._service = service
        self._bound: dict[Address, socket.socket] = {}
        self._serving: dict[Address, asyncio.Server] = {}
        self._wanted: Address | None = None

    @property
    def address(self) -> Address | None:
        """Where is listened; None: not by TCP."""
        return self._wanted

    async def check(self, settings: DaemonSettings) -> None:
        """Look at the token: what is wrong with it is said now. Raises VmfleeceError, `token-file`."""
        if self._listens_at(settings) is not None:
            await asyncio.to_thread(read_token, settings.token_file)

    def take(self, settings: DaemonSettings) -> None:
        """Have the address, and go by these settings from now on. Raises StateError, and nothing has changed then.

        Connections to an address that is left go on to their ends.
        """
        wanted = self._listens_at(settings)
        if wanted is not None and wanted not in self._bound:
            self._bound[wanted] = _bound(wanted)
        self._wanted = wanted
        self._server.go_by(settings)

    async def settle(self) -> None:
        """Answer there, and at no address from before."""
        for address in [one for one in self._bound if one != self._wanted]:
            self._close(address)
        if self._wanted is not None and self._wanted not in self._serving:
            loop = asyncio.get_running_loop()
            self._serving[self._wanted] = await loop.create_server(
                self._server.remote, sock=self._bound[self._wanted]
            )

    def close(self) -> None:
        """Answer nowhere. May be called again."""
        for address in tuple(self._bound):
            self._close(address)

    def _close(self, address: Address) -> None:
        if (serving := self._serving.pop(address, None)) is not None:
            serving.close()
        self._bound.pop(address).close()

    def _listens_at(self, settings: DaemonSettings) -> Address | None:
        return settings.listen if self._service is Service.DAEMON else None


def _bound(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StateError(
            f"cannot listen on {address}: {error.strerror}",
            hint="set daemon.listen to another address, or end who listens there",
            code="listen-unusable",
        ) from error
    return listener


class _Server:
    """What a request goes through."""

    local: Connections
    remote: Connections

    def __init__(
        self, settings: DaemonSettings, answers: Answers, path: Path, static: Mapping[str, pages.Page]
    ) -> None:
        self._answers = answers
        self._path = path
        self._static = static
        self.go_by(settings)
        self._logged: dict[str, tuple[float, int]] = {}

    def go_by(self, settings: DaemonSettings) -> None:
        """Have these settings from now on."""
        self._settings = settings
        self._names = {name.lower() for name in (*settings.hosts, socket.gethostname())}

    def application(self) -> web.Application:
        """All routes, behind the guard."""
        application = web.Application(middlewares=[self._answer], client_max_size=BODY_BYTES)
        for route in ROUTES:
            application.router.add_route(route.method, route.path, self._handler(route))
        application.router.add_get(EVENTS, self._events, allow_head=False)
        application.router.add_get(OPENAPI, self._openapi, allow_head=False)
        application.router.add_get(METRICS, self._metrics, allow_head=False)
        for path in self._static:
            application.router.add_get(path, self._page, allow_head=False)
        return application

    def dropped(self, why: str) -> None:
        """A connection was ended."""
        self._refused("slow-client", f"a connection was ended: {why}", peer="")

    # What every request goes through ---------------------------------------------------------------------------

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = self.local.of(request) or self.remote.of(request)
        if connection is not None:
            connection.asked()
        asked = f"{request.method} {request.path[:200]}"
        try:
            await self._check(request)
            response = await handler(request)
        except web.HTTPException as refused:
            code = refused.reason.lower().replace(" ", "-")
            report = ErrorBody(code, f"{asked}: {refused.reason}", f"what there is: GET {OPENAPI}")
            response = self._error(request, report, refused.status)
            if "Allow" in refused.headers:
                response.headers["Allow"] = refused.headers["Allow"]
        except VmfleeceError as error:
            response = self._error(request, ErrorBody(error.code, error.message, error.hint), _status_of(error))
        except Exception as error:  # whoever asked is told, and the runs go on
            log.exception("api.bug", asked=asked)
            report = ErrorBody("bug", f"{asked}: {type(error).__name__}: {error}", "report this with the log")
            response = self._error(request, report, 500)
        response.force_close()
        if not response.prepared:
            response.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
        return response

    async def _check(self, request: web.Request) -> None:
        """Whether whoever asks may. Raises Forbidden."""
        if self.local.of(request) is not None:
            group = (await asyncio.to_thread(self._path.stat)).st_gid
            guard.check_peer(_peer(request), group=group)
            return
        guard.check_host(request.host, self._names)
        guard.check_origin(request.headers.get("Origin"), request.host)
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            token = await asyncio.to_thread(read_token, self._settings.token_file)
            guard.check_token(request.headers.get("Authorization"), token)

    def _error(self, request: web.Request, report: ErrorBody, status: int) -> web.Response:
        if status in (400, 401, 403, 408, 413, 415, 421, 503):
            self._refused(report.code, report.message, peer=self._who(request))
        response = web.Response(
            body=openapi.adapter(ErrorBody).dump_json(report), status=status, content_type="application/json"
        )
        if status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    def _who(self, request: web.Request) -> str:
        if self.local.of(request) is None:
            return str(request.remote)
        try:
            return str(_peer(request))
        except OSError:
            return "gone"

    def _refused(self, code: str, message: str, *, peer: str) -> None:
        last, unsaid = self._logged.get(code, (0.0, 0))
        now = time.monotonic()
        if now - last < LOG_SECONDS:
            self._logged[code] = (last, unsaid + 1)
            return
        self._logged[code] = (now, 0)
        log.warning("api.refused", code=code, error=message, peer=peer, unsaid=unsaid)

    # What is answered ------------------------------------------------------------------------------------------

    def _handler(self, route: Route) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            call = Call(
                request.match_info.get(route.name, ""),
                _checked(route.query, dict(request.query)),
                await _body(request, route.body) if route.body is not None else None,
            )
            if route.changes:
                log.info("api.asked", method=request.method, path=request.path, peer=self._who(request))
            document = await route.answered(self._answers, call)
            body = await asyncio.to_thread(openapi.adapter(route.answer).dump_json, document)
            return web.Response(body=body, status=202 if route.accepted else 200, content_type="application/json")

        return handle

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if (connection := self.local.of(request) or self.remote.of(request)) is not None:
            connection.unlimited()
        return await stream.follow(request, self._answers.feed)

    async def _openapi(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(openapi.document())

    async def _page(self, request: web.Request) -> web.StreamResponse:
        page = self._static[request.path]
        return web.Response(body=page.body, headers=page.headers)

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._answers.metrics(), headers={"Content-Type": METRICS_TYPE})


def _peer(request: web.Request) -> guard.Peer:
    """Raises OSError if the connection is gone."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    return guard.peer_of(transport.get_extra_info("socket"))


def _status_of(error: VmfleeceError) -> int:
    if isinstance(error, guard.Forbidden):
        return error.status
    if error.code == "no-snapshot":
        return 404
    if isinstance(error, StateError):
        return STATE_STATUSES.get(error.code, 500)
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


async def _body(request: web.Request, model: type[BaseModel]) -> BaseModel:
    """Raises ConfigError if it makes no sense, and aiohttp's errors."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType
    if request.content_length is not None and request.content_length > BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(BODY_BYTES, request.content_length)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _senseless(error) from error


def _checked(model: type[BaseModel], given: dict[str, str]) -> BaseModel:
    """Raises ConfigError."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _senseless(error) from error


def _senseless(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return ConfigError(
        f"{place}: {first['msg']}" if place else str(first["msg"]), hint=f"GET {OPENAPI} says what is allowed"
    )
