"""The tabs that sample: from one checkpoint, or from several with the same noise."""

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import typed
from view.given import Given, describe_network
from view.sampling import OUT, SampleRequest, sampling
from view.widgets import QUIET, Page, Updates, line, network_choices, window_of

SCALES = {"class": 4.0, "middle": 1.4, "both": 4.0, "network": 2.0, "none": 1.0}
SOURCES = {
    "class": "by the class",
    "middle": "by the middle head",
    "both": "by both",
    "network": "by another checkpoint",
    "none": "none",
}
MOST_COMPARED = 6
SIGMA = "sigma"
"""Weights of any width, which a slider chooses."""
Facts = dict[str, Any]


class Picker:
    """Checkpoint, step and weights."""

    def __init__(self, page: Page, *, first: int) -> None:
        choices = network_choices(page.given)
        self.page = page
        self.network = gr.Dropdown(choices, value=first, label="checkpoint")
        with gr.Row():
            self.step = gr.Dropdown([], label="step", min_width=100)
            self.weights = gr.Dropdown(["ema"], value="ema", label="weights", min_width=100)
        self.sigma = gr.Slider(
            0.02, 0.25, value=0.05, step=0.005, label="relative width σ of the average", visible=False, buttons=[]
        )
        self.about = line()
        self.weights.change(lambda name: gr.Slider(visible=name == SIGMA), self.weights, self.sigma, **QUIET)

    @property
    def chosen(self) -> list[Any]:
        """What a choice is made of."""
        return [self.network, self.step, self.weights, self.sigma]

    @property
    def changing(self) -> list[Any]:
        """What another checkpoint changes."""
        return [self.step, self.weights, self.sigma, self.about]

    def read(self, number: int, step: int | None, *, first: bool = False, anew: bool = False) -> tuple[Updates, Facts]:
        """What to show of a checkpoint, and what it can do.

        Args:
            first: at the run's first step, not at its last.
            anew: the checkpoint was changed, and with it the steps.
        """
        updates: Updates = {}
        try:
            network = self.page.given.network(number)
            if anew or first:
                steps = sorted(network.steps(), reverse=True)
                step = (steps[-1] if first else steps[0]) if steps else None
                updates[self.step] = gr.Dropdown([(f"{one:,}", one) for one in steps], value=step, visible=bool(steps))
            facts = describe_network(network.place(step))
        except UserError as error:
            return {**updates, self.about: str(error)}, {}
        millions = facts["parameters"] / 1e6
        size = f"{millions:.1f} M" if millions >= 1 else f"{facts['parameters']:,}"
        updates[self.about] = f"{facts['model']}, {size} parameters, {facts['objective']}, {facts['image_px']} px"
        names = [(name, name) for name in facts["weights"]]
        averages = [("an average of any width", SIGMA)] if facts["sigmas"] else []
        updates[self.weights] = gr.Dropdown([*names, *averages], value=facts["weights"][0])
        updates[self.sigma] = gr.Slider(value=facts["sigmas"][0] if averages else 0.05, visible=False)
        return updates, facts


def choice_of(number: int, step: int | None, weights: str, sigma: float) -> dict[str, Any]:
    """One network of a request."""
    return {"network": number, "step": step, "weights": f"sigma={round(sigma, 4):g}" if weights == SIGMA else weights}


class Settings:
    """What else there is to choose, offered as far as the network can do it."""

    def __init__(self, page: Page, word: str) -> None:
        self.classes = gr.Dropdown([], multiselect=True, value=[], label="classes (none named: all)", visible=False)
        with gr.Row():
            self.each = gr.Number(4, label="pictures of each", precision=0, minimum=1, maximum=64, min_width=100)
            self.seed = gr.Number(0, label="seed", precision=0, min_width=100)
        self.dice = gr.Button("Another seed", size="sm")
        with gr.Row():
            self.sampler = gr.Dropdown([], label="sampler", min_width=100)
            self.steps = gr.Number(20, label="steps", precision=0, minimum=1, maximum=1000, min_width=100)
        self.sampler_note = line()
        with gr.Row():
            self.source = gr.Dropdown([], label="guidance", min_width=100)
            self.scale = gr.Number(4, label="scale (1 is none)", minimum=0, maximum=1000, step=0.1, min_width=100)
        with gr.Group(visible=False) as self.guide_box:
            gr.Markdown("guided away from")
            self.guide = Picker(page, first=0)
        with gr.Row():
            self.start = gr.Button(word, variant="primary", interactive=False, min_width=100)
            self.stop = gr.Button("Stop", min_width=100)
        # The dropdowns themselves are not read when the checkpoint changes: Gradio 6 sends a choice twice, and would
        # refuse the second one's sampler and step with a traceback, since the first has changed what is offered.
        self.sampler_chosen, self.source_chosen = gr.State(None), gr.State(None)

    @property
    def chosen(self) -> list[Any]:
        """Everything that a request reads, in its order."""
        plain = [self.classes, self.each, self.seed, self.sampler, self.steps, self.source, self.scale]
        return [*plain, *self.guide.chosen]

    @property
    def changing(self) -> list[Any]:
        """What another checkpoint changes."""
        return [
            self.classes, self.sampler, self.steps, self.sampler_note, self.source, self.scale, self.guide_box,
            self.start, self.sampler_chosen, self.source_chosen,
        ]  # fmt: skip

    def offer(self, facts: Facts, sampler: str | None, source: str | None) -> Updates:
        """What a checkpoint can do; what was chosen stays where it can."""
        updates: Updates = {self.start: gr.Button(interactive=bool(facts))}
        if not facts:
            return updates
        words = class_words(facts["classes"])
        updates[self.classes] = gr.Dropdown(words, value=[], visible=bool(words))
        samplers = {one["name"]: one for one in facts["samplers"]}
        if sampler not in samplers:
            sampler = facts["sampler"]
            updates[self.steps] = facts["steps"]
        updates |= {self.sampler: gr.Dropdown(list(samplers), value=sampler), self.sampler_chosen: sampler}
        updates[self.sampler_note] = note(samplers[sampler])
        offered = [
            name
            for name, can in (
                ("class", facts["can_guide"]),
                ("middle", facts["middle"]),
                ("both", facts["middle"] and facts["can_guide"]),
                ("network", True),
                ("none", not facts["can_guide"]),
            )
            if can
        ]
        if source not in offered:
            source = "class" if facts["can_guide"] else "none"
            updates |= self.choose_source(source)
        updates[self.source] = gr.Dropdown([(SOURCES[name], name) for name in offered], value=source)
        updates[self.source_chosen] = source
        return updates

    def choose_source(self, source: str) -> Updates:
        """The scale that is usual for it, and the other checkpoint where one guides."""
        scale = gr.Number(SCALES[source], interactive=source != "none")
        return {self.scale: scale, self.guide_box: gr.Group(visible=source == "network")}


def class_words(names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, word) of each class; the word is its name, or its label where the name does not tell it."""
    lower = [name.lower() for name in names]
    seen: dict[str, int] = {}
    for name in lower:
        seen[name] = seen.get(name, 0) + 1
    return [
        (name, name if seen[name.lower()] == 1 and "," not in name and not name.lstrip("-").isdigit() else str(label))
        for label, name in enumerate(names)
    ]


def note(sampler: dict[str, Any]) -> str:
    """What a sampler is, and how many steps it takes."""
    return sampler["help"] + (f"; at most {sampler['most']:,} steps" if sampler["most"] else "")


class Slot:
    """One picture with what can be saved of it."""

    def __init__(self, *, visible: bool = True) -> None:
        with gr.Column(visible=visible, min_width=260) as self.column:
            self.title = line(kind="title")
            self.image = gr.Image(show_label=False, interactive=False, format="png", buttons=["fullscreen"])
            with gr.Row():
                self.files = {
                    name: gr.DownloadButton(words, visible=False, size="sm", min_width=100)
                    for name, words in ((OUT, "Save the picture"), (f"{OUT}.json", "Save its settings (JSON)"))
                }
            self.command = gr.Textbox(
                label="The same in a terminal",
                elem_classes=["command"],
                interactive=False,
                buttons=["copy"],
                visible=False,
            )

    @property
    def changing(self) -> list[Any]:
        """What a job changes."""
        return [self.column, self.title, self.image, *self.files.values(), self.command]


def _request(networks: list[dict[str, Any]], values: Sequence[Any]) -> SampleRequest:
    """What the settings ask for.

    Raises:
        UserError: something is out of its bounds.
    """
    classes, each, seed, sampler, steps, source, scale, *guide = values
    asked = {
        "networks": networks,
        "classes": ",".join(classes or ()),
        "samples_per_class": each,
        "seed": seed,
        "sampler": sampler,
        "steps": steps,
        "guidance": 1.0 if source == "none" else scale,
        "source": "class" if source == "none" else source,
        "guide": choice_of(*guide) if source == "network" else None,
    }
    return typed(asked, SampleRequest, "the settings are not understood", advice="change them")


def _run(page: Page, tab: str, slots: Sequence[Slot], status: gr.Textbox) -> Any:
    """A function of (what makes the request, a window) that starts a job and gives what changes of the slots."""

    async def run(make: Any, window: str) -> AsyncIterator[Updates]:
        versions, saved = [0] * len(slots), set[int]()
        try:
            asked = sampling(make(), page.given, page.options)
            begun: Updates = {slot.column: gr.Column(visible=place < len(asked[1])) for place, slot in enumerate(slots)}
            for slot, title in zip(slots, asked[1], strict=False):
                begun |= {slot.title: title, slot.image: None, slot.command: gr.Textbox(visible=False)}
                begun |= {button: gr.DownloadButton(visible=False) for button in slot.files.values()}
            yield begun
            async for job in page.follow(asked, window, tab):
                updates: Updates = {status: page.status(job)}
                for place, (slot, picture) in enumerate(zip(slots, job.pictures, strict=False)):
                    if picture.version > versions[place]:
                        versions[place] = picture.version
                        updates[slot.image] = page.shelf.put(window, f"{tab} {place}", OUT, picture.png)
                    if picture.files and place not in saved:
                        saved.add(place)
                        updates[slot.command] = gr.Textbox(picture.command, visible=True)
                        for name, data in picture.files.items():
                            path = page.shelf.put(window, f"{tab} {place} {name}", name, data)
                            updates[slot.files[name]] = gr.DownloadButton(value=path, visible=True)
                yield updates
        except UserError as error:
            yield {status: str(error)}

    return run


def _wire(blocks: gr.Blocks, picker: Picker, settings: Settings | None, *, first: bool = False) -> None:
    """Let a picker, and the settings where it is the first, follow what is chosen."""
    chosen = [settings.sampler_chosen, settings.source_chosen] if settings else []
    outputs = [*picker.changing, *(settings.changing if settings else [])]

    def offered(read: tuple[Updates, Facts], chosen: Sequence[str | None]) -> Updates:
        updates, facts = read
        return updates | (settings.offer(facts, *chosen) if settings else {})

    def anew(number: int, *chosen: str | None) -> Updates:
        return offered(picker.read(number, None, anew=True), chosen)

    def load(number: int, *chosen: str | None) -> Updates:
        return offered(picker.read(number, None, anew=True, first=first), chosen)

    def at_step(number: int, step: int | None, *chosen: str | None) -> Updates:
        return offered(picker.read(number, step), chosen)

    picker.network.input(anew, [picker.network, *chosen], outputs, **QUIET)
    picker.step.input(at_step, [picker.network, picker.step, *chosen], outputs, **QUIET)
    blocks.load(load, [picker.network, *chosen], outputs, **QUIET)


def _wire_settings(page: Page, blocks: gr.Blocks, picker: Picker, settings: Settings) -> None:
    def bounds(number: int, step: int | None, sampler: str) -> tuple[str, str]:
        try:
            samplers = describe_network(page.given.network(number).place(step))["samplers"]
        except UserError as error:
            return str(error), sampler
        return next((note(one) for one in samplers if one["name"] == sampler), ""), sampler

    asked = [picker.network, picker.step, settings.sampler]
    settings.sampler.input(bounds, asked, [settings.sampler_note, settings.sampler_chosen], **QUIET)
    settings.dice.click(lambda: secrets.randbelow(10**6), None, settings.seed, **QUIET)
    settings.source.input(
        lambda source: {**settings.choose_source(source), settings.source_chosen: source},
        settings.source,
        [settings.scale, settings.guide_box, settings.source_chosen],
        **QUIET,
    )
    _wire(blocks, settings.guide, None)


def _first(given: Given, after: int = -1) -> int | None:
    """The next checkpoint that can sample."""
    numbers = (
        number for number, one in enumerate(given.networks) if number > after and (one.steps() or not one.is_run)
    )
    return next(numbers, None)


def sample(page: Page, blocks: gr.Blocks, _: gr.Tab) -> None:
    """From one checkpoint."""
    if not page.given.networks:
        gr.Markdown("No checkpoint was named. Start dit-view with `--checkpoint RUN` to sample from it.")
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            picker = Picker(page, first=_first(page.given) or 0)
            settings = Settings(page, "Sample")
        with gr.Column(scale=3):
            status = line(
                "status",
                value="Press Sample: pictures come out of the noise, each on its way as the network expects it (x₀)",
            )
            slot = Slot()
    _wire(blocks, picker, settings)
    _wire_settings(page, blocks, picker, settings)
    run = _run(page, "sample", [slot], status)

    async def begin(request: gr.Request, *values: Any) -> AsyncIterator[Updates]:
        async for updates in run(lambda: _request([choice_of(*values[:4])], values[4:]), window_of(request)):
            yield updates

    settings.start.click(
        begin,
        [*picker.chosen, *settings.chosen],
        [status, *slot.changing],
        show_progress="hidden",
        api_visibility="private",
    )
    settings.stop.click(page.stopper("sample"), **QUIET)


def compare(page: Page, blocks: gr.Blocks, _: gr.Tab) -> None:
    """From two to six, with the same noise."""
    if not page.given.networks:
        gr.Markdown("No checkpoint was named. Start dit-view with `--checkpoint RUN [RUN …]` to compare.")
        return
    first = _first(page.given) or 0
    second = _first(page.given, first)
    groups: list[gr.Group] = []
    pickers: list[Picker] = []
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            many = gr.Slider(2, MOST_COMPARED, value=2, step=1, label="how many are compared", buttons=[])
            for place in range(MOST_COMPARED):
                with gr.Group(visible=place < 2) as group:
                    pickers.append(Picker(page, first=second if place == 1 and second is not None else first))
                groups.append(group)
            settings = Settings(page, "Compare")
        with gr.Column(scale=3):
            status = line(
                "status",
                value="Press Compare: all start from the same noise, so what differs is what they have learned",
            )
            with gr.Row():
                slots = [Slot(visible=False) for _ in range(MOST_COMPARED)]
    many.change(
        lambda count: [gr.Group(visible=place < count) for place in range(MOST_COMPARED)], many, groups, **QUIET
    )
    for place, picker in enumerate(pickers):  # where there is only one, the first is compared at its first step
        _wire(blocks, picker, settings if place == 0 else None, first=place == 0 and second is None)
    _wire_settings(page, blocks, pickers[0], settings)
    run = _run(page, "compare", slots, status)

    async def begin(request: gr.Request, count: int, *values: Any) -> AsyncIterator[Updates]:
        def make() -> SampleRequest:
            networks = [choice_of(*values[4 * place : 4 * place + 4]) for place in range(int(count))]
            return _request(networks, values[4 * MOST_COMPARED :])

        async for updates in run(make, window_of(request)):
            yield updates

    chosen = [part for picker in pickers for part in picker.chosen]
    outputs = [status, *(part for slot in slots for part in slot.changing)]
    settings.start.click(
        begin, [many, *chosen, *settings.chosen], outputs, show_progress="hidden", api_visibility="private"
    )
    settings.stop.click(page.stopper("compare"), **QUIET)
