"""The server: no path of the machine can be asked for, and nobody but its own page can ask."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from view.options import ViewOptions
from view.server import HEADERS, Guard, serving
from view.shelf import scratch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port(given, options):
    with serving(replace(options, port=0), given) as number:
        yield number


@pytest.fixture
def asked(port):
    """Sends requests as they are written, with nothing tidied up; gives (status, headers, body) of each."""

    def ask(*requests, port=port):
        answers = []
        for method, path, how in requests:
            body = how.get("body", b"")
            headers = {"Host": f"127.0.0.1:{port}", "Connection": "close", "Content-Length": len(body)}
            headers |= {name: str(value).replace("PORT", str(port)) for name, value in how.get("headers", {}).items()}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value != "None")
            with socket.create_connection(("127.0.0.1", port), timeout=60) as stream:
                stream.sendall(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
                head, _, content = _all_of(stream).partition(b"\r\n\r\n")
            status, *fields = head.decode().split("\r\n")
            known = {name.title(): value for name, value in (field.split(": ", 1) for field in fields)}
            answers.append((int(status.split()[1]), known, content))
        return answers

    return ask


def _all_of(stream):
    parts = []
    with contextlib.suppress(ConnectionResetError):  # the rest of a request that is too long was never read
        while part := stream.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def get(path, **headers):
    return "GET", path, {"headers": headers}


JOIN = "/gradio_api/queue/join"


def post(path, value, **headers):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return "POST", path, {"headers": {"Content-Type": "application/json", **headers}, "body": body}


TRAVERSALS = [
    "/etc/passwd",
    "//etc/passwd",
    "/../../../../etc/passwd",
    "/..%2f..%2f..%2fetc%2fpasswd",
    "/assets/../../../../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2fpackage.json",
    "/static/..%2findex.html",
    "/file=/etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../etc/passwd",
    "/gradio_api/file=%2Fetc%2Fpasswd",
    "/gradio_api/file={run}/config.yaml",
    "/gradio_api/file={store}/manifest.json",
    "/gradio_api/file={root}/pyproject.toml",
    "/gradio_api/file={scratch}/../../etc/passwd",
    "/gradio_api/file={scratch}/link",
    "/gradio_api/file={scratch}/",
    "/gradio_api/file=https://example.com/",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=https://example.com/",
    "/gradio_api/custom_component/1/client/component/..%2f..%2fetc%2fpasswd",
    "/gradio_api/vibe-code/",
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/gradio_api/runs",
    "/gradio_api/upload_progress?upload_id=1",
    "/monitoring",
    "/docs",
    "/openapi.json",
    "/login",
    "/%00",
    "http://127.0.0.1/etc/passwd",
]


def test_no_path_leads_out_of_what_the_page_made(asked, run, store):
    (scratch() / "link").symlink_to("/etc/passwd")
    paths = [path.format(run=run, store=store, root=ROOT, scratch=scratch()) for path in TRAVERSALS]
    for path, (status, _, body) in zip(paths, asked(*map(get, paths)), strict=True):
        assert status in {400, 403, 404}, path
        assert b"root:" not in body and b"data_identity" not in body and b"dit-latents" not in body, path


def test_a_file_that_the_page_shows_is_served(asked):
    (scratch() / "shown.json").write_text("{}")
    ((status, headers, body),) = asked(get(f"/gradio_api/file={scratch()}/shown.json"))
    assert (status, body, headers["X-Content-Type-Options"]) == (200, b"{}", "nosniff")


def test_every_answer_keeps_the_page_to_itself(asked):
    for status, headers, _ in asked(
        get("/", Origin="http://localhost:1"),
        get("/config"),
        get("/nothing"),
        get("/", Host="evil.example"),
        post(JOIN, {}),
    ):
        assert {name: headers[name.title()] for name in HEADERS} == HEADERS, status
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_only_scripts_of_the_page_may_run(asked):
    ((status, headers, body),) = asked(get("/"))
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert status == 200 and b"gradio" in body
    assert "unsafe" not in policy["script-src"] and "'sha256-" in policy["script-src"]
    assert (policy["connect-src"], policy["frame-ancestors"], policy["font-src"]) == ("'self'", "'none'", "'self'")
    assert b"fonts.googleapis" not in asked(get("/theme.css"))[0][2]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "192.168.0.1:PORT", "127.0.0.1.evil.example", "", "localhost@evil.example"],
)
def test_another_name_for_this_machine_is_refused(asked, host):
    for status, _, body in asked(get("/config", Host=host), post(JOIN, {}, Host=host)):
        assert status == 400
        assert b"answers to 127.0.0.1" in body


@pytest.mark.parametrize("host", ["localhost:PORT", "127.0.0.1", "[::1]:PORT"])
def test_the_names_of_loopback_are_answered(asked, host):
    assert asked(get("/config", Host=host))[0][0] == 200


def test_where_the_user_opened_it_to_others_any_name_is_answered(asked, given, store, run):
    opened = ViewOptions(checkpoint=(str(run),), latents=(str(store),), host="0.0.0.0", port=0)
    with serving(opened, given) as port:
        assert asked(get("/config", Host="lab-7.example"), port=port)[0][0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data"},
    ],
)
@pytest.mark.parametrize("path", [JOIN, "/gradio_api/cancel", "/gradio_api/run/predict"])
def test_another_page_cannot_start_or_stop_anything(asked, path, headers):
    ((status, _, body),) = asked(post(path, {"data": [], "fn_index": 0, "session_hash": "a"}, **headers))
    assert status == 400
    assert b"use the page of dit-view itself" in body


@pytest.mark.parametrize(
    "path", ["upload", "component_server", "process_recording", "vibe-edit/", "call/sample", "api/predict", "stream/1"]
)
def test_nothing_can_be_uploaded_or_asked_for_beside_the_page(asked, path):
    assert asked(post(f"/gradio_api/{path}", {}))[0][0] == 405


def test_a_request_of_megabytes_and_other_methods_are_refused(asked):
    answers = asked(post(JOIN, b" " * (1 << 17)), ("PUT", "/config", {}), ("DELETE", "/", {}), ("POST", "/", {}))
    assert [status for status, _, _ in answers] == [413, 405, 405, 405]
    chunked = {"Content-Type": "application/json", "Transfer-Encoding": "chunked", "Content-Length": None}
    assert asked(("POST", JOIN, {"headers": chunked, "body": b"0\r\n\r\n"}))[0][0] == 413


def test_a_file_s_description_in_the_place_of_a_choice_is_refused(asked, run):
    """Gradio would copy the file to where it can be asked for, if a function gave the description back."""
    config = json.loads(asked(get("/config"))[0][2])
    described = {"path": f"{run}/config.yaml", "meta": {"_type": "gradio.FileData"}}
    for one in config["dependencies"]:
        for value in (described, [described], [[described]]):
            request = {"data": [value] * len(one["inputs"]), "fn_index": one["id"], "session_hash": "w"}
            status, _, body = asked(post("/gradio_api/run/predict", request))[0]
            assert status == 400 or not one["inputs"], body
    assert not list(scratch().rglob("config.yaml"))


@pytest.mark.parametrize("body", [b"{", b"[" * 5000, b"[]", b"1", b'{"data": {"path": "/etc/passwd"}}'])
def test_what_is_no_request_of_the_page_is_one_sentence(asked, body):
    ((status, _, answer),) = asked(post(JOIN, body))
    assert (status, "sentence" in json.loads(answer)) == (400, True)


def test_the_settings_of_the_page_show_no_folder_and_ask_for_nobody(asked, run, store):
    config = asked(get("/config"))[0][2].decode()
    assert str(run.parent) not in config and str(store.parent) not in config
    assert json.loads(config)["analytics_enabled"] is False


def test_without_gradio_the_command_says_what_to_install(store):
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from view.__main__ import main\n"
        f"sys.exit(main(['--latents', {str(store)!r}, '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "dit-view: error: the page needs Gradio; pip install 'dit-pipeline[view]'\n"


@pytest.mark.parametrize(("error", "passes"), [("File at path x.png does not exist.", False), ("another", True)])
def test_a_picture_that_went_with_its_window_is_no_traceback_and_other_errors_are(error, passes):
    async def app(_scope, _receive, _send):
        raise RuntimeError(error)

    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/gradio_api/file={scratch()}/x.png",
        "headers": [(b"host", b"127.0.0.1")],
    }
    guard = Guard(app, ViewOptions(checkpoint=("run",)))
    with pytest.raises(RuntimeError, match=error) if passes else contextlib.nullcontext():
        asyncio.run(guard(scope, None, None))
