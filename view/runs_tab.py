"""The tab that follows runs: curves over each other, last numbers, previews by step."""

import itertools
import math
from typing import Any

import gradio as gr

from pipeline.runtime.errors import UserError
from view import runs as read
from view.widgets import QUIET, Page, Updates, line, table, window_of

COLUMNS = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait_share": "waiting for data",
}
SMOOTHING = [("smoothed", 0.9), ("much smoothed", 0.98), ("as logged", 0.0)]
REFRESH_SECONDS = 15


class RunsTab:
    """Its widgets, and what they do."""

    def __init__(self, page: Page, choices: list[tuple[str, int]]) -> None:
        self._page = page
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self.chosen = gr.CheckboxGroup(choices, value=[number for _, number in choices], label="runs")
                self.smooth = gr.Dropdown(SMOOTHING, value=0.9, label="curves")
                self.refresh = gr.Button("Refresh", variant="primary")
                self.often = gr.Checkbox(label=f"every {REFRESH_SECONDS} s")
            with gr.Column(scale=3):
                self.problem = line("problem", visible=False)
                self.last = table("last logged", ["run", "step", *COLUMNS.values()])
                self.curves = gr.Image(
                    label="curves", interactive=False, buttons=["fullscreen"], alt_text="curves of the chosen runs"
                )
                with gr.Row():
                    self.which = gr.Dropdown(choices, value=choices[0][1], label="previews of")
                    self.at = gr.Slider(0, 1, label="step", visible=False, buttons=[])
                self.title = line()
                self.preview = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"], alt_text="preview")
        self.follows = gr.State(value=True)
        """Whether the newest preview is shown, and so the next one will be."""
        self.timer = gr.Timer(REFRESH_SECONDS, active=False)

    def wire(self, tab: gr.Tab) -> None:
        """Let the widgets do what they are for."""
        drawing: dict[str, Any] = {"outputs": [self.last, self.curves, self.problem], **QUIET}
        looking: dict[str, Any] = {"outputs": [self.at, self.title, self.follows, self.preview], **QUIET}
        for event in (tab.select, self.refresh.click, self.timer.tick):
            event(self.draw, [self.chosen, self.smooth], **drawing)
            event(self.look, [self.which, self.at, self.follows], **looking)
        for event in (self.chosen.input, self.smooth.input):
            event(self.draw, [self.chosen, self.smooth], **drawing)
        self.which.input(self.other, self.which, **looking)
        self.at.input(self.move, [self.which, self.at], trigger_mode="always_last", **looking)
        self.often.input(lambda on: gr.Timer(active=on is True), self.often, self.timer, **QUIET)

    def draw(self, request: gr.Request, numbers: list[int], smoothing: float) -> Updates:
        """The last numbers and the curves of the chosen runs."""
        known = [read.describe(self._page.given.network(number)) for number in numbers]
        problems = [one["problem"] for one in known if one["problem"]]
        drawn = [number for number, one in zip(numbers, known, strict=True) if not one["problem"]]
        picture = None
        try:
            if drawn:
                png = read.curves(self._page.given, drawn, smoothing=smoothing)
                picture = self._page.shelf.put(window_of(request), "curves", "curves.png", png)
        except UserError as error:
            problems.append(str(error))
        return {
            self.last: [row_of(one) for one in known],
            self.curves: picture,
            self.problem: gr.Textbox("; ".join(problems), visible=bool(problems)),
        }

    def look(self, request: gr.Request, number: int, step: int, newest: bool) -> Updates:
        """A run's newest preview, or the one that is nearest to a step."""
        network = self._page.given.network(number)
        steps = read.describe(network)["previews"]
        if not steps:
            words = "This run has drawn no previews yet; dit-train --sample-every draws them."
            return {self.at: gr.Slider(visible=False), self.title: words, self.preview: None}
        step = steps[-1] if newest else min(steps, key=lambda one: abs(one - step))
        shown: Updates = {self.at: slider_of(steps, step), self.follows: step == steps[-1]}
        try:
            png = read.preview(network, step)
        except UserError as error:
            return {**shown, self.title: str(error), self.preview: None}
        path = self._page.shelf.put(window_of(request), "preview", f"step-{step}.png", png)
        return {**shown, self.title: f"step {step:,}", self.preview: path}

    def other(self, request: gr.Request, number: int) -> Updates:
        """Another run's newest preview."""
        return self.look(request, number, 0, newest=True)

    def move(self, request: gr.Request, number: int, step: int) -> Updates:
        """The preview at the slider."""
        return self.look(request, number, step, newest=False)


def row_of(run: dict[str, Any]) -> list[str]:
    """A run's last numbers in words."""
    step = "–" if run["step"] is None else f"{run['step']:,}"
    return [run["name"], step, *(words_of(name, run["last"].get(name)) for name in COLUMNS)]


def words_of(name: str, value: float | None) -> str:
    """One of the last numbers."""
    if value is None:
        return "–"
    return f"{value:.1%}" if name == "data_wait_share" else f"{value:.4g}"


def slider_of(steps: list[int], at: int) -> gr.Slider:
    """A slider over the steps that have previews; none where there is nothing to choose."""
    if len(steps) < 2:
        return gr.Slider(visible=False)
    apart = math.gcd(*(after - before for before, after in itertools.pairwise(steps)))
    return gr.Slider(steps[0], steps[-1], value=at, step=apart, visible=True)


def runs(page: Page, _: gr.Blocks, tab: gr.Tab) -> None:
    """The tab of the runs that were named."""
    choices = [(one.name, number) for number, one in enumerate(page.given.networks) if one.is_run]
    if not choices:
        gr.Markdown("No run was named. Start dit-view with `--checkpoint RUN` to see its curves and previews.")
        return
    RunsTab(page, choices).wire(tab)
