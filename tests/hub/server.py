"""A Hub of our own: the part of Hugging Face's HTTP API that its clients ask for to read a repository.

A file can be broken: `error` answers 500 in its place, `cut` closes the connection half-way through it.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote

API = re.compile(r"/api/(?P<kind>datasets|models)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<rest>.+))?")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rest>.+)")
Files = dict[str, bytes]  # by path inside the repository


class Refused(Exception):
    """A request without an answer: (status, the code that tells clients what is missing)."""


class Hub(ThreadingHTTPServer):
    """Serves `repositories`, by `datasets/owner/name` or `models/owner/name`, on a free port of this machine.

    An older revision of one is under that name with @ and its tag.
    """

    def __init__(self, repositories: dict[str, Files]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories = repositories
        self.broken: dict[str, str] = {}  # `error` or `cut`, by path inside a repository
        self.asked: list[str] = []  # method and path of every request


@contextlib.contextmanager
def serve(repositories: dict[str, Files]) -> Iterator[Hub]:
    """A hub that answers until the block is left."""
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as on the Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(self.path.partition("?")[0])
        try:
            if found := API.fullmatch(path):
                self._describe(**found.groupdict())
            elif found := RESOLVE.fullmatch(path):
                self._resolve(**found.groupdict())
            else:
                raise Refused(HTTPStatus.NOT_FOUND, "EntryNotFound")
        except Refused as refused:
            status, code = refused.args
            self._say(b"", status, {"X-Error-Code": code})

    do_HEAD = do_GET

    def _describe(self, kind: str, name: str, what: str | None, rest: str | None) -> None:
        """Says what a repository is, or what lies in a folder of it."""
        files, folder = self._find(f"{kind}/{name}", rest or "main")
        described = {"id": name, "sha": commit(files), "siblings": [{"rfilename": path} for path in files]}
        if what == "tree":
            described = tree(files, folder, recursive="recursive=true" in self.path.lower())
        self._say(json.dumps(described).encode(), HTTPStatus.OK, {"Content-Type": "application/json"})

    def _resolve(self, kind: str | None, name: str, rest: str) -> None:
        """Says what a file holds, or the range of it that was asked for."""
        files, path = self._find(f"{kind or 'models/'}{name}", rest)
        if path not in files:
            raise Refused(HTTPStatus.NOT_FOUND, "EntryNotFound")
        if self.server.broken.get(path) == "error":
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "")
        content, status = files[path], HTTPStatus.OK
        headers = {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], HTTPStatus.PARTIAL_CONTENT
        self._say(content, status, headers, cut=self.server.broken.get(path) == "cut")

    def _find(self, repository: str, rest: str) -> tuple[Files, str]:
        """The files of a repository at the revision that `rest` starts with, and the path after it."""
        if repository not in self.server.repositories:
            raise Refused(HTTPStatus.UNAUTHORIZED, "RepoNotFound")  # it might be there, and private
        revision, _, path = rest.partition("/")
        for name, files in self.server.repositories.items():
            name, _, tag = name.partition("@")
            if name == repository and revision in (tag or "main", commit(files)):
                return files, path
        raise Refused(HTTPStatus.NOT_FOUND, "RevisionNotFound")

    def _say(self, content: bytes, status: int, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Says nothing: `asked` has it all."""


def commit(files: Files) -> str:
    """The hash of a revision."""
    return sha1(b"".join(path.encode() + files[path] for path in sorted(files)))


def tree(files: Files, folder: str, recursive: bool) -> list[dict]:
    """The files and folders in a folder, with `recursive` those below it too."""
    inside = f"{folder}/" if folder else ""
    below = [path for path in files if path.startswith(inside)]
    if not below:
        raise Refused(HTTPStatus.NOT_FOUND, "EntryNotFound")
    folders = {str(parent) for path in below for parent in PurePosixPath(path).parents}
    found = [{"type": "directory", "path": path, "oid": sha1(path.encode())} for path in folders - {".", folder}]
    found += [{"type": "file", "path": path, "oid": sha1(files[path]), "size": len(files[path])} for path in below]
    found = [entry for entry in found if entry["path"].startswith(inside)]
    return [entry for entry in found if recursive or "/" not in entry["path"].removeprefix(inside)]


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
