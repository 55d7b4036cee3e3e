"""A stand-in of the Hugging Face hub for tests: what huggingface_hub asks when it uploads.

Small files travel in the commit, safetensors by git-lfs. The owner of the one token is `owner`, and
`taken/there` is another's.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_owner"


class Hub(ThreadingHTTPServer):
    """While open it answers at `url`. repositories: {id: {path: content}}. private: their ids.

    requests: the paths that were asked. fails: the part of a path that gets a 500.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.private, self.large = {"taken/there": {}}, set(), {}
        self.requests, self.fails = [], None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def whoami(self, _, _body):
        return 200, {"type": "user", "name": "owner", "orgs": []}

    def create(self, _, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        address = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if not repo_id.startswith("owner/"):
            return 403, {"error": "You don't have the rights to create a model there"}
        if repo_id in self.repositories:
            return 409, {"error": "You already created this model repo", **address}
        self.repositories[repo_id] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo_id)
        return 200, address

    def info(self, found, _):
        return (200 if found[1] in self.repositories else 404), {"id": found[1], "sha": "0" * 40}

    def may_write(self, found, _):
        return (200 if found[1].startswith("owner/") else 403), {}

    def validate(self, _, _body):
        return 200, {"errors": [], "warnings": []}

    def preupload(self, _, body):
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return 200, {"files": files}

    def batch(self, _, body):
        objects = []
        for one in json.loads(body)["objects"]:
            action = {"href": f"{self.url}/large/{one['oid']}"}
            objects.append({**one, "actions": {"upload": action}})
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, found, body):
        assert hashlib.sha256(body).hexdigest() == found[1]
        self.large[found[1]] = body
        return 200, {}

    def commit(self, found, body):
        files = self.repositories[found[1]]
        for line in body.decode().splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        commit = {"success": True, "commitOid": "0" * 40}
        return 200, {**commit, "commitUrl": f"{self.url}/{found[1]}/commit/0"}


ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", Hub.preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", Hub.commit),
    ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write", Hub.may_write),
    ("GET", r"/api/models/([^/]+/[^/]+)", Hub.info),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/large/(.+)", Hub.put),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.body()
        hub.requests.append(path)
        if not path.startswith("/large/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
            return
        if hub.fails and hub.fails in path:
            self.reply(500, {"error": "the stand-in fails here"})
            return
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                self.reply(*act(hub, found, body))
                return
        self.reply(404, {"error": f"the stand-in has no {self.command} {path}"})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass
