"""The server of the page: fixed files, numbers and words in JSON, and nothing that names a file of this machine.

Every route is a fixed word with numbers in it. Answers may be read by this page alone: the browser is told so, a
request under another host's name is refused (a page elsewhere could point its own name at this machine), and what
starts or stops work must be sent as JSON from this page's own address.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import parse_json, typed
from pipeline.runtime.processes import StopRequest, launch
from view import runs, stores
from view.given import Given, describe_network, find_given
from view.jobs import Job, JobQueue, Work
from view.options import LOOPBACK, ViewOptions
from view.sampling import SampleRequest, sampling
from view.stores import BrowseRequest, browsing

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MOST_REQUEST_BYTES = 1 << 16
POLL_SECONDS = 0.1
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "dit-view",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def serve(options: ViewOptions) -> int:
    """Serve the page until a signal comes; 128 + that signal.

    Raises:
        UserError: what was named is not there, the address cannot be listened at, or a launcher started several.
    """
    if launch().world_size > 1:
        raise UserError("dit-view is one process; start it without accelerate launch or torchrun")
    given = find_given(options)
    with StopRequest() as stop:
        asyncio.run(_serve(options, given, stop))
        return stop.exit_status


async def _serve(options: ViewOptions, given: Given, stop: StopRequest) -> None:
    logging.getLogger("aiohttp.access").disabled = True
    queue = JobQueue()
    runner = web.AppRunner(application(options, given, queue), handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"--host {options.host} --port {options.port} cannot be listened at ({reason}); choose another "
                f"--port (0 takes a free one)"
            ) from error
        port = runner.addresses[0][1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        say(f"open http://{shown}:{port}/ in a browser; Ctrl-C ends")
        if options.host not in LOOPBACK:
            warn(f"everyone who reaches {options.host}:{port} can use this page: there is no password")
        while stop.signal is None:
            await asyncio.sleep(POLL_SECONDS)
    finally:
        await runner.cleanup()
        await asyncio.to_thread(queue.close)


def application(options: ViewOptions, given: Given, queue: JobQueue) -> web.Application:
    """Every route of the page."""
    pages = Pages(options, given, queue)
    app = web.Application(client_max_size=MOST_REQUEST_BYTES, middlewares=[_guard(options)])
    for file in sorted((Path(__file__).parent / "page").iterdir()):
        name = "" if file.name == "index.html" else file.name
        app.router.add_get(f"/{name}", _fixed(file.read_bytes(), KINDS[file.suffix]))
    number, job = r"{number:\d{1,3}}", r"{job:[0-9a-f]{16}}"
    app.router.add_get("/given", pages.given)
    app.router.add_get(f"/networks/{number}", pages.network)
    app.router.add_get(f"/runs/{number}", pages.run)
    app.router.add_get(rf"/runs/{number}/previews/{{step:\d{{1,12}}}}.png", pages.preview)
    app.router.add_get("/curves.png", pages.curves)
    app.router.add_get(f"/stores/{number}", pages.store)
    app.router.add_post("/samples", pages.start_samples)
    app.router.add_post("/browse", pages.start_browsing)
    app.router.add_get(f"/jobs/{job}", pages.job)
    app.router.add_post(f"/jobs/{job}/stop", pages.stop)
    app.router.add_get(f"/jobs/{job}/{number}.png", pages.picture)
    app.router.add_get(rf"/jobs/{job}/{number}/{{file:[a-z]+\.png(?:\.json)?}}", pages.file)
    return app


def _fixed(body: bytes, kind: str) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset="utf-8")

    return handler


def _guard(options: ViewOptions) -> Any:
    """Refuse what this page did not send; a `UserError` is a sentence to show; every answer has the headers."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check_sender(request, options)
            response = await handler(request)
        except UserError as error:
            response = web.json_response({"sentence": str(error)}, status=400)
        except web.HTTPException as error:  # no such route, another method, a request that is too large
            response = web.json_response({"sentence": f"{error.status}: {error.reason}"}, status=error.status)
        response.headers.update(HEADERS)
        return response

    return guarded


def _check_sender(request: web.Request, options: ViewOptions) -> None:
    """Raise UserError where the request comes from another page, or under another name of this machine."""
    host = request.headers.get("Host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if options.host in LOOPBACK and name.strip("[]") not in LOOPBACK:
        raise UserError(f"this page answers to {' and '.join(LOOPBACK)} only, not to {name[:60]!r}")
    if request.method == "POST":
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise UserError("the request comes from another page; use the page of dit-view itself")
        if request.content_type != "application/json":
            raise UserError("the request is no JSON; use the page of dit-view itself")


class Pages:
    """What the page can ask for."""

    def __init__(self, options: ViewOptions, given: Given, queue: JobQueue) -> None:
        self._options, self._given, self._queue = options, given, queue

    async def given(self, _: web.Request) -> web.Response:
        """The lists of what was named, by number."""
        networks = [{"name": one.name, "run": one.is_run, "steps": sorted(one.steps())} for one in self._given.networks]
        stores = [{"name": one.name} for one in self._given.stores]
        return web.json_response({"networks": networks, "stores": stores, "data": self._options.data is not None})

    async def network(self, request: web.Request) -> web.Response:
        """What one checkpoint can do; `?step=` of a run."""
        network = self._given.network(_number(request))
        step = request.query.get("step", "")
        place = network.place(int(step) if step.isascii() and step.isdigit() else None)
        return web.json_response(await asyncio.to_thread(describe_network, place))

    async def run(self, request: web.Request) -> web.Response:
        """A run's numbers and previews."""
        return web.json_response(await asyncio.to_thread(runs.describe, self._given.network(_number(request))))

    async def preview(self, request: web.Request) -> web.Response:
        """One preview of a run."""
        network, step = self._given.network(_number(request)), int(request.match_info["step"])
        return _png(await asyncio.to_thread(runs.preview, network, step))

    async def curves(self, request: web.Request) -> web.Response:
        """The curves of `?runs=0,2` over each other."""
        given = [word for word in request.query.get("runs", "").split(",") if word.isascii() and word.isdigit()]
        smoothing = {"0": 0.0, "1": 0.9, "2": 0.98}.get(request.query.get("smooth", "1"), 0.9)
        numbers = [int(word) for word in given[: len(self._given.networks)]]
        return _png(await asyncio.to_thread(runs.curves, self._given, numbers, smoothing=smoothing))

    async def store(self, request: web.Request) -> web.Response:
        """What a store is."""
        return web.json_response(await asyncio.to_thread(stores.describe, self._given.store(_number(request))))

    async def start_samples(self, request: web.Request) -> web.Response:
        """A job that samples."""
        asked = await _asked(request, SampleRequest)
        return self._start(*sampling(asked, self._given, self._options))

    async def start_browsing(self, request: web.Request) -> web.Response:
        """A job that decodes pictures of a store."""
        asked = await _asked(request, BrowseRequest)
        return self._start(*browsing(asked, self._given, self._options))

    def _start(self, work: Work, titles: list[str]) -> web.Response:
        job = self._queue.submit(work, titles)
        return web.json_response(job.to_json(self._queue.before(job)))

    async def job(self, request: web.Request) -> web.Response:
        """How far a job is."""
        job = self._job(request)
        job.seen()
        return web.json_response(job.to_json(self._queue.before(job)))

    async def stop(self, request: web.Request) -> web.Response:
        """Ask a job to end at its next step."""
        job = self._job(request)
        job.stop()
        return web.json_response(job.to_json(self._queue.before(job)))

    async def picture(self, request: web.Request) -> web.Response:
        """A picture of a job as it is now."""
        picture = self._of_job(request)
        if not picture.version:
            raise UserError("there is nothing to see yet; wait a moment")
        return _png(picture.png)

    async def file(self, request: web.Request) -> web.Response:
        """A finished file of a job, to be saved."""
        name = request.match_info["file"]
        body = self._of_job(request).files.get(name)
        if body is None:
            raise UserError("there is no such file, or not yet; wait until the picture is finished")
        kind = "application/json" if name.endswith(".json") else "image/png"
        return web.Response(
            body=body, content_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'}
        )

    def _job(self, request: web.Request) -> Job:
        return self._queue.get(request.match_info["job"])

    def _of_job(self, request: web.Request) -> Any:
        pictures = self._job(request).pictures
        number = _number(request)
        if number >= len(pictures):
            raise UserError("the job has no such picture; load the page again")
        return pictures[number]


def _number(request: web.Request) -> int:
    return int(request.match_info["number"])


def _png(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="image/png")


async def _asked(request: web.Request, kind: type[msgspec.Struct]) -> Any:
    """The request's JSON as that type.

    Raises:
        UserError: it is not.
    """
    return typed(
        parse_json(await request.read(), "the request", advice="try again"),
        kind,
        "the request is not understood",
        advice="change it",
    )
