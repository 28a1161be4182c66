"""An S3 server on loopback, moto's, behind a layer that throttles, breaks uploads, lets listings lag and refuses.

def test_…(s3):                 the fixture of tests/conftest.py: a server with a bucket of the test's own
    s3.url                      s3://BUCKET; commands of other processes take s3.environment()
    s3.throttled = 3            the next three requests are told to slow down
    s3.breaks["model.safe"] = 1 one upload of such a name is cut off half-way
    s3.hidden.add("b.json")     listings do not show such names; reading them works
    s3.expired = True           whoever asks has credentials that have expired
"""

import functools
import itertools
import os
import re
import socket
import threading

import fsspec
from botocore.loaders import JSONFileLoader
from werkzeug.serving import WSGIRequestHandler, make_server

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
_LISTED = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_NUMBERS = itertools.count()
_load = JSONFileLoader.load_file


@functools.cache
def _described(path):
    """A service's description, which botocore would parse again for every connection."""
    return _load(JSONFileLoader(), path)


JSONFileLoader.load_file = lambda _, path: _described(path)


class _Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


class ObjectStore:
    """The server, its faults, and what it was asked for."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.begin()

    def begin(self):
        """Forget faults and requests; a bucket that nobody has used."""
        self.throttled, self.breaks, self.hidden, self.expired = 0, {}, set(), False
        self.asked = []
        self.before_answer = None
        self.bucket = f"bucket-{next(_NUMBERS)}"
        self.url = f"s3://{self.bucket}"

    def environment(self):
        """What tells s3fs where the server is, and who asks."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # s3fs tries again by itself, and so do we
        }

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked.append((method, path))
        if self.before_answer is not None:
            self.before_answer(method, path)
        if self.expired:
            return _refuse(
                environ, start_response, "400 Bad Request", "ExpiredToken", "The provided token has expired."
            )
        if self.throttled > 0:
            self.throttled -= 1
            return _refuse(environ, start_response, "503 Slow Down", "SlowDown", "Please reduce your request rate.")
        broken = next((name for name, times in self.breaks.items() if name in path and times > 0), None)
        if method in {"PUT", "POST"} and broken is not None:
            self.breaks[broken] -= 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("500 Nobody Hears This", [])
            return []
        if method == "GET" and "list-type" in environ["QUERY_STRING"] and self.hidden:
            return self._lagging(environ, start_response)
        return self._app(environ, start_response)

    def _lagging(self, environ, start_response):
        said = {}
        body = b"".join(self._app(environ, lambda status, headers, *_: said.update(status=status, headers=headers)))
        hidden = [name.encode() for name in self.hidden]
        body = _LISTED.sub(lambda one: b"" if any(name in one[0] for name in hidden) else one[0], body)
        headers = [(name, value) for name, value in said["headers"] if name.lower() != "content-length"]
        start_response(said["status"], [*headers, ("Content-Length", str(len(body)))])
        return [body]

    # ---- looking at what is there, past the faults

    def files(self):
        """fsspec's file system, without any memory."""
        return fsspec.filesystem(
            "s3",
            key="someone",
            secret="secret",
            client_kwargs={"endpoint_url": self.endpoint},
            use_listings_cache=False,
        )

    def names(self, below=""):
        """Every name in the bucket, or below a folder of it, relative to that."""
        root = f"{self.bucket}/{below}".rstrip("/")
        return sorted(name.removeprefix(f"{root}/") for name in self.files().find(root))

    def read(self, name):
        return self.files().cat_file(f"{self.bucket}/{name}")


def _refuse(environ, start_response, status, code, message):
    body = _ERROR.format(code=code, message=message).encode()
    body = b"" if environ["REQUEST_METHOD"] == "HEAD" else body
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def clear_instances():
    """Let fsspec forget its connections, which remember an address and who asked."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


def use(server, monkeypatch):
    """Let this process and those that it starts ask the server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    clear_instances()
    server.begin()
    server.files().mkdir(server.bucket)
    server.asked.clear()
    return server
