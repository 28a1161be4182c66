"""The tab that looks into stores: what one is, what was left out and why, and pictures by class."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import typed
from view.jobs import Job
from view.stores import SHOWN, BrowseRequest, browsing, describe
from view.widgets import QUIET, Page, Updates, line, table, window_of

ALL = -2
COMPARED = {"": "nothing", "original": "the image it was made from", "again": "itself, encoded and decoded once more"}


class StoresTab:
    """Its widgets, and what they do."""

    def __init__(self, page: Page) -> None:
        self._page = page
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._choose()
            with gr.Column(scale=3):
                self._show()
        self.first, self.seen = gr.State(0), gr.State(value=False)

    def _choose(self) -> None:
        page = self._page
        choices = [(one.name, number) for number, one in enumerate(page.given.stores)]
        comparisons = [(words, name) for name, words in COMPARED.items() if name != "original" or page.options.data]
        self.which = gr.Dropdown(choices, value=0, label="store")
        self.label = gr.Dropdown([("all classes", ALL)], value=ALL, label="class")
        self.view = gr.Dropdown([("center", 0)], value=0, label="view")
        self.compared = gr.Dropdown(comparisons, value="", label="compared with")
        if not page.options.data:
            gr.Markdown(
                "A store keeps no images: start dit-view with `--data`, which names those it was made from, to see "
                "the VAE's error. What a second round through the VAE changes can be measured without them."
            )
        with gr.Row():
            self.start = gr.Button("Show", variant="primary", min_width=100)
            self.stop = gr.Button("Stop", min_width=100)
        with gr.Row():
            self.before = gr.Button("← Before", interactive=False, min_width=100)
            self.after = gr.Button("After →", interactive=False, min_width=100)

    def _show(self) -> None:
        self.status = line("pictures")
        self.tiles = gr.Gallery(
            show_label=False,
            columns=6,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=[],
            elem_classes=["tiles"],
        )
        self.facts = table("what it is", ["", " "])
        self.classes = table("samples by class", ["label", "class", "folder", "samples"], max_height=320)
        self.statistics = table("latents by channel", ["channel", "mean", "standard deviation"])
        self.left = line("left out")
        self.reasons = table("left out, by reason", ["inputs", "reason"], visible=False)
        self.by_name = table("left out, by name", ["input", "reason"], visible=False, max_height=320)

    def wire(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Let the widgets do what they are for."""
        wanted = [self.which, self.label, self.view, self.compared]
        about = [self.label, self.view, self.facts, self.classes, self.statistics]
        about += [self.left, self.reasons, self.by_name, self.status]
        outputs = [self.status, self.tiles, self.first, self.before, self.after]
        browsed: dict[str, Any] = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private"}
        blocks.load(self.read, self.which, about, **QUIET)
        tab.select(self.open, [self.seen, *wanted], **{**browsed, "outputs": [self.seen, *outputs]})
        self.which.input(self.read, self.which, about, **QUIET).then(self.begin, wanted, **browsed)
        self.classes.select(_class_of, None, self.label, **QUIET).then(self.begin, wanted, **browsed)
        for event in (self.start.click, self.label.input, self.view.input, self.compared.input):
            event(self.begin, wanted, **browsed)
        self.before.click(self.back, [self.first, *wanted], **browsed)
        self.after.click(self.on, [self.first, *wanted], **browsed)
        self.stop.click(self._page.stopper("stores"), **QUIET)

    def read(self, number: int) -> Updates:
        """What a store is."""
        try:
            store = describe(self._page.given.store(number))
        except UserError as error:
            return {self.status: str(error)}
        classes, skipped = store["classes"], store["skipped"]
        named = [(f"{one['name'] or one['id'] or one['label']} ({one['samples']:,})", one["label"]) for one in classes]
        some = bool(skipped["count"])
        return {
            self.label: gr.Dropdown([("all classes", ALL), *named], value=ALL),
            self.view: gr.Dropdown([(name, place) for place, name in enumerate(store["views"])], value=0),
            self.facts: [list(fact) for fact in store["facts"].items()],
            self.classes: [[str(one["label"]), one["name"], one["id"], f"{one['samples']:,}"] for one in classes],
            self.statistics: [
                [str(one["channel"]), f"{one['mean']:.6f}", f"{one['std']:.6f}"] for one in store["statistics"]
            ],
            self.left: f"inputs: {skipped['count']:,}" if some else "Nothing was left out.",
            self.reasons: gr.Dataframe(
                [[f"{one['inputs']:,}", one["reason"]] for one in skipped["reasons"]], visible=some
            ),
            self.by_name: gr.Dataframe([[one["key"], one["reason"]] for one in skipped["first"]], visible=some),
        }

    async def browse(self, request: gr.Request, start: int, *values: Any) -> AsyncIterator[Updates]:
        """The pictures from that number on, as they are decoded."""
        store, label, view, compared = values
        asked = {"store": store, "label": None if label == ALL else label, "view": view, "compared": compared}
        window, paths = window_of(request), dict[int, str]()
        try:
            wanted = typed({**asked, "first": start}, BrowseRequest, "the choice is not understood", advice="change it")
            yield {self.tiles: [], self.first: start}
            async for job in self._page.follow(
                browsing(wanted, self._page.given, self._page.options), window, "stores"
            ):
                for place, picture in enumerate(job.pictures):
                    if picture.version and place not in paths:
                        paths[place] = self._page.shelf.put(window, f"tile {place}", "picture.png", picture.png)
                updates: Updates = {self.status: self._page.status(job)}
                updates[self.tiles] = [(path, caption(job, place)) for place, path in sorted(paths.items())]
                if job.state == "done":
                    updates[self.status] = summary(job.facts, compared)
                    updates[self.before] = gr.Button(interactive=start > 0)
                    updates[self.after] = gr.Button(interactive=start + SHOWN < job.facts["all"])
                yield updates
        except UserError as error:
            yield {self.status: str(error)}

    async def begin(self, request: gr.Request, *values: Any) -> AsyncIterator[Updates]:
        """The first pictures."""
        async for updates in self.browse(request, 0, *values):
            yield updates

    async def open(self, request: gr.Request, seen: bool, *values: Any) -> AsyncIterator[Updates]:
        """The first pictures, when the tab is opened for the first time."""
        yield {self.seen: True}
        if not seen:
            async for updates in self.browse(request, 0, *values):
                yield updates

    async def back(self, request: gr.Request, start: int, *values: Any) -> AsyncIterator[Updates]:
        """The pictures before those."""
        async for updates in self.browse(request, max(0, start - SHOWN), *values):
            yield updates

    async def on(self, request: gr.Request, start: int, *values: Any) -> AsyncIterator[Updates]:
        """The pictures after those."""
        async for updates in self.browse(request, start + SHOWN, *values):
            yield updates


def _class_of(chosen: gr.SelectData) -> int:
    return int(chosen.row_value[0])


def caption(job: Job, place: int) -> str:
    """What stands below a picture."""
    name, errors = job.facts["names"][place], job.facts.get("errors", ())
    return f"{name['class']} · {name['key']}" + (f" · {errors[place]:.1f} dB" if place < len(errors) else "")


def summary(facts: dict[str, Any], compared: str) -> str:
    """What is shown, and how much the VAE keeps of it."""
    shown, errors = len(facts["names"]), facts.get("errors", ())
    if not shown:
        return "There are no pictures of this class in the store."
    words = (
        f"{facts['first'] + 1:,} to {facts['first'] + shown:,} of {facts['all']:,}, from the means of the posteriors"
    )
    if errors:
        beside = "beside the images they were made from, at their left, the VAE keeps"
        what = beside if compared == "original" else "decoded, encoded and decoded again they keep"
        words += f"; {what} {sum(errors) / len(errors):.1f} dB (mean PSNR)"
    return words


def stores(page: Page, blocks: gr.Blocks, tab: gr.Tab) -> None:
    """The tab of the stores that were named."""
    if not page.given.stores:
        gr.Markdown("No store was named. Start dit-view with `--latents STORE` to look into it.")
        return
    StoresTab(page).wire(blocks, tab)
