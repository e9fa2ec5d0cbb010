"""LMTP as the gate needs it: lines, replies and messages, passed on as they are."""

import asyncio
import re

PIECE = 65536


class Gone(Exception):
    """The other side closed the connection, or sent what is not LMTP."""


class Reply:
    """A server's reply: its lines as they came, and their code."""

    def __init__(self, lines):
        self.lines = lines
        self.code = int(lines[-1][:3])

    def __bytes__(self):
        return b"".join(self.lines)

    @classmethod
    def of(cls, text):
        """A reply of one line: Reply.of("250 2.0.0 ok")."""
        return cls([text.encode() + b"\r\n"])

    @property
    def good(self):
        """Whether it says yes."""
        return 200 <= self.code < 300


async def read_line(reader):
    """One line with its end. Raises Gone."""
    try:
        line = await reader.readline()
    except (ValueError, OSError) as error:
        raise Gone(str(error)) from None
    if not line.endswith(b"\n"):
        raise Gone("the connection was closed")
    return line


async def read_reply(reader):
    """One reply, of however many lines. Raises Gone."""
    lines = []
    while True:
        line = await read_line(reader)
        if not re.match(rb"\d\d\d[ -]", line):
            raise Gone(f"not a reply: {line[:80]!r}")
        lines.append(line)
        if line[3:4] == b" ":
            return Reply(lines)


async def pass_message(reader, writer):
    """Passes on what follows DATA, the dot that ends it included, octet by octet. Raises Gone."""
    block, at_start = bytearray(), True
    while True:
        try:
            # Never further than the end: what comes behind it is the next command.
            piece = await reader.readuntil(b"\r\n")
        except asyncio.LimitOverrunError as error:
            piece = await reader.readexactly(error.consumed)
        except (asyncio.IncompleteReadError, OSError):
            raise Gone("the connection was closed within a message") from None
        block += piece
        over = at_start and piece == b".\r\n"
        at_start = piece.endswith(b"\r\n")
        if over or len(block) >= PIECE:
            writer.write(bytes(block))
            block.clear()
            await writer.drain()
        if over:
            return
