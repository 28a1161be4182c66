"""The server: no path of the machine can be asked for, and nobody but its own page can ask."""

import asyncio
import json

import pytest
from aiohttp.test_utils import TestClient, TestServer

from view import server
from view.jobs import JobQueue
from view.options import ViewOptions
from view.server import HEADERS, application


@pytest.fixture
def asked(given, options):
    """Sends requests as they are written, with nothing tidied up; gives (status, headers, body) of each."""

    def ask(*requests, options=options):
        async def talk():
            queue, answers = JobQueue(), []
            async with TestClient(TestServer(application(options, given, queue))) as client:
                for method, path, how in requests:
                    reader, writer = await asyncio.open_connection(client.host, client.port)
                    body = how.get("body", b"")
                    headers = {"Host": f"127.0.0.1:{client.port}", "Connection": "close", "Content-Length": len(body)}
                    headers |= {
                        name: str(value).replace("PORT", str(client.port))
                        for name, value in how.get("headers", {}).items()
                    }
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
                    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
                    status, *fields = head.decode().split("\r\n")
                    known = dict(field.split(": ", 1) for field in fields)
                    answers.append((int(status.split()[1]), known, content))
                    writer.close()
            queue.close()
            return answers

        return asyncio.run(talk())

    return ask


def get(path, **headers):
    return "GET", path, {"headers": headers}


def post(path, value, **headers):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return "POST", path, {"headers": {"Content-Type": "application/json", **headers}, "body": body}


TRAVERSALS = [
    "/etc/passwd",
    "//etc/passwd",
    "/../../../../etc/passwd",
    "/..%2f..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/page.js/../../server.py",
    "/server.py",
    "/page/index.html",
    "/file=/etc/passwd",
    "/file=../../etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/runs/0/previews/../../config.yaml",
    "/runs/0/previews/..%2f..%2fconfig.yaml",
    "/runs/0/previews/2.png/../../../config.yaml",
    "/runs/-1",
    "/runs/0/previews/99999999999999.png",
    "/networks/0?step=../../..",
    "/networks/0/../../config.yaml",
    "/stores/0/manifest.json",
    "/stores/../manifest.json",
    "/jobs/..%2f..%2fetc",
    "/jobs/0123456789abcdef/0/..%2fsamples.png",
    "/jobs/0123456789abcdef/0/samples.png",
    "/curves.png?runs=../..,/etc/passwd",
    "/\x00",
    "/%00",
    "http://127.0.0.1/etc/passwd",
]


def test_no_path_leads_out_of_what_was_given(asked):
    for (_, path, _), (status, _, body) in zip(map(get, TRAVERSALS), asked(*map(get, TRAVERSALS)), strict=True):
        if path == "/networks/0?step=../../..":  # what is no number is no step: the run's newest
            assert (status, json.loads(body)["step"]) == (200, 4)
            continue
        assert status in {400, 404}, path
        assert b"root:" not in body and b"data_identity" not in body and b"dit-latents" not in body, path


def test_every_answer_keeps_the_page_to_itself(asked):
    requests = [get("/"), get("/given"), get("/nothing"), get("/given", Host="evil.example"), post("/samples", {})]
    for status, headers, _ in asked(*requests):
        assert {name: headers[name] for name in HEADERS} == HEADERS, status
        assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "192.168.0.1:PORT", "127.0.0.1.evil.example", "", "localhost@evil.example"],
)
def test_another_name_for_this_machine_is_refused(asked, host):
    for status, _, body in asked(get("/given", Host=host), post("/samples", {}, Host=host)):
        assert status == 400
        assert b"answers to 127.0.0.1" in body


@pytest.mark.parametrize("host", ["localhost:PORT", "127.0.0.1", "[::1]:PORT"])
def test_the_names_of_loopback_are_answered(asked, host):
    assert asked(get("/given", Host=host))[0][0] == 200


def test_where_the_user_opened_it_to_others_any_name_is_answered(asked, store, run):
    opened = ViewOptions(checkpoint=(str(run),), latents=(str(store),), host="0.0.0.0")
    assert asked(get("/given", Host="lab-7.example"), options=opened)[0][0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_another_page_cannot_start_or_stop_anything(asked, headers, monkeypatch):
    monkeypatch.setattr(server, "sampling", None)  # would be an error of 500
    for path in ("/samples", "/browse", "/jobs/0123456789abcdef/stop"):
        status, _, body = asked(post(path, {"networks": [{"network": 0}]}, **headers))[0]
        assert status == 400
        assert b"use the page of dit-view itself" in body


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("/samples", b"{", "is not valid JSON"),
        ("/samples", b"[" * 5000, "nests too deeply"),
        ("/samples", [], "must be an object"),
        ("/samples", {}, "networks is missing"),
        ("/samples", {"networks": []}, "networks"),
        ("/samples", {"networks": [{"network": 0}] * 7}, "networks"),
        ("/samples", {"networks": [{"network": "/etc/passwd"}]}, "networks[0].network is '/etc/passwd'"),
        ("/samples", {"networks": [{"network": 0, "path": "/etc/passwd"}]}, "unknown field"),
        ("/samples", {"networks": [{"network": 0}], "out": "/tmp/x.png"}, "unknown field"),
        ("/samples", {"networks": [{"network": 0}], "steps": 10**9}, "steps is 1000000000, but must be"),
        ("/samples", {"networks": [{"network": 0}], "samples_per_class": 65}, "samples_per_class is 65"),
        ("/samples", {"networks": [{"network": 0}], "seed": 1e300}, "seed"),
        ("/samples", {"networks": [{"network": 0}], "guidance": float("nan")}, "guidance"),
        ("/samples", {"networks": [{"network": 0}], "source": "x"}, "source is 'x', but must be one of"),
        ("/browse", {"store": 0, "first": -1}, "first is -1"),
    ],
)
def test_what_is_asked_has_types_and_bounds(asked, path, value, said):
    status, _, body = asked(post(path, value))[0]
    assert status == 400, body
    assert said in json.loads(body)["sentence"]


def test_a_request_of_megabytes_and_other_methods_are_refused(asked):
    answers = asked(
        post("/samples", b" " * (1 << 17)), ("PUT", "/given", {}), ("DELETE", "/stores/0", {}), ("POST", "/given", {})
    )
    assert [status for status, _, _ in answers] == [413, 405, 405, 400]


def test_the_page_brings_all_its_parts_and_names_no_other_host(asked):
    for path in ("/", "/page.js", "/dom.js", "/sample.js", "/runs.js", "/stores.js", "/page.css", "/icon.svg"):
        status, _, body = asked(get(path))[0]
        assert status == 200
        foreign = [word for word in (b"http://", b"https://", b"//cdn", b"@import") if word in body]
        assert foreign == ([b"http://"] if path == "/icon.svg" else []), "the namespace of SVG is a name, not a place"
        assert b"innerHTML" not in body and b"eval(" not in body
