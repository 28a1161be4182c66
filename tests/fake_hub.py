"""A Hugging Face Hub on loopback: the endpoints of its protocol that fetching and publishing a model use, in memory.

Ours stand in for the real ones with what clients rely on: status codes, `X-Error-Code`, ETags, the LFS batch, and
commits that are all or nothing.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_someone"


class Repository:
    def __init__(self, *, private=False):
        self.private = private
        self.files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.commits = []

    @property
    def sha(self):
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class FakeHub:
    """What the server holds, and what it was asked."""

    def __init__(self):
        self.repositories, self.blobs, self.asked, self.refuse = {}, {}, [], {}
        self.address = ""


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self):
        route = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {route}")
        if "/resolve/" in route:
            name, _, rest = route[1:].partition("/resolve/")
            return self.file(name, rest.partition("/")[2])
        name = "/".join(route.removeprefix("/api/models/").split("/")[:2])
        repository = self.repository(name)
        if repository is None:
            return None
        if "/tree/" in route:
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in repository.files.items()
            ]
            return self.answer(tree)
        siblings = [{"rfilename": path} for path in repository.files]
        return self.answer({"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815 -- the name is the protocol's

    def file(self, name, path):
        repository = self.repository(name)
        if repository is None:
            return None
        if path not in repository.files:
            return self.answer({"error": "Entry not found"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        data = repository.files[path]
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha})

    def repository(self, name):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.may_write()):
            self.answer({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self):
        route = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {route}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.may_write():
            return self.answer({"error": "Invalid username or password."}, status=401)
        for word, status in self.hub.refuse.items():
            if word in route:
                return self.answer({"error": "refused by the test"}, status=status)
        if route == "/api/repos/create":
            return self.create(json.loads(body))
        if route == "/api/validate-yaml":
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            return self.answer({"errors": [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no map"}]})
        if route.endswith("/objects/batch"):
            return self.batch(json.loads(body))
        name = "/".join(route.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in route:
            kinds = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": f["path"],
                    "uploadMode": kinds[f["path"].endswith((".safetensors", ".png"))],
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        return self.commit(name, [json.loads(line) for line in body.splitlines()])

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            return self.answer({**url, "error": "You already created this model repo"}, status=409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[name] = Repository(private=private)
        return self.answer(url)

    def batch(self, wanted):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
            for one in wanted["objects"]
        ]
        return self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name, lines):
        repository = self.hub.repositories[name]
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(lines[0]["value"]["summary"])
        oid = repository.sha
        return self.answer({"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self.answer({})

    def answer(self, content, *, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def serving():
    """A hub that is served while the block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
