"""A small Hugging Face Hub in memory, over real HTTP, for tests (standard library only).

    with LocalHub() as hub: ...     clients with the environment of hub.client(home)

It answers what `create_repo`, `create_branch`, `create_commit`, `upload_folder`, `push_to_hub`, `snapshot_download`,
`hf_hub_download`, `model_info` and `repo_exists` of huggingface_hub ask for. Large files go over Git LFS, so a client
needs HF_HUB_DISABLE_XET=1. A private repository is not found without a token. Every commit is kept. Not there: pull
requests, users and permissions, spaces.

`hub.faults[endpoint] = Fault(...)` makes an endpoint fail, by the name of its method below: always, or a few times.
"""

import base64
import hashlib
import json
import math
import os
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".png", ".jpg", ".zip", ".gz", ".parquet")
LFS_SIZE = 10 * 1024 * 1024
TOKEN = "hf_canaryCANARYcanary"  # of the tests, to be found nowhere
MODEL = {  # the files of a model of ours
    *("model_index.json", "pipeline.py", "unet/config.json", "unet/unet_ddpm_paper.py"),
    *("scheduler/scheduler_config.json", "scheduler/scheduling_ddpm_paper.py"),
    "unet/diffusion_pytorch_model.safetensors",
}
NOW = "2026-01-01T00:00:00.000Z"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class ApiError(Exception):
    def __init__(self, status, code, message):
        self.status, self.code, self.message = status, code, message


class Fault(NamedTuple):
    """How an endpoint fails: with a status, a connection that is reset, or one that is never answered.

    The token that came with the request is repeated after its message, as a careless server might.
    """

    kind: int | Literal["reset", "stall"]
    times: float = math.inf
    message: str = "as the test wants it"
    retry_after: str | None = None
    ratelimit: str | None = None


class Repo:
    def __init__(self, repo_id, private=False):
        self.repo_id, self.private = repo_id, private
        self.commits, self.refs, self.messages = {}, {}, []
        self.commit({}, "initial commit", "main")

    def commit(self, files, message, branch):
        """files: {path: (kind, oid, data, size)} with kind 'regular' or 'lfs'."""
        seed = f"{self.repo_id}|{branch}|{message}|{time.time_ns()}|{sorted((p, f[1]) for p, f in files.items())}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        self.messages.append((oid, message))
        return oid

    def resolve(self, rev):
        oid = self.refs.get(rev, rev)
        if oid not in self.commits:
            raise ApiError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return oid, self.commits[oid]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client to acknowledge its head
    hub: "LocalHub"

    # ---- plumbing -------------------------------------------------------------------------------------------
    def log_message(self, *a):
        pass

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status=200, data=b"", ctype="application/json", **headers):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        self.send_header("Content-Type", ctype)
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), str(v))
        if not any(k.lower() == "content_length" for k in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self):
        raw = self.body()
        parts = urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(parts.query).items()}
        try:
            if status := next((s for part, s in self.hub.failing.items() if part in self.path), None):
                raise ApiError(status, "Failing", "as the test wants it")
            for method, pattern, fn in ROUTES:
                m = re.fullmatch(pattern, parts.path)
                if m and self.command in method:
                    if fault := self.hub.next_fault(fn.__name__):
                        return self.fail(fault)
                    with self.hub.lock:
                        return fn(self, raw, **{k: unquote(v) if v else v for k, v in m.groupdict().items()})
            raise ApiError(404, "NotImplemented", f"LocalHub has no route for {self.command} {self.path}")
        except ApiError as e:
            self.reply(e.status, {"error": e.message}, X_Error_Code=e.code, X_Error_Message=e.message)

    def fail(self, fault):
        if fault.kind == "stall":
            self.hub.stopped.wait()
        if isinstance(fault.kind, str):
            # with nothing left to wait for, closing sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        message = f"{fault.message}: {self.headers.get('Authorization')}"
        in_head = "".join(c for c in message if c.isprintable())
        headers = {"X_Error_Message": in_head, "X_HF_Warning": f"test; {in_head}"}
        headers |= {"Retry_After": fault.retry_after, "RateLimit": fault.ratelimit}
        headers = {name: value for name, value in headers.items() if value is not None}
        self.reply(fault.kind, {"error": message, "url": f"{self.hub.url}/tester/x"}, **headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def repo(self, repo_id):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise ApiError(404, "RepoNotFound", "Repository not found")
        return repo

    # ---- API ------------------------------------------------------------------------------------------------
    def whoami(self, raw):
        if not self.headers.get("Authorization"):
            raise ApiError(401, "Unauthorized", "Invalid credentials")
        self.reply(
            200,
            {
                "type": "user",
                "name": self.hub.user,
                "fullname": self.hub.user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
            },
        )

    def create_repo(self, raw):
        if not self.headers.get("Authorization"):
            raise ApiError(401, "Unauthorized", "Invalid username or password.")
        p = json.loads(raw)
        repo_id = f"{p.get('organization') or self.hub.user}/{p['name']}"
        if repo_id in self.hub.repos:
            return self.reply(
                409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
            )
        self.hub.repos[repo_id] = Repo(repo_id, p.get("visibility") == "private")
        self.reply(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0" * 24})

    def delete_repo(self, raw):
        p = json.loads(raw)
        self.repo(repo_id := f"{p.get('organization') or self.hub.user}/{p['name']}")
        del self.hub.repos[repo_id]
        self.reply(200, {})

    def create_branch(self, raw, repo, branch):
        r = self.repo(repo)
        if branch in r.refs:
            raise ApiError(409, "Conflict", f"Reference already exists: {branch}")
        r.refs[branch] = r.resolve("main")[0]
        self.reply(200, {})

    def dataset(self, raw, repo):
        private = self.hub.datasets.get(repo)
        if private is None or (private and not self.headers.get("Authorization")):
            raise ApiError(404, "RepoNotFound", "Repository not found")
        self.reply(200, {"_id": "0" * 24, "id": repo, "sha": "0" * 40, "private": private, "tags": [], "siblings": []})

    def validate_yaml(self, raw):
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, raw, repo, rev):
        _, tree = self.repo(repo).resolve(rev)
        out = []
        for f in json.loads(raw)["files"]:
            lfs = f["path"].endswith(LFS_SUFFIXES) or f["size"] >= LFS_SIZE
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": tree[f["path"]][1] if f["path"] in tree else None,
                }
            )
        self.reply(200, {"files": out})

    def lfs_batch(self, raw, repo):
        self.repo(repo)
        objs = []
        for o in json.loads(raw)["objects"]:
            item = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{o['oid']}", "header": {}}}
            objs.append(item)
        self.reply(200, {"transfer": "basic", "objects": objs}, ctype="application/vnd.git-lfs+json")

    def lfs_put(self, raw, oid):
        if hashlib.sha256(raw).hexdigest() != oid:
            raise ApiError(400, "BadDigest", "sha256 mismatch")
        self.hub.blobs[oid] = raw
        self.reply(200, b"")

    def commit(self, raw, repo, rev):
        r = self.repo(repo)
        _, tree = r.resolve(rev)
        tree, header = dict(tree), {}
        for line in filter(None, raw.split(b"\n")):
            item = json.loads(line)
            v = item["value"]
            if item["key"] == "header":
                header = v
            elif item["key"] == "file":
                data = base64.b64decode(v["content"])
                tree[v["path"]] = ("regular", git_oid(data), data, len(data))
            elif item["key"] == "lfsFile":
                if v["oid"] in self.hub.blobs:
                    tree[v["path"]] = ("lfs", v["oid"], self.hub.blobs[v["oid"]], len(self.hub.blobs[v["oid"]]))
                else:
                    raise ApiError(400, "BadRequest", f"lfs object {v['oid']} was never uploaded")
            elif item["key"] == "deletedFile":
                tree.pop(v["path"], None)
            elif item["key"] == "deletedFolder":
                tree = {p: f for p, f in tree.items() if not p.startswith(v["path"].rstrip("/") + "/")}
        oid = r.commit(tree, header.get("summary", ""), rev)
        self.reply(
            200,
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""},
        )

    def info(self, raw, repo, rev=None):
        r = self.repo(repo)
        oid, tree = r.resolve(rev or "main")
        card = (tree.get("README.md", (0, 0, b""))[2] or b"").decode()
        lib = re.search(r"^library_name:\s*(\S+)", card, re.M)
        self.reply(
            200,
            {
                "_id": "0" * 24,
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": oid,
                "private": r.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": NOW,
                "createdAt": NOW,
                "library_name": lib and lib.group(1),
                "siblings": [{"rfilename": p} for p in sorted(tree)],
            },
        )

    def tree(self, raw, repo, rev, path=None):
        _, tree = self.repo(repo).resolve(rev)
        prefix = f"{path}/" if path else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        out, dirs = [], set()
        for p, (kind, oid, _data, size) in sorted(tree.items()):
            if not p.startswith(prefix):
                continue
            rest = p[len(prefix) :].split("/")
            for i in range(1, len(rest) if recursive else min(len(rest), 2)):
                d = prefix + "/".join(rest[:i])
                if d not in dirs:
                    dirs.add(d)
                    out.append(
                        {"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d}
                    )
            if recursive or len(rest) == 1:
                e = {"type": "file", "oid": oid, "size": size, "path": p}
                if kind != "regular":
                    e.update(oid=git_oid(oid.encode()), lfs={"oid": oid, "size": size, "pointerSize": 134})
                out.append(e)
        self.reply(200, out)

    def resolve(self, raw, repo, rev, path):
        oid, tree = self.repo(repo).resolve(rev)
        if path not in tree:
            return self.reply(
                404,
                {"error": "Entry not found"},
                X_Error_Code="EntryNotFound",
                X_Error_Message="Entry not found",
                X_Repo_Commit=oid,
            )
        kind, etag, data, size = tree[path]
        h = {"X_Repo_Commit": oid, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if kind != "regular":
            h.update(X_Linked_Etag=f'"{etag}"', X_Linked_Size=size)
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if m and self.command == "GET":
            lo, hi = int(m[1]), int(m[2] or len(data) - 1)
            h["Content_Range"] = f"bytes {lo}-{min(hi, len(data) - 1)}/{len(data)}"
            return self.reply(206, data[lo : hi + 1], "application/octet-stream", **h)
        self.reply(200, data, "application/octet-stream", **h)


R = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("DELETE", "/api/repos/delete", Handler.delete_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{R}/preupload/(?P<rev>[^/]+)", Handler.preupload),
    ("POST", rf"/{R}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", rf"/api/models/{R}/commit/(?P<rev>[^/]+)", Handler.commit),
    ("GET", rf"/api/models/{R}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"/api/models/{R}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    ("GET", rf"/api/datasets/{R}", Handler.dataset),
    ("GET", rf"/api/models/{R}(?:/revision/(?P<rev>[^/]+))?", Handler.info),
    ("GET HEAD", rf"/{R}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve),
]


class LocalHub:
    """`repos` by id; `datasets`: whether private, by id; `failing`: {part of a path: its status}; `faults` by
    endpoint; `failed`: the endpoints that did, in order."""

    def __init__(self, user="tester"):
        self.user, self.lock = user, threading.RLock()
        self.forget()
        self.stopped = threading.Event()
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"hub": self}))
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def forget(self) -> None:
        """Begin anew, without repositories and faults."""
        self.datasets, self.failing = {}, {}
        self.repos, self.blobs, self.log = {}, {}, []
        self.faults: dict[str, Fault] = {}
        self.failed: list[str] = []

    def client(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process that is a client of this Hub, with its caches and login in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, **ours, **({} if token is None else {"HF_TOKEN": token})}

    def next_fault(self, endpoint: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            fault = self.faults.get(endpoint)
            if fault is None or fault.times < 1:
                return None
            self.faults[endpoint] = fault._replace(times=fault.times - 1)
            self.failed.append(endpoint)
            return fault

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository, by path."""
        return {path: file[2] for path, file in self.repos[repo_id].resolve(revision)[1].items()}

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.stopped.set()
        self.httpd.shutdown()
        self.httpd.server_close()
