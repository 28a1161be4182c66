"""The page: its four tabs, and how it looks."""

import gradio as gr

from view import runs_tab, sample_tab, stores_tab
from view.given import Given
from view.jobs import JobQueue
from view.options import ViewOptions
from view.widgets import Page

FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")
CSS = """
.form:has(> .quiet) { border: 0; background: none; }
.quiet, .quiet textarea, .quiet label { border: 0 !important; padding: 0 !important; background: none !important; }
.quiet textarea { opacity: 0.75; font-size: 13px; -webkit-text-fill-color: currentcolor; }
.tiles .thumbnail-item { aspect-ratio: auto; height: auto; overflow: visible; }
.tiles .caption-label { position: static; max-width: none; border: 0; white-space: normal; overflow-wrap: anywhere; }
.tiles .grid-wrap { max-height: none; }
footer { display: none !important; }
"""


def build(options: ViewOptions, given: Given, queue: JobQueue) -> gr.Blocks:
    """The page with all its tabs."""
    page = Page(options, given, queue)
    with gr.Blocks(analytics_enabled=False, title="dit-view", fill_width=True) as blocks:
        with gr.Tabs():
            for name, tab in (
                ("Sample", sample_tab.sample),
                ("Compare", sample_tab.compare),
                ("Runs", runs_tab.runs),
                ("Stores", stores_tab.stores),
            ):
                with gr.Tab(name) as opened:
                    tab(page, blocks, opened)
        blocks.unload(page.leave)
    blocks.queue(api_open=False, max_size=16, default_concurrency_limit=None)
    return blocks


def theme() -> gr.themes.Base:
    """Fonts of the system: Gradio's own themes name fonts that browsers fetch elsewhere."""
    return gr.themes.Base(
        font=[gr.themes.Font(name) for name in FONTS], font_mono=[gr.themes.Font(name) for name in MONO]
    )
