"""The server of the page: Gradio's routes that the page needs, behind a guard, and no others.

Answers may be read by this page alone: the browser is told so, a request under another host's name is refused (a page
elsewhere could point its own name at this machine), and what starts or stops work must be sent as JSON from this
page's own address. Of files, those below `scratch()` are served, and nothing can be put there from outside.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import parse_json
from pipeline.runtime.processes import StopRequest, launch
from view.given import Given, find_given
from view.jobs import JobQueue
from view.options import LOOPBACK, ViewOptions
from view.shelf import scratch

MOST_REQUEST_BYTES = 1 << 16
POLL_SECONDS = 0.1
GET = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(?:assets|static)/[\w./-]+|/gradio_api/startup-events"
    r"|/gradio_api/queue/data|/gradio_api/heartbeat/\w+|/gradio_api/file=(?P<file>/.+)"
)
POST = re.compile(r"/gradio_api/(?:queue/join|run/predict|cancel|reset)/?")
"""What the page asks for; Gradio answers much else: uploads, a proxy, its documentation, recordings."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "dit-view",
}
POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_SCRIPT = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


def serve(options: ViewOptions) -> int:
    """Serve the page until a signal comes; 128 + that signal.

    Raises:
        UserError: what was named is not there, the address cannot be listened at, or a launcher started several.
    """
    if launch().world_size > 1:
        raise UserError("dit-view is one process; start it without accelerate launch or torchrun")
    with StopRequest() as stop, serving(options, find_given(options)) as port:
        shown = f"[{options.host}]" if ":" in options.host else options.host
        say(f"open http://{shown}:{port}/ in a browser; Ctrl-C ends")
        if options.host not in LOOPBACK:
            warn(f"everyone who reaches {options.host}:{port} can use this page: there is no password")
        while stop.signal is None:
            time.sleep(POLL_SECONDS)
    return stop.exit_status


@contextlib.contextmanager
def serving(options: ViewOptions, given: Given) -> Iterator[int]:
    """The port at which the page answers while this is open.

    Raises:
        UserError: the address cannot be listened at, or Gradio is not installed.
    """
    with _listen(options) as listening:
        uvicorn, build = _gradio()
        queue = JobQueue()
        served: list[Any] = []

        async def serve_page() -> None:
            app = application(options, build(options, given, queue))  # within the loop: Gradio would begin another one
            config = uvicorn.Config(
                app, log_level="error", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=1
            )
            served.append(uvicorn.Server(config))
            await served[0].serve([listening])

        thread = threading.Thread(target=lambda: asyncio.run(serve_page()), name="server", daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not (served and served[0].started):
                time.sleep(0.01)
            if not thread.is_alive():
                raise RuntimeError("the server ended before it had begun")  # its thread has said why
            yield listening.getsockname()[1]
        finally:
            # of windows that are still open it would print a traceback
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            for server in served:
                server.should_exit = True
            queue.close()
            thread.join(10)


def _gradio() -> tuple[Any, Any]:
    """uvicorn, and what builds the page.

    Raises:
        UserError: Gradio is not installed.
    """
    # before Gradio is imported, which reads both then
    os.environ |= {"GRADIO_TEMP_DIR": str(scratch()), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import uvicorn

        from view.page import build
    except ModuleNotFoundError as error:
        if error.name not in {"gradio", "uvicorn"}:
            raise
        raise UserError("the page needs Gradio; pip install 'dit-pipeline[view]'") from error
    return uvicorn, build


def _listen(options: ViewOptions) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port} cannot be listened at ({error.strerror or error}); choose "
            f"another --port (0 takes a free one)"
        ) from error


def application(options: ViewOptions, blocks: Any) -> "Guard":
    """Gradio's application behind the guard."""
    import fastapi
    import gradio

    from view.page import CSS, theme

    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    inner = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    gradio.mount_gradio_app(
        outer,
        blocks,
        path="/",
        app_kwargs=inner,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )
    return Guard(outer, options)


class Guard:
    """An ASGI application that refuses what this page did not send, and gives every answer its headers."""

    def __init__(self, app: Any, options: ViewOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = refusal(scope["method"], scope["path"], headers, self._options)
        if not refused and scope["method"] == "POST":
            body = await _read(receive)
            refused = refused_body(body)
            receive = _again(body, receive)
        if refused:
            status, sentence = refused
            body = json.dumps({"sentence": sentence, "detail": sentence}).encode()
            start: Message = {"type": "http.response.start", "status": status, "headers": []}
            start["headers"] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send(_with_headers(start))
            await send({"type": "http.response.body", "body": body})
            return
        if scope["path"] == "/":
            await self._app(_plain(scope), receive, _PageSender(send))
            return

        async def told(message: Message) -> None:
            await send(_with_headers(message) if message["type"] == "http.response.start" else message)

        try:
            await self._app(scope, receive, told)
        except (FileNotFoundError, RuntimeError) as error:
            # A closing window still asks for a picture that goes with it; whoever serves files has answered by then.
            if isinstance(error, RuntimeError) and "does not exist" not in str(error):
                raise


def refusal(method: str, path: str, headers: MutableMapping[str, str], options: ViewOptions) -> tuple[int, str] | None:
    """(status, sentence) of what is not answered."""
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if options.host in LOOPBACK and name.strip("[]") not in LOOPBACK:
        return 400, f"this page answers to {' and '.join(LOOPBACK)} only, not to {name[:60]!r}"
    if method == "GET":
        return _refused_path(path)
    if method != "POST" or not POST.fullmatch(path):
        return 405, "this page takes no such request"
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return 400, "the request comes from another page; use the page of dit-view itself"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 400, "the request is no JSON; use the page of dit-view itself"
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or int(length) > MOST_REQUEST_BYTES:
        return 413, f"a request has at most {MOST_REQUEST_BYTES:,} bytes, and says how many"
    return None


def refused_body(body: bytes) -> tuple[int, str] | None:
    """(status, sentence) of a body that is no request of the page.

    Its widgets send numbers, words and lists of them. Gradio takes an object in their place for the description of a
    file, and if a function gave it back, would look for that file.
    """
    try:
        asked = parse_json(body, "the request", advice="try again")
    except UserError as error:
        return 400, str(error)
    if not isinstance(asked, dict):
        return 400, "the request is no object; use the page of dit-view itself"
    sent = asked.get("data")
    parts = [part for value in (sent if isinstance(sent, list) else [sent]) for part in _flat(value)]
    if any(isinstance(part, dict | list) for part in parts):
        return 400, "the request holds more than numbers and words; use the page of dit-view itself"
    return None


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


async def _read(receive: Receive) -> bytes:
    """The body, whose length is known to be small."""
    parts = bytearray()
    while True:
        message = await receive()
        parts += message.get("body", b"")
        if len(parts) > MOST_REQUEST_BYTES or not message.get("more_body"):
            return bytes(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives the body that was read once more, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return messages.pop() if messages else await receive()

    return received


def _refused_path(path: str) -> tuple[int, str] | None:
    found = GET.fullmatch(path)
    if found is None or ".." in path.split("/"):
        return 404, "there is no such thing on this page"
    if found["file"] and not Path(found["file"]).resolve().is_relative_to(scratch()):
        return 404, "there is no such file on this page"
    return None


def _with_headers(start: Message, scripts: str = "") -> Message:
    """The start of an answer with the headers that keep the page to itself."""
    ours = {**HEADERS, "Content-Security-Policy": POLICY.format(scripts=scripts)}
    dropped = {name.lower().encode() for name in ours}
    kept = [
        (name, value)
        for name, value in start["headers"]
        if name.lower() not in dropped and not name.lower().startswith(b"access-control-")
    ]
    return {**start, "headers": [*kept, *((name.encode(), value.encode()) for name, value in ours.items())]}


def _plain(scope: Message) -> Message:
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]}


class _PageSender:
    """Sends the page with a policy that allows the very scripts that stand in it, by their checksums."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        page = b"".join(self._parts)
        sums = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _SCRIPT.findall(page))
        await self._send(_with_headers(self._start, "".join(f" 'sha256-{one}'" for one in sums)))
        await self._send({"type": "http.response.body", "body": page})
