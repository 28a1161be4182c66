"""What the tabs of the page share: who follows a job, and widgets. Gradio is asked for nothing but widgets."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import gradio as gr

from view.given import Given
from view.jobs import Job, JobQueue, Work
from view.options import ViewOptions
from view.shelf import Shelf

LOOK_SECONDS = 0.25
Updates = dict[Any, Any]
"""{widget: its new value, or the widget with what changes of it}."""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of what answers at once. What computes waits in the queue of jobs."""


class Page:
    """What all tabs need."""

    def __init__(self, options: ViewOptions, given: Given, queue: JobQueue) -> None:
        self.options, self.given, self.queue, self.shelf = options, given, queue, Shelf()

    async def follow(self, asked: tuple[Work, list[str]], window: str, tab: str) -> AsyncIterator[Job]:
        """The job, whenever there is something new of it, until it has ended; it ends with whoever follows.

        Raises:
            UserError: too many wait already.
        """
        job, known = self.queue.submit(*asked, window=window, tab=tab), None
        try:
            while True:
                job.seen()
                if job.replaced:
                    return
                over = job.is_over
                state = job.state, job.sentence, self.queue.before(job), [one.version for one in job.pictures]
                if state != known or over:
                    known = state
                    yield job
                if over:
                    return
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            job.stop()

    def status(self, job: Job) -> str:
        """How far it is, in words."""
        before = self.queue.before(job)
        if job.is_over:
            stopped = job.state in {"stopped", "waiting"}
            return "stopped; what was made so far stays" if stopped else job.sentence or job.state
        if job.state == "waiting" and before:
            return f"waiting: {before} job{' has its' if before == 1 else 's have their'} turn before"
        done = round(20 * job.share)
        return f"{'█' * done}{'░' * (20 - done)}  {job.sentence or 'beginning'}"

    def leave(self, request: gr.Request) -> None:
        """A window was closed: its jobs end, and what it saw is removed."""
        window = window_of(request)
        self.queue.stop(window)
        self.shelf.drop(window)

    def stopper(self, tab: str) -> Any:
        """What a stop button of the tab does."""

        def stop(request: gr.Request) -> None:
            self.queue.stop(window_of(request), tab)

        return stop


def window_of(request: gr.Request) -> str:
    """A name of the window that asks, good for nothing but to tell windows apart."""
    return str(request.session_hash or "")


def network_choices(given: Given) -> list[tuple[str, int]]:
    """The checkpoints by name, each one's number as its value."""
    return [(one.name, number) for number, one in enumerate(given.networks)]


def line(label: str = "", *, kind: str = "note", **more: Any) -> gr.Textbox:
    """Words of ours or of strangers, which are shown as they are."""
    classes = [kind] if label else [kind, "quiet"]
    return gr.Textbox(label=label, show_label=bool(label), interactive=False, lines=1, elem_classes=classes, **more)


def table(label: str, headers: Iterable[str], **more: Any) -> gr.Dataframe:
    """Rows of text."""
    return gr.Dataframe(
        headers=list(headers),
        label=label,
        datatype="str",
        type="array",
        interactive=False,
        wrap=True,
        buttons=[],
        **more,
    )
