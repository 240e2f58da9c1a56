"""A service that finds telephone numbers in text: a stand-in for a knowledge base or a judge.

python examples/facts_service.py [PORT]

It answers ``POST /`` with the body ``{"texts": [[byte, ...], ...]}`` by ``{"flags": [[0 or 1, ...], ...]}``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NUMBER = re.compile(rb"\d{3}-\d{4}")


class Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        body = json.dumps({"flags": [flags(bytes(text)) for text in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of every request."""


def flags(text: bytes) -> list[int]:
    found = [0] * len(text)
    for match in NUMBER.finditer(text):
        found[match.start() : match.end()] = [1] * (match.end() - match.start())
    return found


def port(text: str) -> int:
    if not text.isdecimal() or not 0 <= (value := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"a number from 0 to 65535 is expected, not {text!r}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=port, nargs="?", default=0, help="by default any that is free")
    options = parser.parse_args()
    try:
        server = ThreadingHTTPServer(("127.0.0.1", options.port), Service)
    except OSError as error:
        raise SystemExit(f"port {options.port}: {error.strerror}") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"listening on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
