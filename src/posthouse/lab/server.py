"""The process behind `updates`: a plain web server, and a proxy that fetches from the machine's Debian mirror only.

Its listeners are handed to it, from inside the lab's network; its own connections leave from the machine's. It needs
nothing but the standard library and is run by its path, so that it starts at once.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import http.server
import json
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request


class Files(http.server.SimpleHTTPRequestHandler):
    """Files of a folder."""

    protocol_version = "HTTP/1.1"


class Mirror(http.server.BaseHTTPRequestHandler):
    """A proxy to the mirrors it is given, and to nothing else: {URI as a node says it: URI to fetch from}."""

    protocol_version = "HTTP/1.1"

    def __init__(self, mirrors: dict[str, str], opener: urllib.request.OpenerDirector, *args: object) -> None:
        self.mirrors, self.opener = mirrors, opener
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        known = next((known for known in self.mirrors if self.path.startswith(f"{known}/")), None)
        if not known or "/../" in urllib.parse.unquote(self.path):
            self.send_error(403, "Only the Debian mirror of the lab's machine can be reached")
            return
        kept = {name: self.headers[name] for name in ("If-Modified-Since", "Range", "If-Range") if name in self.headers}
        request = urllib.request.Request(self.mirrors[known] + self.path.removeprefix(known), headers=kept)
        try:
            with self.opener.open(request, timeout=60) as answer:
                self._pass_on(answer.status, answer)
        except urllib.error.HTTPError as answer:
            with answer:
                self._pass_on(answer.code, answer)
        except (OSError, http.client.HTTPException) as error:
            self.send_error(502, "The mirror does not answer", str(error))

    def _pass_on(self, status: int, answer: http.client.HTTPResponse | urllib.error.HTTPError) -> None:
        self.send_response(status)
        for name in ("Content-Type", "Content-Length", "Content-Range", "Last-Modified", "Accept-Ranges"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        if "Content-Length" not in answer.headers and status != http.HTTPStatus.NOT_MODIFIED:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        shutil.copyfileobj(answer, self.wfile, 1 << 18)


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what the web server serves")
    parser.add_argument("mirrors", type=json.loads, help="what the proxy may fetch: {URI as asked: URI to fetch}")
    parser.add_argument("proxies", type=json.loads, help="through which proxies it must go: {scheme: URI}")
    parser.add_argument("web", type=int, help="descriptor of the web server's listener")
    parser.add_argument("proxy", type=int, help="descriptor of the proxy's listener")
    given = parser.parse_args()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(given.proxies))
    for descriptor, handler in (
        (given.web, functools.partial(Files, directory=given.folder)),
        (given.proxy, functools.partial(Mirror, given.mirrors, opener)),
    ):
        listener = socket.socket(fileno=descriptor)
        server = http.server.ThreadingHTTPServer(listener.getsockname(), handler, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
