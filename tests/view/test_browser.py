"""The page in a real browser: what a user does there, what is refused, and that nothing leaves the machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import environment, running

pytest.importorskip("gradio", reason="gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here; apt-get install chromium"),
]
PATIENCE = 240_000  # of a browser that shares its cores


@pytest.fixture(scope="module")
def address(run, store):
    """Where a dit-view of its own process answers, on a free port."""
    words = [sys.executable, "-m", "view", "--checkpoint", str(run), "--latents", str(store), "--port", "0"]
    with running([*words, "--device", "cpu"]) as process, process.stderr:
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert found, said + process.stderr.read()
        yield found[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert "Traceback" not in process.stderr.read()


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=BROWSER, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A fresh window on the page; at the end every request must have gone to the page itself, and no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    window = context.new_page()
    window.set_default_timeout(PATIENCE)
    requests, faults = [], []
    context.on("request", lambda request: requests.append(request.url))
    window.on("pageerror", lambda error: faults.append(str(error)))
    window.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    window.goto(address)
    yield window
    context.close()
    assert len(requests) > 5
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert faults == []


def panel(page):
    """The tab that is shown."""
    return page.get_by_role("tabpanel").filter(visible=True)


def field(page, label):
    return panel(page).get_by_label(label, exact=True).filter(visible=True).first


def choose(page, label, words):
    field(page, label).click()
    page.get_by_role("option", name=words, exact=True).filter(visible=True).click()


def ready(page, word="Sample"):
    """Wait until the checkpoint has said what it can do."""
    sync_api.expect(panel(page).get_by_role("button", name=word, exact=True)).to_be_enabled()


def fill(page, **values):
    for label, value in values.items():
        field(page, label.replace("_", " ")).fill(str(value))
        field(page, label.replace("_", " ")).blur()


def press(page, word):
    panel(page).get_by_role("button", name=word, exact=True).click()


def tab(page, word):
    page.get_by_role("tab", name=word, exact=True).click()


def says(page, words, label="status"):
    sync_api.expect(field(page, label)).to_have_value(words if isinstance(words, re.Pattern) else re.compile(words))


def command(page):
    return panel(page).locator(".command textarea")


def files_of(page):
    """{name: bytes} of what the tab offers to save."""
    saved = {}
    for words in ("Save the picture", "Save its settings (JSON)"):
        with page.expect_download() as download:
            panel(page).get_by_text(words, exact=True).click()
        saved[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
    return saved


def test_a_grid_comes_out_of_the_noise_and_is_saved_as_dit_sample_writes_it(page, run, tmp_path):
    looks = []
    page.on("response", lambda answer: looks.append(answer.url) if answer.url.endswith("/samples.png") else None)
    ready(page)
    for name in ("class 1", "class 3"):
        choose(page, "classes (none named: all)", name)
    page.keyboard.press("Escape")
    choose(page, "sampler", "ddim")
    fill(page, pictures_of_each=2, seed=5, steps=120)  # long enough that there is something to see on the way
    field(page, "scale (1 is none)").fill("1.5")
    press(page, "Sample")
    says(page, "^done$")
    assert len(set(looks)) >= 3, "grey, expected images on the way, the result"
    image = panel(page).locator("img")
    assert image.evaluate("node => node.naturalWidth") > 100

    out = tmp_path / "samples.png"
    words = ["--classes", "class 1,class 3", "--samples-per-class", "2", "--seed", "5", "--device", "cpu"]
    words += ["--sampler", "ddim", "--steps", "120", "--guidance", "1.5"]
    dit_sample = [sys.executable, "-m", "sample", "--checkpoint", str(run), "--out", str(out), *words]
    subprocess.run(dit_sample, env=environment(), capture_output=True, check=True)
    assert files_of(page) == {path.name: path.read_bytes() for path in (out, tmp_path / "samples.png.json")}
    sync_api.expect(command(page)).to_have_value(re.compile("--sampler ddim --steps 120 --guidance 1.5"))


def test_classes_are_found_by_a_part_of_their_name(page):
    ready(page)
    field(page, "classes (none named: all)").click()
    page.keyboard.type("ss 2")
    options = page.get_by_role("option").filter(visible=True)
    sync_api.expect(options).to_have_text([re.compile("class 2")])
    options.click()
    page.keyboard.press("Escape")
    fill(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    sync_api.expect(command(page)).to_have_value(re.compile("--classes 'class 2'"))


def test_what_cannot_be_sampled_is_a_sentence_and_the_next_try_works(page):
    ready(page)
    fill(page, pictures_of_each=64, steps=2)
    choose(page, "sampler", "dpm++")
    fill(page, steps=1000)
    press(page, "Sample")
    says(page, "--steps 1000")
    fill(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    says(page, "^done$")


def long_job(page):
    ready(page)
    choose(page, "sampler", "ddpm")
    fill(page, pictures_of_each=16, steps=1000)
    press(page, "Sample")
    says(page, "of 1000 steps")


def test_a_job_is_stopped_and_another_one_has_its_turn(page):
    long_job(page)
    press(page, "Stop")
    says(page, "stopped; what was made so far stays")
    sync_api.expect(panel(page).locator("img")).to_be_visible()
    sync_api.expect(panel(page).get_by_text("Save the picture")).to_have_count(0)
    fill(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    says(page, "^done$")


def test_a_window_that_comes_second_waits_for_its_turn(page, browser, address):
    long_job(page)
    with contextlib.closing(browser.new_context()) as context:
        second = context.new_page()
        second.goto(address)
        ready(second)
        fill(second, pictures_of_each=1, steps=2)
        press(second, "Sample")
        says(second, "1 job has its turn before")
        press(page, "Stop")
        says(second, "^done$")


def test_a_window_that_waits_may_stop_before_its_turn(page, browser, address):
    long_job(page)
    with contextlib.closing(browser.new_context()) as context:
        second = context.new_page()
        second.goto(address)
        ready(second)
        press(second, "Sample")
        says(second, "1 job has its turn before")
        press(second, "Stop")
        says(second, "stopped")
    says(page, "of 1000 steps")
    press(page, "Stop")
    says(page, "stopped")


def test_the_job_of_a_window_that_is_closed_ends_at_its_next_step(page, browser, address):
    with contextlib.closing(browser.new_context()) as context:
        first = context.new_page()
        first.goto(address)
        long_job(first)
    ready(page)
    fill(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    says(page, "^done$")


def test_an_average_of_any_width_has_a_slider_where_snapshots_are(page):
    ready(page)
    slider = panel(page).get_by_role("slider").filter(visible=True)
    sync_api.expect(slider).to_have_count(0)
    choose(page, "weights", "an average of any width")
    sync_api.expect(slider).to_have_count(1)
    slider.fill("0.08")
    fill(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    sync_api.expect(command(page)).to_have_value(re.compile("--weights sigma=0.08"))


@contextlib.contextmanager
def another(browser, *words):
    """A window on a page of its own process."""
    command = [sys.executable, "-m", "view", *map(str, words), "--port", "0", "--device", "cpu"]
    with running(command) as process, process.stderr, contextlib.closing(browser.new_context()) as context:
        window = context.new_page()
        window.set_default_timeout(PATIENCE)
        window.goto(re.search(r"http://\S+", process.stderr.readline())[0])
        yield window
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()


def test_what_a_checkpoint_cannot_do_is_not_offered_and_another_one_may_guide(browser, run, flow_run):
    with another(browser, "--checkpoint", run, flow_run) as window:
        ready(window)
        fill(window, pictures_of_each=1, steps=2)
        choose(window, "guidance", "by another checkpoint")
        step = panel(window).get_by_label("step", exact=True).filter(visible=True)
        sync_api.expect(step).to_have_count(2)
        step.nth(1).click()
        window.get_by_role("option", name="2", exact=True).filter(visible=True).click()
        press(window, "Sample")
        sync_api.expect(command(window)).to_have_value(re.compile("step-0000002@ema"))

        for other, sampler in (("flow", "dpm++2m"), ("run", "dpm++")) * 2:  # back and forth, as one looks around
            choose(window, "checkpoint", other)
            sync_api.expect(field(window, "sampler")).to_have_value(sampler)
        choose(window, "checkpoint", "flow")
        sync_api.expect(field(window, "sampler")).to_have_value("dpm++2m")
        sync_api.expect(panel(window).get_by_label("classes (none named: all)")).to_have_count(0)
        field(window, "guidance").click()
        options = window.get_by_role("option").filter(visible=True)
        names = ["by the middle head", "by another checkpoint", "none"]
        sync_api.expect(options).to_have_text([re.compile(name) for name in names])
        options.nth(0).click()
        sync_api.expect(field(window, "scale (1 is none)")).to_have_value("1.4")
        fill(window, steps=2)
        press(window, "Sample")
        sync_api.expect(command(window)).to_have_value(re.compile("--guidance-source middle"))


def test_two_steps_of_a_run_are_compared_from_the_same_noise(page):
    tab(page, "Compare")
    ready(page, "Compare")
    fill(page, pictures_of_each=1, steps=3)
    press(page, "Compare")
    says(page, "^done$")
    titles = panel(page).locator(".title textarea").filter(visible=True)
    assert [titles.nth(place).input_value() for place in range(titles.count())] == [
        "run, step 2, ema",
        "run, step 4, ema",
    ]
    images = panel(page).locator("img")
    sync_api.expect(images).to_have_count(2)
    read = "async (url) => Array.from(new Uint8Array(await (await fetch(url)).arrayBuffer()))"
    contents = [page.evaluate(read, images.nth(place).get_attribute("src")) for place in range(2)]
    assert contents[0] != contents[1]


def test_a_run_shows_its_curves_its_numbers_and_its_previews_over_time(page, run):
    tab(page, "Runs")
    curves, preview = page.get_by_alt_text("curves of the chosen runs"), page.get_by_alt_text("preview")
    sync_api.expect(curves).to_be_visible()
    for words in ("images/s", "waiting for data", "0.0001"):
        sync_api.expect(panel(page).get_by_text(words).filter(visible=True).first).to_be_visible()
    sync_api.expect(preview).to_have_attribute("src", re.compile(r"step-4\.png"))
    slider = panel(page).get_by_role("slider").filter(visible=True)
    slider.focus()
    slider.press("Home")
    sync_api.expect(preview).to_have_attribute("src", re.compile(r"step-2\.png"))
    newer = run / "samples" / "step-0000006.png"
    shutil.copy(run / "samples" / "step-0000004.png", newer)
    try:
        slider.press("End")
        sync_api.expect(preview).to_have_attribute("src", re.compile(r"step-4\.png"))
        press(page, "Refresh")
        slider.press("End")
        sync_api.expect(preview).to_have_attribute("src", re.compile(r"step-6\.png"))
    finally:
        newer.unlink()


def test_a_store_is_browsed_by_class_and_page(page):
    tab(page, "Stores")
    says(page, "1 to 24 of 50", "pictures")
    tiles = panel(page).locator(".tiles img")
    sync_api.expect(tiles).to_have_count(24)
    press(page, "After →")
    says(page, "25 to 48 of 50", "pictures")
    panel(page).get_by_role("gridcell", name="class 3", exact=True).first.click()
    says(page, "1 to 12 of 12", "pictures")
    sync_api.expect(panel(page).locator(".tiles .caption-label")).to_have_text([re.compile("^class 3")] * 12)
    choose(page, "compared with", "itself, encoded and decoded once more")
    says(page, r"keep \d+\.\d dB", "pictures")
    sync_api.expect(field(page, "left out")).to_have_value("Nothing was left out.")


NASTY = "<img src=x onerror=alert(1)>"


def test_names_from_files_are_words_and_never_markup(browser, store, run, tmp_path):
    """A store and a run whose names and classes are markup: no element of theirs comes to be."""
    folders = tmp_path / NASTY
    folders.mkdir()
    shutil.copytree(run, folders / "run")
    shutil.copytree(store, folders / "latents")
    config = folders / "run" / "checkpoints" / "step-0000004" / "config.json"
    config.write_text(config.read_text().replace("class 1", NASTY))
    manifest = json.loads((folders / "latents" / "manifest.json").read_text().replace("class 1", NASTY))
    del manifest["checksum"]
    (folders / "latents" / "manifest.json").write_text(json.dumps(manifest))
    words = ["--checkpoint", run, folders / "run", "--latents", store, folders / "latents"]
    with another(browser, *words) as window:
        dialogs = []
        window.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        ready(window)
        choose(window, "checkpoint", f"{NASTY}/run")
        choose(window, "classes (none named: all)", NASTY)
        window.keyboard.press("Escape")
        fill(window, pictures_of_each=1, steps=2)
        press(window, "Sample")
        says(window, "<img src=x onerror=alert.1.>/run/checkpoints/step-0000004 is damaged")
        tab(window, "Runs")
        sync_api.expect(panel(window).get_by_text(f"{NASTY}/run").filter(visible=True).first).to_be_visible()
        tab(window, "Stores")
        choose(window, "store", f"{NASTY}/latents")
        says(window, "1 to 24 of 50", "pictures")
        sync_api.expect(panel(window).locator(".tiles .caption-label", has_text=NASTY).first).to_be_visible()
        sync_api.expect(panel(window).get_by_role("gridcell", name=NASTY, exact=True).first).to_be_visible()
        assert window.locator("img[src='x']").count() == 0
        assert dialogs == []


def test_the_command_ends_within_a_step_of_the_job_that_runs_and_leaves_nothing(browser, run, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with another(browser, "--checkpoint", run) as window:
        long_job(window)
        assert list(tmp_path.glob("dit-view-*"))
    assert list(tmp_path.glob("dit-view-*")) == []


def test_the_command_says_where_it_is_and_that_a_port_is_taken(store):
    words = [sys.executable, "-m", "view", "--latents", str(store), "--port"]
    with running([*words, "0"]) as first, first.stderr:
        port = re.search(r":(\d+)/", first.stderr.readline())[1]
        second = subprocess.run([*words, port], env=environment(), capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"--port {port} cannot be listened at" in second.stderr
        assert "choose another --port" in second.stderr
        first.terminate()
        assert first.wait(60) == 128 + signal.SIGTERM
