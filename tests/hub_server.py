"""As much of the Hugging Face Hub's protocol as its libraries need to list a data set, and to download files."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import PurePosixPath


def entry(path, content, wrong, xet):
    oid, size = hashlib.sha256(b"other" if wrong else content).hexdigest(), len(content)
    lfs = {"oid": oid, "size": size, "pointerSize": 134}
    listed = {"type": "file", "path": path, "size": size, "oid": oid[:40], "lfs": lfs}
    return listed | {"xetHash": oid[::-1]} if xet else listed


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(self.path.split("?")[0])
        hub.requests.append((self.command, path))
        path = path.replace(f"/{hub.commit}", f"/{hub.revision}")  # a branch's commit is the same as the branch
        api = f"/api/{hub.repo}" if hub.repo.startswith("datasets/") else f"/api/models/{hub.repo}"
        files = f"/{hub.repo}/resolve/{hub.revision}/"
        listing = f"{api}/tree/{hub.revision}"
        if path.removeprefix(files) in hub.broken:
            self.answer(b"", status=500)
        elif path == f"{api}/revision/{hub.revision}":
            self.answer(json.dumps({"id": hub.repo.removeprefix("datasets/"), "sha": hub.commit}).encode())
        elif path.startswith(listing):
            self.answer(json.dumps(self.tree(path.removeprefix(listing).strip("/"))).encode())
        elif path.removeprefix(files) in hub.files:
            name = path.removeprefix(files)
            digest = hashlib.sha256(b"other" if name in hub.wrong else hub.files[name]).hexdigest()
            damaged = name in hub.damaged or (self.command == "GET" and name in hub.damaged_once)
            content = bytes(len(hub.files[name])) if damaged else hub.files[name]
            hub.damaged_once -= {name} if damaged else set()
            self.answer(content, {"ETag": f'"{digest}"', "X-Repo-Commit": hub.commit})
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
            {"type": "directory", "path": name, "oid": "0" * 40}
            if content is None
            else entry(name, content, name in self.server.wrong, self.server.xet)
            for name, content in contents.items()
        ]

    def answer(self, content, headers=None, status=200):
        headers, size = headers or {}, len(content)
        if missing := self.headers.get("Range"):  # "bytes=1000-": what a download that broke off lacks
            start = int(missing.removeprefix("bytes=").split("-")[0])
            content, status = content[start:], 206
            headers = headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if size > 1000:
                self.server.stalls.wait(60)
            breaks = size > 1000 and self.server.breaks > 0
            self.server.breaks -= breaks
            self.wfile.write(content[:1000] if breaks else content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(repo, revision, files):
    """Serve a repository, as `datasets/owner/name` or `name`, on 127.0.0.1; its `url` is the HF_ENDPOINT to use."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repo, server.revision, server.files, server.requests = repo, revision, files, []
    server.commit = revision if len(revision) == 40 else "0" * 40
    server.xet = False  # whether the files are listed as in the Hub's newer storage, which this server is not
    server.breaks = 0  # how many answers of over 1,000 bytes break off after those
    server.stalls = threading.Event()  # answers of over 1,000 bytes wait for it
    server.stalls.set()
    server.broken = set()  # files for which the answer is an error of the server
    server.wrong = set()  # files that are listed with a hash which is not theirs
    server.damaged = set()  # files that arrive as zeros, though listed as they are
    server.damaged_once = set()  # the same, but only the first time
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
