"""The backup repository of a site: restic, on the controller or wherever rclone on the controller reaches.

Nodes hold nothing of it. For as long as an operation takes, the controller lends it to them: an append-only server on
its loopback, which a node sees as a socket that only its root may open. The password goes by standard input.

    repository = Repository(site, secrets)
    with repository.lent(remote) as lent:
        lent.run("mail1", "restic backup --json /srv/store/s01/snapshot")
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets as random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posthouse import PosthouseError
from posthouse.model import Site
from posthouse.remote import Remote
from posthouse.secrets import Secrets

# restic and rclone, with the packages that hold them.
PROGRAMS = {"restic": "restic", "rclone": "rclone"}
# Nodes keep what restic already knows of the repository here; without it each backup asks for all of it again.
CACHE = "/var/cache/posthouse-restic"
LONGEST = 24 * 3600  # s; a first backup of a large store
# By site, where its repository is: one that is not there then was lost, or its disk is not mounted.
NOTES = Path("/var/lib/posthouse/repositories")


class BackupError(PosthouseError):
    """A backup or restore that cannot be; the message says where, what, and what to do."""


class Shut(BackupError):
    """A repository that cannot be looked into: another password, or somebody's lock. That says nothing of damage."""


class Repository:
    """The repository, as its owner sees it."""

    def __init__(self, site: Site, secrets: Secrets) -> None:
        self.site = site
        self.place: str = site.backup.place(site.name)
        self._password = secrets.password("backup_repository")
        missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
        if missing:
            raise BackupError(f"this machine lacks {' and '.join(missing)}; run: posthouse doctor --fix")

    def exists(self) -> bool:
        """Whether there is a repository. That its password is ours shows when it is used. Raises BackupError."""
        if self.place.startswith("/"):
            if (Path(self.place) / "config").is_file():
                return True
            if (Path(self.place) / "keys").is_dir():
                raise BackupError(f"{self.place}: damaged: its file config is gone; put it back from a copy")
            return False
        try:
            self.restic("cat", "--no-lock", "config")
        except BackupError as error:
            if "Is there a repository" in str(error):
                return False
            raise
        return True

    def may_begin(self) -> None:
        """Raises BackupError if the site's repository was here before: an empty one must not take its place unseen.

        Also where no folder can be made.
        """
        if self.place.startswith("/"):
            try:
                there = next(path for path in (Path(self.place), *Path(self.place).parents) if path.exists())
            except OSError as error:
                raise self._no_folder(f"{error.filename}: {error.strerror}") from None
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise self._no_folder(f"{there} is no folder that can be written to")
        if self._note.is_file() and self._note.read_text().strip() == self.place:
            raise BackupError(
                f"{self.place}: the site's backups were here, and nothing is here now; mount the disk that they are "
                f"on, or put them back from a copy; if they are lost for good: rm {self._note}; nothing was changed"
            )

    def begin(self) -> None:
        """Makes the repository."""
        if self.place.startswith("/"):
            try:
                Path(self.place).mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise self._no_folder(f"{error.filename}: {error.strerror}") from None
        self.restic("init")

    def _no_folder(self, why: str) -> BackupError:
        return BackupError(
            f"{self.place}: no folder can be made there: {why}; correct backup.repository, or mount its disk; nothing "
            "was changed"
        )

    def note(self) -> None:
        """Keeps in mind where the repository is; see `may_begin`."""
        self._note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._note.write_text(f"{self.place}\n")

    @property
    def _note(self) -> Path:
        return NOTES / self.site.name

    def require(self) -> None:
        """Raises BackupError unless the repository is there and opens."""
        if not self.exists():
            raise BackupError(
                f"{self.place}: no backup repository there; mount the disk it is on, or correct backup.repository, "
                f"or make the first one: posthouse backup {self.site.name}"
            )

    def damage(self, quick: bool = True) -> list[str]:
        """What restic finds damaged, a line each. quick: whether all files are there and fit together; else every byte.

        Whoever asks holds the site's lock: what others add meanwhile would look like damage. restic's own lock is not
        asked for, for one that was left by a command that was killed would stand in the way. Raises Shut.
        """
        done = self._done("check", "--no-lock", *([] if quick else ["--read-data"]))
        complaint = done.stderr.strip() or done.stdout.strip() or "restic failed without a word"
        error = _error(self.site.name, self.place, complaint)
        if done.returncode and isinstance(error, Shut):
            raise error
        return [line.strip() for line in complaint.splitlines() if line.strip()] if done.returncode else []

    def need_intact(self) -> None:
        """Raises BackupError if the repository is damaged as far as `damage` sees at a glance."""
        if damage := self.damage():
            raise BackupError(
                f"{self.place}: damaged: {damage[0]}; put it back from a copy, or name another place for new backups "
                "in backup.repository; nothing was changed"
            )

    def restic(self, *arguments: str, text: str | None = None) -> str:
        """What restic prints, run on the controller with all rights. Raises BackupError with what it complained of."""
        done = self._done(*arguments, text=text)
        if done.returncode:
            raise _error(self.site.name, self.place, done.stderr.strip() or done.stdout.strip())
        return done.stdout

    def _done(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["restic", "--no-cache", *arguments],
            env=os.environ | {"RESTIC_REPOSITORY": self.place, "RESTIC_PASSWORD": self._password},
            input=text or "",
            capture_output=True,
            text=True,
            check=False,
        )

    def dump(self, snapshot: str, path: str) -> bytes:
        """One file out of a snapshot."""
        environment = os.environ | {"RESTIC_REPOSITORY": self.place, "RESTIC_PASSWORD": self._password}
        done = subprocess.run(
            ["restic", "--no-cache", "dump", "--no-lock", snapshot, path],
            env=environment,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise _error(self.site.name, self.place, done.stderr.decode(errors="replace").strip())
        return done.stdout

    def snapshots(self) -> list[dict[str, Any]]:
        """The site's snapshots, oldest first: [{"id", "run", "part", "time", "paths"}]."""
        found = []
        for item in json.loads(self.restic("snapshots", "--no-lock", "--json", "--host", self.site.name)) or []:
            tags = dict(tag.partition("=")[::2] for tag in item.get("tags") or ())
            if "run" in tags:
                place = {"id": item["id"], "time": item["time"], "paths": item["paths"]}
                found.append(place | {"run": tags["run"], "part": tags["part"]})
        return sorted(found, key=lambda item: (item["run"], item["part"]))

    @contextlib.contextmanager
    def lent(self, remote: Remote) -> Iterator[Lent]:
        """Lends the repository to nodes for a while: they can read and add, and not remove."""
        self.restic("unlock")  # what a command of ours that was killed has left
        port, password = _free_port(), random.token_urlsafe(24)
        served = self.place.removeprefix("rclone:")
        server = subprocess.Popen(
            [
                *("rclone", "serve", "restic", "--append-only", "--cache-objects=false"),
                *("--config", _rclone_config(), "--addr", f"127.0.0.1:{port}", served),
            ],
            env=os.environ | {"RCLONE_USER": "node", "RCLONE_PASS": password},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lent = Lent(remote, port, self._password, password)
        try:
            _until_open(port, server)
            yield lent
        finally:
            lent.close()
            end(server)


class Lent:
    """A repository that nodes may use for now. Threads may share it."""

    def __init__(self, remote: Remote, port: int, password: str, server_password: str) -> None:
        self._remote, self._port = remote, port
        self._environment = {
            "RESTIC_PASSWORD": password,
            "RESTIC_REST_USERNAME": "node",
            "RESTIC_REST_PASSWORD": server_password,
            "RESTIC_CACHE_DIR": CACHE,
        }
        self._links: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Takes it back from all nodes."""
        for link, _ in self._links.values():
            end(link)

    def _connected(self, node: str) -> str:
        """The socket on a node that leads to us, made if there is none or it was lost."""
        with self._lock:
            if node not in self._links or self._links[node][0].poll() is not None:
                self._links[node] = self._connect(node)
            return self._links[node][1]

    def _connect(self, node: str) -> tuple[subprocess.Popen[bytes], str]:
        """Brings the controller's port to a node, as a socket."""
        place = f"/run/posthouse-backup-{random.token_hex(6)}"
        # A connection of its own: one shared with others would keep the socket open after we are done.
        link = subprocess.Popen(
            [
                *("ssh", "-F", self._remote.config, "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"),
                *("-o", "StreamLocalBindMask=0177", "-R", f"{place}:127.0.0.1:{self._port}", node),
                # Ends, and takes the socket away, when we close its input, however we end.
                f"echo ready; cat >/dev/null; rm -f {place}; echo closed",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert link.stdout is not None and link.stderr is not None
        if link.stdout.readline() != b"ready\n":
            complaint = link.stderr.read().decode(errors="replace").strip()
            raise BackupError(f"{node}: the repository cannot be lent to it: {complaint}; see that its ssh works")
        return link, place

    def run(self, node: str, script: str, timeout: float = LONGEST) -> str:
        """What a shell script prints on a node, in which `restic` is the repository's. Raises RemoteError."""
        values = self._environment | {"RESTIC_REPOSITORY": f"rest:http+unix://{self._connected(node)}:/"}
        lines = [f"export {name}='{value}'" for name, value in values.items()]
        return self._remote.run(node, "bash -euo pipefail -s", "\n".join([*lines, script, ""]), timeout)


def summary(part: str, printed: str) -> dict[str, Any]:
    """The last line of `restic backup --json`, about the snapshot it made of a part."""
    for line in reversed(printed.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            item = json.loads(line)
            if isinstance(item, dict) and item.get("message_type") == "summary":
                return item
    raise BackupError(f"{part}: restic did not say what it backed up; run the command again")


def _error(site: str, place: str, complaint: str) -> BackupError:
    """restic's complaint as one sentence with what to do."""
    if "wrong password" in complaint or "no key found" in complaint:
        return Shut(
            f"{place}: the password in the site's secrets (backup_repository) does not open it; put back the secrets "
            "that it was made with"
        )
    line = " / ".join(part.strip() for part in complaint.splitlines() if part.strip())
    if "already locked" in complaint:
        return Shut(f"{place}: {line}; wait for whoever that is; if nobody is: restic -r {place} unlock --remove-all")
    return BackupError(
        f"{place}: {line or 'restic failed without a word'}; see what is damaged with: posthouse backup check {site}"
    )


def _rclone_config() -> str:
    """rclone's own configuration, where the operator may have named remotes."""
    return os.environ.get("RCLONE_CONFIG", str(Path.home() / ".config/rclone/rclone.conf"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _until_open(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise BackupError(
        "rclone: does not serve the repository on this machine's loopback; try: rclone serve restic --help"
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that we started, of its own accord where closing its input makes it go."""
    if process.stdin:
        process.stdin.close()
        if process.stdout:
            # What it does last on its node is done then. It itself may wait for connections that we still hold.
            process.stdout.readline()
    process.terminate()
    process.wait()
