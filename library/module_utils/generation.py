"""A node's generation: compare what is with what should be, and swap from one to the other whole.

This is the half of the converge engine that runs on the node. It needs nothing but Python's standard library, because
it also runs by itself: the `converge` module copies it to /usr/lib/posthouse/generation.py and starts it as a transient
systemd unit, so that a lost connection cannot interrupt it and a killed process is rolled back by systemd at once.

    generation.py apply FILE         brings the node to the desired generation in FILE, reports in FILE's .result
    generation.py recover [--boot]   puts back the previous generation if a transaction was left unfinished
"""

import errno
import fcntl
import fnmatch
import grp
import json
import os
import pwd
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STATE = Path("/var/lib/posthouse")
CURRENT = STATE / "generation.json"  # what the last committed transaction left on the node
TRANSACTION = STATE / "transaction"  # exists only while a transaction is under way
RUN = Path("/run/posthouse")
LOCK = RUN / "converge.lock"
SYSTEM_UNITS = "/etc/systemd/system/"
BESIDE = ".posthouse-new"
READY_SECONDS = 60
# All our services have units. With SysV scripts for them, too, Debian's helper would reload systemd once for each.
ENVIRONMENT = os.environ | {"SYSTEMCTL_SKIP_SYSV": "1"}


class Failed(Exception):
    """The node could not be brought to the desired generation. `lines` are of the journal or of a validator."""

    def __init__(self, message, lines=()):
        super().__init__(message)
        self.lines = list(lines)


# --- read -----------------------------------------------------------------------------------------------------------


def run(*argv, timeout=300, env=ENVIRONMENT, **options):
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=env, check=False, **options)


def read_json(path, default):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default


def read_file(path):
    """What a path holds: {"content" or "link", "mode", "owner", "group"}, or None."""
    try:
        status = os.lstat(path)
        if Path(path).is_symlink():
            return {"link": str(Path(path).readlink())}
        access = {
            "mode": f"{status.st_mode & 0o7777:04o}",
            "owner": _user(status.st_uid),
            "group": _group(status.st_gid),
        }
        if Path(path).is_dir():
            return access
        return {"content": Path(path).read_bytes().decode("utf-8", "surrogateescape"), **access}
    except FileNotFoundError:
        return None


def _user(uid):
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid):
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def installed():
    """Names of the packages that are installed, from dpkg's own database."""
    names, name = set(), None
    for line in Path("/var/lib/dpkg/status").read_text().splitlines():
        if line.startswith("Package: "):
            name = line[9:]
        elif line == "Status: install ok installed":
            names.add(name)
    return names


def units(names):
    """systemd's view of units: {unit: {"ActiveState", "UnitFileState", "ConditionResult", …}}."""
    if not names:
        return {}
    shown = run(
        "systemctl", "show", "-p", "ActiveState,UnitFileState,ConditionResult,ConditionTimestampMonotonic", *names
    )
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.stdout.split("\n\n") if block]
    return dict(zip(names, blocks, strict=True))


def excused(state):
    """Whether systemd tried to start the unit and found that its conditions exclude this node."""
    tried = state.get("ConditionTimestampMonotonic", "0") != "0"
    return tried and state.get("ConditionResult") == "no" and state.get("ActiveState") == "inactive"


def runs(state):
    """Whether a unit does what it is there for."""
    return state.get("ActiveState") in ("active", "reloading") or excused(state)


# --- plan -----------------------------------------------------------------------------------------------------------


def compare(desired, check_health=True):
    """The steps from what is to what should be. An empty plan (see `is_empty`) means: nothing to do.

    Returns {"packages": [name], "groups": [{"user", "group", "tier"}], "directories": [path],
    "write": {path: before or None},
    "remove": {path: before}, "stop": [unit], "start": […], "restart": […], "reload": […], "enable": […],
    "unhealthy": {unit: reason}, "unfinished": bool}.
    """
    current = read_json(CURRENT, {"files": {}, "services": {}})
    have = installed()
    files = desired["files"]
    plan = {
        "packages": [name for name in desired["packages"] if name not in have],
        "groups": [entry for entry in desired["groups"] if not _member(entry["user"], entry["group"])],
        "directories": [
            path for path, want in desired["directories"].items() if _access(read_file(path)) != _access(want)
        ],
        "write": {},
        "remove": {},
        "unhealthy": {},
        "unfinished": TRANSACTION.exists(),
    }
    for path, want in files.items():
        before = read_file(path)
        if before != {key: value for key, value in want.items() if key != "tier"}:
            plan["write"][path] = before
    in_scope = [path for path, tier in current["files"].items() if desired["whole"] or tier in desired["tiers"]]
    for path in in_scope:
        if path not in files and os.path.lexists(path):
            plan["remove"][path] = read_file(path)
    _plan_services(desired, current, plan, check_health)
    return plan


def _access(found):
    return found and {key: found[key] for key in ("mode", "owner", "group") if key in found}


def _member(user, group):
    try:
        return user in grp.getgrnam(group).gr_mem or pwd.getpwnam(user).pw_gid == grp.getgrnam(group).gr_gid
    except KeyError:
        return False


def _plan_services(desired, current, plan, check_health):
    services = desired["services"]
    names = [service["unit"] for service in services]
    masked = [path[len(SYSTEM_UNITS) :] for path, want in desired["files"].items() if want.get("link") == "/dev/null"]
    gone = [
        u
        for u, tier in current["services"].items()
        if u not in names and (desired["whole"] or tier in desired["tiers"])
    ]
    states = units([*names, *gone, *masked])
    plan["stop"] = [unit for unit in [*gone, *masked] if states[unit].get("ActiveState") in ("active", "activating")]
    plan["disable"] = [unit for unit in gone if states[unit].get("UnitFileState") == "enabled"]
    changed = [*plan["write"], *plan["remove"]]
    regrouped = {entry["tier"] for entry in plan["groups"]}  # a running daemon does not notice a new group
    plan |= {"start": [], "restart": [], "reload": [], "enable": []}
    for service in services:
        unit, state = service["unit"], states[service["unit"]]
        owned = [path for path in changed if _owned(path, service["owns"])]
        hard = [path for path in changed if _owned(path, service["restart_for"])]
        if not runs(state):
            plan["start"].append(unit)
        elif hard or (owned and service["on_change"] == "restart") or service["tier"] in regrouped:
            plan["restart"].append(unit)
        elif owned:
            plan["reload"].append(unit)
        # One that is not there yet, or replaces a package's that could not be enabled, is enabled once it is in place.
        new = f"{SYSTEM_UNITS}{unit}" in plan["write"]
        if state.get("UnitFileState") == "disabled" or (new and state.get("UnitFileState") != "enabled"):
            plan["enable"].append(unit)
    if check_health:
        busy = plan["start"] + plan["restart"]
        quiet = [s for s in services if s["unit"] not in busy and not excused(states[s["unit"]])]
        plan["unhealthy"] = health(quiet, 0)
        plan["restart"] += [unit for unit in plan["unhealthy"] if unit not in plan["reload"]]


def _owned(path, owners):
    return any(
        path == owner or path.startswith(f"{owner.rstrip('/')}/") or fnmatch.fnmatchcase(path, owner)
        for owner in owners
    )


def is_empty(plan):
    return not any(plan.values())


# --- health ---------------------------------------------------------------------------------------------------------

GREETINGS = {  # kind: (what a healthy greeting holds, how to take leave, whether it speaks TLS from the start)
    "smtp": (b"220", b"QUIT\r\n", False),
    "smtps": (b"220", b"QUIT\r\n", True),
    "lmtp": (b"220", b"QUIT\r\n", False),
    "imap": (b"* OK", b"a LOGOUT\r\n", False),
    "imaps": (b"* OK", b"a LOGOUT\r\n", True),
    "pop3": (b"+OK", b"QUIT\r\n", False),
    "pop3s": (b"+OK", b"QUIT\r\n", True),
    "sieve": (b"OK", b"LOGOUT\r\n", False),
    "tcp": (b"", b"", False),
    "unix": (b"", b"", False),
}


def probe(check):
    """Makes one `ready` check. Returns None if healthy, else the reason."""
    kind, _, target = check.partition(" ")
    try:
        if kind == "exec":
            done = run(*shlex.split(target), timeout=20)
            return (
                None
                if done.returncode == 0
                else (done.stderr or done.stdout or f"exit status {done.returncode}").strip()[-300:]
            )
        kind, _, proxy = kind.partition("+")
        greeting, leave, tls = GREETINGS[kind]
        with _connect(kind, target) as sock:
            if proxy:
                sock.sendall(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n")
            if tls:
                # The certificate is the verify suite's to judge; here it is about whether the daemon answers at all.
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                sock = context.wrap_socket(sock)
            received = b""
            while greeting not in received:
                piece = sock.recv(4096)
                if not piece:
                    return f"closed the connection after {received[:80]!r}"
                received += piece
            sock.sendall(leave)
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error.__class__.__name__}: {error}"


def _connect(kind, target):
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(target)
        return sock
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def health(services, seconds):
    """Waits up to `seconds` until all checks of the services pass. Returns {unit: reason} of those that do not."""
    deadline = time.monotonic() + seconds
    waiting = [(service["unit"], check) for service in services for check in service["ready"]]
    with ThreadPoolExecutor(16) as pool:
        while True:
            reasons = list(pool.map(lambda item: probe(item[1]), waiting))
            failed = [(*item, reason) for item, reason in zip(waiting, reasons, strict=True) if reason]
            # One that has ended for good will not get healthy by waiting.
            over = any(state.get("ActiveState") == "failed" for state in units(sorted({f[0] for f in failed})).values())
            if not failed or over or time.monotonic() > deadline:
                return {unit: f"{check}: {reason}" for unit, check, reason in failed}
            waiting = [item[:2] for item in failed]
            time.sleep(0.2)


# --- apply ----------------------------------------------------------------------------------------------------------


def apply(desired):
    """Brings the node to the desired generation or leaves it at the previous one. Returns the plan. Raises Failed."""
    recover()
    plan = compare(desired)
    if is_empty(plan):
        return plan
    if plan["packages"]:
        _install(plan["packages"])
    for entry in plan["groups"]:
        _must("usermod", "-aG", entry["group"], entry["user"])
    for path in sorted(plan["directories"]):
        Path(path).mkdir(parents=True, exist_ok=True)
        _set_access(path, desired["directories"][path])
    if plan["packages"]:
        plan = {**compare(desired, False), "packages": plan["packages"], "groups": plan["groups"]}
    try:
        _stage(desired, plan)
        _validate(desired, plan)
        _put_beside(desired, plan)
    except OSError as error:
        _discard()
        raise Failed(f"{error.filename or STATE}: {error.strerror}; nothing was replaced") from None
    except Failed:
        _discard()
        raise
    _journal(plan, "swapping")
    try:
        _retire(plan)
        _swap(plan)
        _act(plan)
        _await(desired, plan)
        _commit(desired)
    except Failed as failure:
        rolled_back = recover()
        raise Failed(f"{failure}; {rolled_back}", failure.lines) from None
    return plan


def _must(*argv, **options):
    done = run(*argv, **options)
    if done.returncode:
        raise Failed(f"{shlex.join(argv)}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done


def _install(packages):
    # Nothing starts before its configuration is in place: policy-rc.d holds back what maintainer scripts would start.
    policy = Path("/usr/sbin/policy-rc.d")
    had = policy.exists()
    if not had:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        options = ["-y", "-q", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]
        if run("apt-get", "install", *options, *packages, env=environment, timeout=1800).returncode:
            # The package lists of a fresh node are empty or old.
            _must("apt-get", "update", "-q", env=environment, timeout=600)
            _must("apt-get", "install", *options, *packages, env=environment, timeout=1800)
    finally:
        if not had:
            policy.unlink()


def _stage(desired, plan):
    """Lays out the whole desired tree for the validators, and copies of all that will be replaced or removed."""
    _discard()
    TRANSACTION.mkdir(parents=True, mode=0o700)
    (TRANSACTION / "old").mkdir()
    (TRANSACTION / "new").mkdir()
    for path, want in desired["files"].items():
        place(TRANSACTION / "new" / path[1:], want, sync=False)  # nobody looks at these after a power cut
    for path, before in {**plan["write"], **plan["remove"]}.items():
        if before:
            place(TRANSACTION / "old" / path[1:], before)
    _journal(plan, "staging")


def _journal(plan, phase):
    record = {"phase": phase, **{key: plan[key] for key in ("start", "restart", "reload", "stop", "enable", "disable")}}
    record["files"] = {path: before is not None for path, before in {**plan["write"], **plan["remove"]}.items()}
    beside = TRANSACTION / "journal.new"
    with beside.open("w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(TRANSACTION / "journal.json")
    _sync_directory(TRANSACTION)


def _sync_directory(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def place(path, want, sync=True):
    """Writes a file (or link) with its mode and owner, and has it on the disk before it returns if `sync`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    if "link" in want:
        path.symlink_to(want["link"])
        return
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(want["content"].encode("utf-8", "surrogateescape"))
        if sync:
            file.flush()
            os.fsync(file.fileno())
    _set_access(path, want)


def _set_access(path, want):
    try:
        shutil.chown(path, want["owner"], want["group"])
    except LookupError as error:
        raise Failed(f"{path}: {error}; the package that makes it is not in the manifest") from None
    Path(path).chmod(int(want["mode"], 8))


def _validate(desired, plan):
    """Runs the validator of each service whose files change, in a view of the node in which the new files are in place.

    The view is a mount namespace of its own, with the staged tree laid over the live one: so files that refer to each
    other by their paths are judged together, and a validator cannot change anything.
    """
    changed = [*plan["write"], *plan["remove"]]
    new = TRANSACTION / "new"
    tops = [entry.name for entry in new.iterdir()]
    mounts = "".join(f"mount -t overlay posthouse -o ro,lowerdir={new}/{top}:/{top} /{top} && " for top in tops)
    checks = [
        (service["unit"], command)
        for service in desired["services"]
        if any(_owned(path, service["owns"]) for path in changed)
        for command in service["check"]
    ]
    view = ["unshare", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh"]

    def judge(check):
        unit, command = check
        try:
            return run(*view, *shlex.split(command))
        except subprocess.TimeoutExpired as late:
            reason = f"its validator ({command}) did not end within {late.timeout:.0f} s"
            raise Failed(f"{unit}: {reason}; nothing was replaced; run it by hand on the node") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = list(pool.map(judge, checks))
    for (unit, command), done in zip(checks, judged, strict=True):
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise Failed(f"{unit}: refused by its validator ({command}); nothing was replaced", lines[-20:])


def _put_beside(desired, plan):
    """Writes every new file beside the one it will replace: after this a full disk can no longer get in the way."""
    for path in plan["write"]:
        place(Path(path + BESIDE), desired["files"][path])


def _retire(plan):
    """Stops what is no longer wanted, while its unit file is still there to say how."""
    for verb in ("stop", "disable"):
        if plan[verb]:
            _must("systemctl", "--quiet", verb, *plan[verb])


def _swap(plan):
    try:
        for path in plan["write"]:
            Path(path + BESIDE).replace(path)
        for path in plan["remove"]:
            Path(path).unlink()
    except OSError as error:
        raise Failed(f"{error.filename}: {error.strerror}") from None


def _act(plan):
    if plan["enable"]:
        _must("systemctl", "--quiet", "--no-reload", "enable", *plan["enable"])
    if plan["enable"] or any(path.startswith(SYSTEM_UNITS) for path in [*plan["write"], *plan["remove"]]):
        _must("systemctl", "daemon-reload")
    for verb in ("restart", "reload", "start"):
        # All at once: systemd starts them side by side, in the order that their units ask for.
        command = "reload-or-restart" if verb == "reload" else verb
        done = run("systemctl", command, *plan[verb]) if plan[verb] else None
        if done and done.returncode:
            down = [unit for unit, state in units(plan[verb]).items() if not runs(state)] or plan[verb]
            raise Failed(f"{', '.join(down)}: does not {verb}: {done.stderr.strip()[-400:]}", journal(down[0]))


def _await(desired, plan):
    touched = set(plan["start"] + plan["restart"] + plan["reload"])
    states = units(sorted(touched))
    services = [s for s in desired["services"] if s["unit"] in touched and not excused(states[s["unit"]])]
    failed = health(services, READY_SECONDS)
    for unit, reason in failed.items():
        raise Failed(f"{unit}: health check failed: {reason}", journal(unit))
    for unit, state in units([service["unit"] for service in services]).items():
        if not runs(state):
            raise Failed(f"{unit}: is {state.get('ActiveState')} after its start", journal(unit))


def journal(unit):
    return run("journalctl", "-u", unit, "-n", "15", "--no-pager", "-o", "cat").stdout.splitlines()


def _commit(desired):
    current = read_json(CURRENT, {"files": {}, "services": {}})
    keep = (
        {"files": {}, "services": {}}
        if desired["whole"]
        else {
            kind: {name: tier for name, tier in current[kind].items() if tier not in desired["tiers"]}
            for kind in ("files", "services")
        }
    )
    keep["files"] |= {path: want["tier"] for path, want in desired["files"].items()}
    keep["services"] |= {service["unit"]: service["tier"] for service in desired["services"]}
    place(CURRENT.with_suffix(".new"), {"content": json.dumps(keep), "mode": "0600", "owner": "root", "group": "root"})
    CURRENT.with_suffix(".new").replace(CURRENT)
    _discard()


def _discard():
    """Ends a transaction in which nothing is left to put back."""
    for path in read_json(TRANSACTION / "journal.json", {"files": {}})["files"]:
        Path(path + BESIDE).unlink(missing_ok=True)
    shutil.rmtree(TRANSACTION, ignore_errors=True)


def recover(booting=False):
    """Puts back the previous generation if a transaction was interrupted. Returns what it did, in words."""
    record = read_json(TRANSACTION / "journal.json", {"phase": "staging"})
    if record["phase"] == "staging":
        _discard()
        return "nothing was replaced"
    for path, existed in record["files"].items():
        Path(path + BESIDE).unlink(missing_ok=True)
        old = TRANSACTION / "old" / path[1:]
        if not existed:
            Path(path).unlink(missing_ok=True)
        elif os.path.lexists(old):  # else an earlier, interrupted recovery has put it back already
            _move(old, path)
    if not booting:  # while the node boots, systemd starts everything after this anyway
        run("systemctl", "daemon-reload")
        if record["enable"]:
            run("systemctl", "--quiet", "disable", *record["enable"])
        if record["disable"]:
            run("systemctl", "--quiet", "enable", *record["disable"])
        for unit in record["start"]:
            run("systemctl", "stop", unit)
        for unit in [*record["restart"], *record["reload"], *record["stop"]]:
            run("systemctl", "reset-failed", unit)
            run("systemctl", "restart", unit)
    _discard()
    return "the previous generation was put back"


def _move(old, path):
    """Renames where it can, for that needs no room on a full disk."""
    try:
        old.replace(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        place(Path(path + BESIDE), read_file(old))
        Path(path + BESIDE).replace(path)


# --- as a program -----------------------------------------------------------------------------------------------------


def locked(who):
    """Takes the node's lock, or raises Failed naming its holder. Keep the returned file open as long as needed."""
    RUN.mkdir(exist_ok=True)
    file = LOCK.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Failed(f"another converge is under way, held by {file.read().strip()}; wait for it to end") from None
    file.truncate(0)
    file.write(f"{who} since {time.strftime('%H:%M:%S')}")
    file.flush()
    return file


def main(verb, *arguments):
    if verb == "recover":
        try:
            with locked("recover"):
                print(recover("--boot" in arguments))
        except Failed as busy:
            print(busy)  # a converge is alive and well: nothing was interrupted
        return
    desired = json.loads(Path(arguments[0]).read_text())
    try:
        with locked(desired["who"]):
            result = {"plan": apply(desired)}
    except Failed as failure:
        result = {"failed": str(failure), "lines": failure.lines}
    access = {"mode": "0600", "owner": "root", "group": "root"}
    place(Path(arguments[0]).with_suffix(".result"), {"content": json.dumps(result), **access})


if __name__ == "__main__":
    main(*sys.argv[1:])
