"""As much of the Hugging Face Hub's protocol as `datasets` needs to list a data set and download its files."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import PurePosixPath


def entry(path, content):
    oid, size = hashlib.sha256(content).hexdigest(), len(content)
    lfs = {"oid": oid, "size": size, "pointerSize": 134}
    return {"type": "file", "path": path, "size": size, "oid": oid[:40], "lfs": lfs}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(self.path.split("?")[0])
        hub.requests.append((self.command, path))
        files = f"/datasets/{hub.repo}/resolve/{hub.revision}/"
        listing = f"/api/datasets/{hub.repo}/tree/{hub.revision}"
        if path == f"/api/datasets/{hub.repo}/revision/{hub.revision}":
            self.answer(json.dumps({"id": hub.repo, "sha": hub.revision}).encode())
        elif path.startswith(listing):
            self.answer(json.dumps(self.tree(path.removeprefix(listing).strip("/"))).encode())
        elif path.removeprefix(files) in hub.files:
            content = hub.files[path.removeprefix(files)]
            self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": hub.revision})
        else:
            self.answer(b"", {"X-Error-Code": "EntryNotFound"}, status=404)

    do_HEAD = do_GET

    def tree(self, directory):
        """The files and directories right below a directory."""
        inside = [path for path in map(PurePosixPath, self.server.files) if PurePosixPath(directory) in path.parents]
        depth = len(PurePosixPath(directory).parts) + 1
        names = sorted({"/".join(path.parts[:depth]) for path in inside})
        contents = {name: self.server.files.get(name) for name in names}
        return [
            {"type": "directory", "path": n, "oid": "0" * 40} if c is None else entry(n, c) for n, c in contents.items()
        ]

    def answer(self, content, headers=None, status=200):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: self.server.sent] if len(content) > 1000 else content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(repo, revision, files):
    """Serve one data set on 127.0.0.1; yields the server, whose `url` is the HF_ENDPOINT to use."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repo, server.revision, server.files, server.requests = repo, revision, files, []
    server.sent = None  # bytes of a large file after which the connection breaks off
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
