"""A Hub on this machine: as much of its API as pushing and pulling a patch takes, for the real client (HF_ENDPOINT)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class Hub:
    """Repositories by name: files by commit, "main" being the newest."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.asked: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.tamper: dict[str, bytes] = {}  # what is served in place of a file

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos[repo]
        known = dict(commits.get("main", {})) | files
        sha = hashlib.sha1(repr(sorted(known)).encode() + b"".join(known.values())).hexdigest()
        commits[sha] = commits["main"] = known
        return sha

    def sha(self, repo: str, revision: str) -> str | None:
        commits = self.repos[repo]
        if revision not in commits:
            return None
        return next(s for s, files in commits.items() if s != "main" and files == commits[revision])


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body = self.body()
        self.hub.asked.append(("POST", self.path, dict(self.headers)))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.known():
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self.create(body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^?]+).*", self.path):
            files = json.loads(body)["files"]
            return self.answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^?]+)(.*)", self.path):
            return self.commit(body, found[1], found[3])
        return self.answer(404, {"error": "not here"})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name'].split('/')[-1]}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": name})
        self.hub.repos[name] = {}
        self.hub.commit(name, {".gitattributes": b""})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})

    def commit(self, body: bytes, repo: str, how: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        if repo.startswith("other/"):
            return self.answer(403, {"error": "you have no right to write here"})
        url = f"http://{self.headers['Host']}/{repo}"
        if "create_pr=1" in how:
            return self.answer(
                200,
                {
                    "commitUrl": f"{url}/commit/0",
                    "commitOid": "0" * 40,
                    "pullRequestUrl": f"{url}/discussions/1",
                },
            )
        sha = self.hub.commit(repo, files)
        return self.answer(200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append((self.command, self.path, dict(self.headers)))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            return self.file(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^?/]+).*", self.path):
            if not self.may(found[1]):
                return None
            if (sha := self.hub.sha(found[1], found[2])) is None:
                return self.refuse(404, "RevisionNotFound")
            files = self.hub.repos[found[1]][sha].items()
            return self.answer(
                200,
                [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files],
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^?]+))?.*", self.path):
            if not self.may(found[1]):
                return None
            sha = self.hub.sha(found[1], found[2] or "main")
            if sha is None:
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": n} for n in self.hub.repos[found[1]][sha]]
            return self.answer(
                200,
                {
                    "id": found[1],
                    "modelId": found[1],
                    "sha": sha,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                },
            )
        return self.answer(404, {"error": "not here"})

    def may(self, repo: str) -> bool:
        if repo not in self.hub.repos or (repo in self.hub.private and not self.known()):
            self.refuse(404, "RepoNotFound")
        elif repo in self.hub.gated:
            self.refuse(403, "GatedRepo")
        else:
            return True
        return False

    def file(self, repo: str, revision: str, name: str) -> None:
        if not self.may(repo):
            return
        sha = self.hub.sha(repo, revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        if name not in self.hub.repos[repo][sha]:
            return self.refuse(404, "EntryNotFound")
        data = self.hub.tamper.get(name, self.hub.repos[repo][sha][name])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            return self.answer(
                206, data[start : stop + 1], Content_Range=f"bytes {start}-{stop}/{len(data)}", **headers
            )
        self.answer(200, data, Content_Length=str(len(data)), **headers)


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """A running hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
