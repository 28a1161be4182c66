"""The documentation as a site: built strictly and without network, whole, and alone on its own files."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.test_advice import FLAGS

pytest.importorskip("material", reason="mkdocs-material is not installed; pip install '.[docs]'")
ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What `make docs` runs, where no name can be looked up and nothing but a socket of this machine's be opened.
OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise OSError("the site is built without network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""
WRITTEN = [*(ROOT / "docs").rglob("*.md"), *map(ROOT.joinpath, ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"))]
PROMISED = (
    "pipeline.latents.store.LatentStore",
    "pipeline.latents.store.LatentStore.__getitem__",
    "pipeline.dit.model.DiT.from_preset",
    "pipeline.dit.model.DiT.forward",
    "pipeline.dit.config.DiTConfig",
    "pipeline.dit.config.PRESETS",
    "pipeline.diffusion.gaussian.GaussianDiffusion.q_sample",
    "pipeline.diffusion.gaussian.GaussianDiffusion.training_losses",
    "pipeline.diffusion.gaussian.GaussianDiffusion.respaced",
    "pipeline.checkpoint.forms.load_checkpoint",
)
SHOWN = ("li", "tr", "pre", "h1", "h2", "h3", "h4", "strong", "em")


class Page(HTMLParser):
    """What a page links to and loads, its anchors, its words, and how many elements of each kind its article has."""

    def __init__(self, text, *, article=False):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.words, self.elements, self.article = [], Counter(), article
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.article |= tag == "article"
        self.elements[tag] += self.article and tag in SHOWN
        self.anchors |= {given.get("id"), given.get("name")} - {None}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("src") or (tag == "link" and "href" in given):
            self.loads.append(given.get("src") or given["href"])

    def handle_endtag(self, tag):
        self.article &= tag != "article"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-c", OFFLINE, str(folder)]
    ended = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    found = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    assert len(found) > 45
    return found


def test_no_page_loads_anything_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert page.loads
        for address in page.loads:
            there = urlsplit(address)
            assert not there.scheme and not there.netloc, f"{path.relative_to(site)} loads {address}"
            assert (path.parent / unquote(there.path)).is_file(), f"{path.relative_to(site)} lacks {address}"
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text() and "@import" not in sheet.read_text(), sheet


def test_every_link_within_the_site_leads_to_a_file_and_a_place_in_it(site, pages):
    looked_at = 0
    for path, page in pages.items():
        for address in page.links:
            there = urlsplit(address)
            if there.scheme or there.netloc:
                continue
            target = path if not there.path else Path(os.path.normpath(path.parent / unquote(there.path)))
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)} links to {address}"
            if there.fragment and target.suffix == ".html":
                assert unquote(there.fragment) in pages[target].anchors, f"{path.relative_to(site)} links to {address}"
            looked_at += 1
    assert looked_at > 2000


def test_pages_have_the_same_lists_tables_and_code_here_as_where_the_source_is_read(site):
    """What Python's Markdown takes for another thing than GitHub's, such as a list without an empty line before it."""
    plain = MarkdownIt("commonmark").enable("table")
    for source in WRITTEN:
        text = source.read_text()
        if "\n::: " in text:  # made from docstrings
            continue
        place = source.relative_to(ROOT / "docs" if source.is_relative_to(ROOT / "docs") else ROOT)
        built = site / place.with_suffix(".html")
        built = built if built.exists() else built.with_name("index.html")
        assert Page(built.read_text()).elements == Page(plain.render(text), article=True).elements, place


def test_every_installed_command_has_a_page_with_each_of_its_flags(pages, site):
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(commands) == set(FLAGS)
    for command in commands:
        words = set(pages[site / "reference" / f"{command}.html"].words)
        lacking = {flag for flag in FLAGS[command] if not flag.startswith("--no-")} - words
        assert lacking <= {"--path"}, (command, lacking)  # dit-inspect takes its path without a flag


def test_the_python_names_that_are_promised_stand_in_the_reference(pages, site):
    assert set(PROMISED) <= pages[site / "reference" / "python.html"].anchors


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here; apt-get install chromium")
def test_a_browser_asks_nobody_else_and_the_search_finds_a_flag(site):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    asked, faults = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        window = browser.new_page()
        window.set_default_timeout(240_000)
        window.on("request", lambda request: asked.append(request.url))
        window.on("pageerror", lambda error: faults.append(str(error)))
        window.goto(f"{address}reference/python.html")
        window.goto(f"{address}index.html")
        window.fill("input[name=query]", "preview-guidance")
        window.locator(".md-search-result__link", has_text="Preview").first.click()
        window.wait_for_url(f"{address}reference/dit-train.html*")
        browser.close()
    server.shutdown()
    server.server_close()
    assert faults == [] and all(url.startswith((address, "data:", "blob:")) for url in asked), asked
