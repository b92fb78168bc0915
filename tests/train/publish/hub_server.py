"""A Hugging Face Hub on localhost: what its real client asks of it to upload and to download, kept in memory.

    with LocalHub() as hub:
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("user/name")

Files are small and go by LFS or in the commit; storage by xet is not spoken (set HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

TOKEN, USER = "hf_local", "user"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
LFS_SUFFIXES = (".safetensors", ".png")


class LocalHub:
    """The server in a thread of its own.

    Attributes:
        url: what HF_ENDPOINT is set to.
        repos: name -> `{"private": bool, "commits": [{path: content}, ...]}`; every commit holds the whole tree.
        requests: `"METHOD /path"` of everything that was asked.
        cut: part of a `"METHOD /path"` -> how often the connection is cut when half of such a request's body is read.
        lost: the same, but cut once the request was carried out, so that only the answer is lost.
    """

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """The newest commit's files; none before the first commit."""
        commits = self.repos[repo]["commits"]
        return commits[-1] if commits else {}


def sha_of(repo: str, commits: list) -> str:
    return hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Stay silent: what the tests want to know is in `LocalHub`."""

    def _serve(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        asked = f"{self.command} {self.path}"
        self.hub.requests.append(asked)
        length = int(self.headers.get("Content-Length", 0))
        if self._due(self.hub.cut, asked):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self._read(length)
        if re.match("POST /api/(repos|models)", asked) and not self._authorized():
            self._send(401, {"error": "Unauthorized"})
            return
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, asked):
                answered = answer(self, **found.groupdict())
                if self._due(self.hub.lost, asked):
                    self.close_connection = True
                    return
                self._send(*answered)
                return
        self._send(501, {"error": f"this local hub does not speak {asked}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _due(self, planned: dict[str, int], asked: str) -> bool:
        for part, times in planned.items():
            if part in asked and times:
                planned[part] -= 1
                return True
        return False

    def _read(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: dict | list | bytes = b"", headers: dict | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(content)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def whoami(self):
        if not self._authorized():
            return 401, {"error": "Invalid credentials in Authorization header"}
        return 200, {"type": "user", "name": USER, "orgs": [{"name": "org"}]}

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        known, private = repo in self.hub.repos, asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.repos.setdefault(repo, {"private": private, "commits": []})
        return (409 if known else 200), {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}

    def validate_yaml(self):
        """The Hub's own checks are not public; these are the ones that its documentation names."""
        head = YAML(typ="safe").load(json.loads(self.body)["content"].split("---\n")[1])
        errors = (
            [] if head.get("license", "mit") in ("mit", "apache-2.0") else ["license must be one of mit, apache-2.0"]
        )
        for name in ("base_model", "library_name", "pipeline_tag"):
            if not isinstance(head.get(name, ""), str):
                errors.append(f"{name} must be a string")
        for name in ("tags", "datasets"):
            if not all(isinstance(item, str) for item in head.get(name, [])):
                errors.append(f"{name} must be a list of strings")
        for model in head.get("model-index", []):
            for result in model["results"]:
                if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                    errors.append("a result needs a task type, a data set type and a data set name")
                if not all("type" in metric and "value" in metric for metric in result["metrics"]):
                    errors.append("a metric needs a type and a value")
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}

    def preupload(self, repo: str):
        there, files = self.hub.files(repo), []
        for path in [file["path"] for file in json.loads(self.body)["files"]]:
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = object_id(path, there[path]) if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def lfs_batch(self, repo: str):
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(self.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return 400, {"error": "the content is not what its name says"}
        self.hub.objects[oid] = self.body
        return 200, b""

    def commit(self, repo: str):
        files = dict(self.hub.files(repo))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commits = self.hub.repos[repo]["commits"]
        commits.append(files)
        sha = sha_of(repo, commits)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}

    def _visible(self, repo: str) -> tuple[int, dict, dict] | None:
        """None when the asker may read the repository, or the answer that there is none."""
        found = self.hub.repos.get(repo)
        if found and (self._authorized() or not found["private"]):
            return None
        return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}

    def info(self, repo: str):
        if hidden := self._visible(repo):
            return hidden
        found = self.hub.repos[repo]
        names = [{"rfilename": path} for path in self.hub.files(repo)]
        sha = sha_of(repo, found["commits"])
        return 200, {
            "id": repo,
            "modelId": repo,
            "sha": sha,
            "private": found["private"],
            "siblings": names,
            "tags": [],
        }

    def tree(self, repo: str, folder: str | None = None):
        if hidden := self._visible(repo):
            return hidden
        inside = [
            (path, x) for path, x in self.hub.files(repo).items() if path.startswith(f"{folder}/" if folder else "")
        ]
        if folder and not inside:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        entries = [{"type": "file", "path": path, "size": len(x), "oid": object_id(path, x)} for path, x in inside]
        for entry, (path, content) in zip(entries, inside, strict=True):
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 130}
        return 200, entries

    def resolve(self, repo: str, path: str):
        if hidden := self._visible(repo):
            return hidden
        files = self.hub.files(repo)
        commit = {"X-Repo-Commit": sha_of(repo, self.hub.repos[repo]["commits"])}
        if path not in files:
            return 404, {"error": "Entry not found"}, commit | {"X-Error-Code": "EntryNotFound"}
        content = files[path]
        etag = f'"{object_id(path, content)}"'
        return 200, content, commit | {"ETag": etag, "Content-Type": "application/octet-stream"}


def object_id(path: str, content: bytes) -> str:
    """Of a file as git stores it, or of the LFS object."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = {
    r"GET /api/whoami-v2": Handler.whoami,
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate_yaml,
    rf"POST /api/models/{REPO}/preupload/\w+": Handler.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"PUT /lfs/(?P<oid>\w+)": Handler.lfs_put,
    rf"POST /api/models/{REPO}/commit/\w+": Handler.commit,
    rf"GET /api/models/{REPO}(?:/revision/\w+)?": Handler.info,
    rf"GET /api/models/{REPO}/tree/\w+(?:/(?P<folder>.+))?": Handler.tree,
    rf"(?:GET|HEAD) /{REPO}/resolve/\w+/(?P<path>.+)": Handler.resolve,
}
