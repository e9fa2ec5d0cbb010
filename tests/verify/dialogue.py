"""Talks to a service from the node itself, as the balancer would: a PROXY header, TLS, then one line after another."""

from __future__ import annotations

import json
import shlex
from typing import Any

# Runs on the node with nothing but Python's own library. An answer ends as SMTP, IMAP, POP3 and ManageSieve end theirs.
PROGRAM = r"""
import json, re, socket, ssl, sys
address, port, tls, proxy, lines = json.loads(sys.argv[1])
end = re.compile(rb"(\d\d\d |\+OK|-ERR|\* OK|\w+ (OK|NO|BAD)\b|(OK|NO|BYE)\b)")
plain = socket.create_connection((address, port), 60)
if proxy:
    plain.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 40000 %d\r\n" % port)
unchecked = ssl._create_unverified_context()
stream = unchecked.wrap_socket(plain) if tls else plain
answers = []
for line in [None, *lines]:
    if line is not None:
        stream.sendall(line.encode() + b"\r\n")
    got = b""
    for piece in iter(lambda: stream.recv(1), b""):
        got += piece
        if piece == b"\n" and end.match(got.splitlines()[-1]):
            break
    answers.append(got.decode())
    if line == "STARTTLS":
        stream = unchecked.wrap_socket(plain)
print(json.dumps(answers))
"""


def talk(
    host: Any, port: int, *lines: str, address: str = "127.0.0.1", tls: bool = False, proxy: bool = True
) -> list[str]:
    """The greeting and the answer to each line. With `proxy`, the client is 192.0.2.1, a documentation address."""
    call = json.dumps([address, port, tls, proxy, lines])
    return json.loads(host.check_output(f"python3 -c {shlex.quote(PROGRAM)} {shlex.quote(call)}"))
