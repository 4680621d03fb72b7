"""A Hub on this machine, for the real client (HF_ENDPOINT): as much of its API as patches and data sets take.

A data set stands among the repositories as "datasets/user/name".
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_test"


_REPO = "(?:datasets/)?[^/]+/[^/]+"


def _name(kind: str, repo: str) -> str:
    return f"datasets/{repo}" if kind == "datasets" else repo


def _entries(files: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    """A file or a folder as the API lists it; nothing where there is neither."""
    if name in files:
        oid = hashlib.sha1(files[name]).hexdigest()
        return [{"type": "file", "path": name, "size": len(files[name]), "oid": oid}]
    if any(n.startswith(f"{name}/") for n in files):
        return [{"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}]
    return []


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
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", unquote(self.path)):
            return self.paths_info(_name(found[1], found[2]), found[3], json.loads(body)["paths"])
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
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(rf"/({_REPO})/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups())
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return self.tree(_name(found[1], found[2]), found[3], found[4])
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.about(_name(found[1], found[2]), found[3] or "main")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check", path):
            return self.answer(200, {}) if self.may(_name(found[1], found[2]), "data") else None
        return self.answer(404, {"error": "not here"})

    def paths_info(self, repo: str, revision: str, asked: list[str]) -> None:
        if (files := self.files(repo, revision)) is not None:
            self.answer(200, [entry for name in asked for entry in _entries(files, name)])

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        if (files := self.files(repo, revision)) is not None:
            there = {n: b for n, b in files.items() if not folder or n.startswith(f"{folder}/")}
            recursive = "recursive=true" in self.path.lower()
            depth = folder.count("/") + 1 if folder else 0
            names = {n if recursive else "/".join(n.split("/")[: depth + 1]) for n in there}
            names |= {n.rpartition("/")[0] for n in there if recursive and "/" in n}
            self.answer(200, [entry for name in sorted(names) for entry in _entries(files, name)])

    def about(self, repo: str, revision: str) -> None:
        if (files := self.files(repo, revision)) is not None:
            about = {"id": repo.removeprefix("datasets/"), "sha": self.hub.sha(repo, revision), "private": False}
            about |= {"gated": "auto" if repo in self.hub.gated else False}
            about |= {"siblings": [{"rfilename": n} for n in files], "tags": [], "downloads": 0, "likes": 0}
            self.answer(200, about | {"modelId": about["id"]})

    def files(self, repo: str, revision: str, name: str = "") -> dict[str, bytes] | None:
        """What a repository holds; None: it, or its file ``name``, was refused, and that is answered."""
        if not self.may(repo, name):
            return None
        if (sha := self.hub.sha(repo, revision)) is None:
            self.refuse(404, "RevisionNotFound")
            return None
        return self.hub.repos[repo][sha]

    def may(self, repo: str, file: str = "") -> bool:
        """Anyone may see what a gated data set is about and which files it has."""
        open_to_all = repo.startswith("datasets/") and file in ("", "README.md")
        if repo not in self.hub.repos or (repo in self.hub.private and not self.known()):
            self.refuse(404, "RepoNotFound")
        elif repo in self.hub.gated and not open_to_all:
            self.refuse(403, "GatedRepo")
        else:
            return True
        return False

    def file(self, repo: str, revision: str, name: str) -> None:
        files = self.files(repo, revision, name)
        if files is None:
            return
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data = self.hub.tamper.get(name, files[name])
        sha = str(self.hub.sha(repo, revision))
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


def call(
    address: str, folder: Path, *args: object, token: str | None = None, code: str = "", timeout: int = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, whose Hub is the one at ``address`` and whose cache lies in ``folder``.

    Args:
        code: Python to run in that process first.
    """
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **env}
    own |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # the library datasets would tell a host of its own
    if token:
        own["HF_TOKEN"] = token
    start = ["-c", f"{code}\nfrom mosectl.cli.main import main; main()"] if code else ["-m", "mosectl"]
    command = [sys.executable, *start, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=own, timeout=timeout, cwd=folder)
