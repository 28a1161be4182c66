"""The page in a real browser: what a user does there, what is refused, and that nothing leaves the machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.train.runs import environment, running, wait_for

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


def settings(page, **values):
    """Fill in the fields of the tab that is shown, once the checkpoint has said what it can do."""
    sync_api.expect(page.get_by_label("sampler")).to_have_value(re.compile("."))
    for label, value in values.items():
        field = page.get_by_label(label.replace("_", " "), exact=False).first
        (field.select_option if field.evaluate("node => node.tagName") == "SELECT" else field.fill)(str(value))


def press(page, word):
    page.locator("section").get_by_role("button", name=word, exact=True).click()


def test_a_grid_comes_out_of_the_noise_and_is_saved_as_dit_sample_writes_it(page, run, tmp_path):
    settings(page, classes="class 1, 3", pictures_of_each=2, seed=5, sampler="ddim", steps=12, scale=1.5)
    press(page, "Sample")
    image = page.locator("figure img")
    sync_api.expect(image).to_be_visible()
    page.get_by_text("Save the picture").wait_for()
    page.wait_for_function("() => document.querySelector('figure img').complete")
    assert image.evaluate("node => node.naturalWidth") > 100
    seen = int(re.search(r"version=(\d+)", image.get_attribute("src"))[1])
    assert seen >= 3, "grey, expected images on the way, the result"

    saved = {}
    for words in ("Save the picture", "Save its settings"):
        with page.expect_download() as download:
            page.get_by_text(words).click()
        saved[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
    out = tmp_path / "samples.png"
    words = ["--classes", "class 1, 3", "--samples-per-class", "2", "--seed", "5", "--device", "cpu"]
    words += ["--sampler", "ddim", "--steps", "12", "--guidance", "1.5"]
    command = [sys.executable, "-m", "sample", "--checkpoint", str(run), "--out", str(out), *words]
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    assert saved == {path.name: path.read_bytes() for path in (out, tmp_path / "samples.png.json")}
    page.get_by_text("The same in a terminal").click()
    sync_api.expect(page.locator("code")).to_contain_text("--sampler ddim --steps 12 --guidance 1.5")


def test_classes_are_found_by_a_part_of_their_name_and_a_wrong_one_is_explained(page):
    settings(page)
    page.get_by_label("classes", exact=False).first.fill("ss 2")
    chips = page.locator(".chips button")
    sync_api.expect(chips).to_have_text(["class 2"])
    chips.click()
    sync_api.expect(page.get_by_label("classes", exact=True)).to_have_value("class 2, ")
    page.get_by_label("classes", exact=True).fill("clas 1")
    press(page, "Sample")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("did you mean class 1")
    sync_api.expect(page.get_by_role("button", name="Sample", exact=True)).to_be_enabled()


def test_a_job_is_stopped_and_another_one_has_its_turn(page):
    settings(page, pictures_of_each=16, sampler="ddpm", steps=1000)
    press(page, "Sample")
    page.get_by_text(re.compile("of 1000 steps")).wait_for()
    press(page, "Stop")
    page.get_by_text("stopped; what was made so far stays").wait_for()
    sync_api.expect(page.locator("figure img")).to_be_visible()
    sync_api.expect(page.get_by_text("Save the picture")).to_have_count(0)
    settings(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    page.get_by_text("Save the picture").wait_for()


def test_a_window_that_comes_second_waits_for_its_turn(page, browser, address):
    settings(page, pictures_of_each=16, sampler="ddpm", steps=1000)
    press(page, "Sample")
    page.get_by_text(re.compile("of 1000 steps")).wait_for()
    with contextlib.closing(browser.new_context()) as context:
        second = context.new_page()
        second.goto(address)
        settings(second, pictures_of_each=1, steps=2)
        press(second, "Sample")
        second.get_by_text("1 job has its turn before").wait_for()
        press(page, "Stop")
        second.get_by_text("Save the picture").wait_for(timeout=PATIENCE)


def test_an_average_of_any_width_has_a_slider_where_snapshots_are(page):
    settings(page)
    slider = page.get_by_label("relative width of the average").first
    sync_api.expect(slider).to_be_hidden()
    page.get_by_label("weights").first.select_option(label="an average of any width")
    slider.fill("0.08")
    settings(page, pictures_of_each=1, steps=2)
    press(page, "Sample")
    page.get_by_text("Save the picture").wait_for()
    sync_api.expect(page.locator("code")).to_contain_text("--weights sigma=0.08")


def test_what_a_checkpoint_cannot_do_is_not_offered_and_another_one_may_guide(browser, run, flow_run):
    words = [sys.executable, "-m", "view", "--checkpoint", str(run), str(flow_run), "--port", "0", "--device", "cpu"]
    with running(words) as process, process.stderr, contextlib.closing(browser.new_context()) as context:
        window = context.new_page()
        window.set_default_timeout(PATIENCE)
        window.goto(re.search(r"http://\S+", process.stderr.readline())[0])
        settings(window, pictures_of_each=1, steps=2, guidance="network")
        window.locator(".entry select").nth(1).select_option("2")
        press(window, "Sample")
        window.get_by_text("Save the picture").wait_for()
        sync_api.expect(window.locator("code")).to_contain_text("step-0000002@ema")

        window.get_by_label("checkpoint").first.select_option(label="flow")
        sync_api.expect(window.get_by_label("sampler")).to_have_value("dpm++2m")
        sync_api.expect(window.get_by_label("classes")).to_be_hidden()
        options = window.get_by_label("guidance").locator("option")
        sync_api.expect(options).to_have_text(["by the middle head", "by another checkpoint", "none"])
        settings(window, guidance="middle", steps=2)
        sync_api.expect(window.get_by_label("scale")).to_have_value("1.4")
        press(window, "Sample")
        sync_api.expect(window.locator("code")).to_contain_text("--guidance-source middle")
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM


def test_two_steps_of_a_run_are_compared_from_the_same_noise(page):
    page.get_by_role("tab", name="Compare").click()
    settings(page, pictures_of_each=1, steps=3)
    press(page, "Compare")
    sync_api.expect(page.get_by_text("Save the picture")).to_have_count(2)
    sync_api.expect(page.locator("figcaption")).to_have_text(["run, step 2, ema", "run, step 4, ema"])
    images = page.locator("figure img")
    contents = [
        page.evaluate("async (url) => Array.from(new Uint8Array(await (await fetch(url)).arrayBuffer()))", url)
        for url in (images.nth(0).get_attribute("src"), images.nth(1).get_attribute("src"))
    ]
    assert contents[0] != contents[1]


def test_a_run_shows_its_curves_its_numbers_and_its_previews_over_time(page):
    page.get_by_role("tab", name="Runs").click()
    curves = page.get_by_alt_text("curves of the chosen runs")
    sync_api.expect(curves).to_be_visible()
    sync_api.expect(page.locator("table")).to_contain_text("images/s")
    sync_api.expect(page.locator("table")).to_contain_text("waiting for data")
    preview = page.get_by_alt_text("preview")
    sync_api.expect(preview).to_have_attribute("src", re.compile(r"previews/4\.png"))
    page.get_by_label("step", exact=False).last.fill("0")
    sync_api.expect(preview).to_have_attribute("src", re.compile(r"previews/2\.png"))


def test_a_store_is_browsed_by_class_and_page(page):
    page.get_by_role("tab", name="Stores").click()
    page.get_by_text("1 to 24 of 50").wait_for()
    sync_api.expect(page.locator(".tiles img:visible")).to_have_count(24)
    page.get_by_role("button", name="After").click()
    page.get_by_text("25 to 48 of 50").wait_for()
    page.get_by_role("button", name="class 3").click()
    page.get_by_text("1 to 12 of 12").wait_for()
    sync_api.expect(page.locator(".tiles b")).to_have_text(["class 3"] * 12)
    page.get_by_label("compared with").select_option("again")
    page.get_by_text(re.compile(r"keep \d+\.\d dB")).wait_for()
    sync_api.expect(page.get_by_text("Nothing was left out.")).to_be_visible()


@pytest.mark.parametrize(
    "path", ["gradio_api/file=/etc/passwd", "file=../../etc/passwd", "..%2f..%2fetc/passwd", "server.py"]
)
def test_no_address_of_the_page_leads_to_a_file_of_the_machine(page, address, path):
    answer = page.request.get(address + path)
    assert answer.status == 404
    assert "root:" not in answer.text()


def test_names_from_files_are_words_and_never_markup(browser, store, run, tmp_path):
    """A store and a run whose names and classes are markup: no element of theirs comes to be."""
    nasty = tmp_path / "<img src=x onerror=alert(1)>"
    nasty.mkdir()
    shutil.copytree(run, nasty / "run")
    config = nasty / "run" / "checkpoints" / "step-0000004" / "config.json"
    config.write_text(config.read_text().replace("class 1", "<b onclick=alert(2)>x</b>"))
    words = [sys.executable, "-m", "view", "--checkpoint", str(run), str(nasty / "run"), "--port", "0"]
    with running(words) as process, process.stderr, contextlib.closing(browser.new_context()) as context:
        address = re.search(r"http://\S+", process.stderr.readline())[0]
        window = context.new_page()
        window.set_default_timeout(PATIENCE)
        dialogs = []
        window.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        window.goto(address)
        settings(window)
        window.get_by_label("checkpoint").first.select_option(index=1)
        window.locator(".chips button", has_text="<b onclick=alert(2)>x</b>").wait_for()
        assert window.locator("img[src='x'], .chips b").count() == 0
        assert dialogs == []
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM


def test_the_command_ends_within_a_step_of_the_job_that_runs(run):
    words = [sys.executable, "-m", "view", "--checkpoint", str(run), "--port", "0", "--device", "cpu"]
    with running(words) as process, process.stderr:
        address = re.search(r"http://\S+", process.stderr.readline())[0]
        asked = {"networks": [{"network": 0}], "steps": 1000, "samples_per_class": 16, "sampler": "ddpm"}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}samples", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            job = json.load(answer)["id"]
        wait_for(lambda: b"of 1000 steps" in urllib.request.urlopen(f"{address}jobs/{job}").read())
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()


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
