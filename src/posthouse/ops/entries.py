"""The directory in a backup: LDIF as slapcat writes it, without folded lines."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from posthouse.directory import READ, Account, Directory

Entry = dict[str, list[bytes]]

# What slapd keeps about an entry itself; a new one gets its own.
OPERATIONAL = {
    "structuralobjectclass",
    "entryuuid",
    "creatorsname",
    "createtimestamp",
    "entrycsn",
    "modifiersname",
    "modifytimestamp",
    "contextcsn",
}


def parsed(ldif: bytes) -> Iterator[tuple[str, Entry]]:
    """(dn, {attribute: values}) of every entry, without what slapd keeps itself."""
    for block in ldif.split(b"\n\n"):
        dn, entry = "", Entry()
        for line in block.splitlines():
            name, colon, value = line.partition(b":")
            if not colon or name.startswith(b"#"):
                continue
            data = base64.b64decode(value[1:]) if value.startswith(b":") else value.removeprefix(b" ")
            attribute = name.decode()
            if attribute.lower() == "dn":
                dn = data.decode()
            elif attribute.lower() not in OPERATIONAL:
                entry.setdefault(attribute, []).append(data)
        if dn:
            yield dn, entry


def accounts(ldif: bytes) -> dict[str, tuple[str, Entry]]:
    """{address: (dn, entry)} of the accounts."""
    return {
        entry["uid"][0].decode(): (dn, entry)
        for dn, entry in parsed(ldif)
        if b"posthouseAccount" in entry.get("objectClass", ())
    }


Changes = list[tuple[str, str, Entry]]  # (address, dn, attributes)


def plan(have: dict[str, tuple[str, Entry]], want: dict[str, tuple[str, Entry]]) -> tuple[Changes, Changes]:
    """(entries to make, attributes to set) so that accounts are what they were. Accounts made since stay.

    Where an account lives, and where it came from, is not taken back: its mail is there.
    """
    missing = [(address, dn, entry) for address, (dn, entry) in want.items() if address not in have]
    changed = []
    for address, (dn, entry) in want.items():
        if address not in have:
            continue
        now = have[address][1]
        names = (entry.keys() | now.keys()) - {"mailHost", "posthouseMovedFrom", "objectClass", "uid"}
        differing = {n: entry.get(n, []) for n in sorted(names) if sorted(entry.get(n, [])) != sorted(now.get(n, []))}
        if differing:
            changed.append((address, dn, differing))
    return missing, changed


def of_account(ldif: bytes, address: str) -> Entry | None:
    """The entry of one account, or None. Looks only at what mentions it: a directory may hold a million."""
    # The only one of an address's characters that slapd escapes in a name.
    name = address.replace("=", "\\3D")
    start = ldif.find(f"dn: uid={name},".encode())
    if start < 0:
        return None
    end = ldif.find(b"\n\n", start)
    return next(parsed(ldif[start : end if end >= 0 else None]))[1]


def read(directory: Directory, entry: Entry) -> tuple[Account, str]:
    """The account that an entry describes, and its password's hash."""
    text = {name: [value.decode() for value in entry.get(name, ())] for name in READ}
    return directory.account(text), entry["userPassword"][0].decode()
