"""A loopback server with the part of the hub's protocol that a client needs to download files."""

import hashlib
import http.server
import re
import time

from tests.loopback import Loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(Loopback):
    """A server for files that records (method, status) of every request in `asked`.

    Args:
        files: their bytes by (repository, name).
        sends: bytes to send instead of those announced, by the same keys.
        cut_after: number of bytes after which each answer stops.
        delay: seconds before each answer.
    """

    def __init__(self, files, *, sends=None, cut_after=None, delay=0):
        self.asked, sends = [], sends or {}

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(handler, with_body):
                time.sleep(delay)
                found = re.fullmatch(r"/(.+)/resolve/main/([^?]+)(\?.*)?", handler.path)
                content = files.get(found.groups()[:2]) if found else None
                span = handler.headers.get("Range")
                status = 404 if content is None else 206 if span else 200
                self.asked.append((handler.command, status))
                if content is None:
                    known = found and found[1] in {repository for repository, _ in files}
                    handler.send_response(status)
                    handler.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    handler.send_header("Content-Length", "0")
                    handler.end_headers()
                    return
                etag = hashlib.sha256(content).hexdigest()
                body = sends.get(found.groups()[:2], content)
                start = int(re.fullmatch(r"bytes=(\d+)-.*", span)[1]) if span else 0
                handler.send_response(status)
                handler.send_header("ETag", f'"{etag}"')
                handler.send_header("X-Repo-Commit", COMMIT)
                handler.send_header("Accept-Ranges", "bytes")
                handler.send_header("Content-Length", str(len(body) - start))
                if span:
                    handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                handler.end_headers()
                if with_body:
                    handler.wfile.write(body[start:][:cut_after])
                    handler.close_connection = cut_after is not None

            def do_HEAD(handler):
                handler.answer(with_body=False)

            def do_GET(handler):
                handler.answer(with_body=True)

            def log_message(handler, *_args):
                pass

        super().__init__(Handler)

    def statuses(self, method):
        return [status for asked, status in self.asked if asked == method]
