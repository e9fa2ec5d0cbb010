"""Accounts, as far as they can be judged without a directory and stores: addresses, files, placement."""

from __future__ import annotations

from collections import Counter

import pytest

from posthouse import account_import, accounts
from posthouse.accounts import AccountError, Accounts, Placement, Wish, own
from posthouse.directory import Account
from posthouse.model import Store
from posthouse.secrets import Secrets
from posthouse.sitefile import parse


@pytest.fixture(scope="module")
def desk(sound: str) -> Accounts:
    """The accounts of a small site; it connects to nothing until it is asked for something."""
    site = parse(sound.replace("domains: [lab.test]", "domains: [lab.test, xn--bcher-kva.test]"))
    assert len(site.domains) == 2
    return Accounts(site, Secrets({"passwords": {"directory_accounts": ""}, "ca": {"cert": ""}}))


def stores(**weights: float) -> list[Store]:
    """Stores that differ in nothing but their weight."""
    rest = {"number": 1, "host": "", "address": "", "replication_port": 2101, "primary": "", "replicas": ()}
    return [Store(name=name, weight=weight, **rest) for name, weight in weights.items()]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("alice@lab.test", "alice@lab.test"),
        (" Alice.B@LAB.test ", "alice.b@lab.test"),
        ("o'brien=x_y-z@lab.test", "o'brien=x_y-z@lab.test"),
        ("anna@Bücher.test", "anna@xn--bcher-kva.test"),
        ("anna@XN--BCHER-KVA.test", "anna@xn--bcher-kva.test"),
    ],
)
def test_own_address(desk: Accounts, written: str, meant: str) -> None:
    assert own(desk.site, written) == meant


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("alice", "not an address"),
        ("@lab.test", "not an address"),
        ("alice bob@lab.test", "not an address"),
        ("alice\n@lab.test", "not an address"),
        ("alice\x00@lab.test", "not an address"),
        ("alice\u202e@lab.test", "not an address"),
        ("alice@[192.0.2.1]", "literal"),
        ("alice@lab", "not a domain"),
        ("alice@elsewhere.test", "not a domain of this site"),
        ("alice@-lab.test", "not a domain"),
        ("alice@" + "a" * 300, "not a domain"),
        ("alice+work@lab.test", "folder"),
        ("al/ice@lab.test", "before the @"),
        ("al*ice@lab.test", "before the @"),
        ('"alice"@lab.test', "before the @"),
        (".alice@lab.test", "before the @"),
        ("al..ice@lab.test", "before the @"),
        ("alice.@lab.test", "before the @"),
        ("a" * 65 + "@lab.test", "before the @"),
        ("älice@lab.test", "before the @"),
        ("*)(uid=*@lab.test", "before the @"),
        ("alice@bob@lab.test", "before the @"),
    ],
)
def test_own_address_refused(desk: Accounts, written: str, reason: str) -> None:
    with pytest.raises(AccountError, match=reason):
        own(desk.site, written)


def test_forwarding(desk: Accounts) -> None:
    found = desk._targets(["Bob+X@Example.ORG", "CAROL@lab.test"], {"alice@lab.test"})
    assert found == ("Bob+X@example.org", "carol@lab.test")


@pytest.mark.parametrize("target", ["alice@lab.test", "Alice+x@lab.test", "b@[192.0.2.1]", "b c@x.test", "<b@x.test>"])
def test_forwarding_refused(desk: Accounts, target: str) -> None:
    with pytest.raises(AccountError):
        desk._targets([target], {"alice@lab.test"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"quota": -1}, "quota"),
        ({"quota": 2**40}, "quota"),
        ({"spam_threshold": 0}, "spam_threshold"),
        ({"spam_threshold": 101}, "spam_threshold"),
        ({"store": "s09"}, "the stores are s01, s02"),
        ({"name": "Al\x07ice"}, "name"),
        ({"name": "  "}, "name"),
        ({"forward_only": True}, "say where"),
    ],
)
def test_wish_refused(desk: Accounts, given: dict[str, object], reason: str) -> None:
    every = dict.fromkeys(("name", "quota", "store", "aliases", "forward", "forward_only", "spam_threshold"))
    with pytest.raises(AccountError, match=reason):
        desk._wish("alice@lab.test", **(every | given))


@pytest.mark.parametrize("password", ["short", "has a\nline break", "nul\0nul\0nul\0", "bell\x07bell\x07"])
def test_password_refused(desk: Accounts, password: str) -> None:
    with pytest.raises(AccountError, match="password"):
        desk._checked_password(password)


def test_a_wish_that_has_come_true_differs_in_nothing() -> None:
    have = Account("alice@lab.test", "Alice", "s01", 100, aliases=("a@lab.test",))
    assert Wish("alice@lab.test").differs(have) == []
    assert Wish("alice@lab.test", quota=100, aliases=("a@lab.test",)).differs(have) == []
    assert Wish("alice@lab.test", quota=200, store="s02").differs(have) == [
        "quota: 100, not 200",
        "store: s01, not s02",
    ]


def test_placement_goes_by_weight() -> None:
    placement = Placement(stores(s01=1, s02=3), Counter(s01=10))
    chosen = Counter(placement.choose() for _ in range(70))
    # 80 accounts in all, shared 1 : 3.
    assert chosen == {"s02": 60, "s01": 10}


def test_placement_of_the_first_account_is_no_accident() -> None:
    assert Placement(stores(s01=1, s02=1), Counter()).choose() == "s01"
    assert Placement(stores(s01=1, s02=2), Counter()).choose() == "s02"


HEADER = ["address", "name", "password"]


def test_row() -> None:
    row = account_import._row(HEADER, b'alice@lab.test ,"Alice, ""Ally""", pass word \r\n')
    assert row == {"address": "alice@lab.test", "name": 'Alice, "Ally"', "password": " pass word "}


def test_row_without_values() -> None:
    assert account_import._row(HEADER, b"alice@lab.test,,\n") == {"address": "alice@lab.test"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"alice@lab.test,Alice\n", "2 fields under 3 columns"),
        (b"alice@lab.test,Alice,x,y\n", "4 fields under 3 columns"),
        (b'alice@lab.test,"Alice,x\n', "not CSV"),
        (b'alice@lab.test,"Al"ice,x\n', "not CSV"),
        (b"alice@lab.test,\xff\xfe,x\n", "not UTF-8 at byte 16"),
    ],
)
def test_row_refused(line: bytes, reason: str) -> None:
    with pytest.raises(AccountError, match=reason):
        account_import._row(HEADER, line)


def test_header(tmp_path) -> None:
    assert account_import._header(tmp_path, b"\xef\xbb\xbfAddress, Password\r\n") == ["address", "password"]


@pytest.mark.parametrize("line", [b"", b"\n", b"address,adress\n", b"name,password\n", b"address,address\n", b"\xff\n"])
def test_header_refused(tmp_path, line: bytes) -> None:
    with pytest.raises(AccountError, match="line 1"):
        account_import._header(tmp_path, line)


def test_numbers() -> None:
    assert account_import._number("quota", "10") == 10
    assert account_import._number("quota", None) is None
    for text in ("1.5", "ten", "1e3", "١", "9" * 20, ""):
        with pytest.raises(AccountError, match="quota"):
            account_import._number("quota", text)


def test_several_addresses_in_one_field() -> None:
    assert account_import._several("a@x.test; b@x.test c@x.test;") == ("a@x.test", "b@x.test", "c@x.test")
    assert account_import._several(None) is None


@pytest.mark.parametrize("text", ["{ARGON2}$argon2id$v=19$m=8,t=2,p=1$c2Fs$aGFzaA", "{SSHA512}AAAA", "{CRYPT}$6$x$y"])
def test_hashes_are_known(text: str) -> None:
    assert accounts.HASHED.fullmatch(text)


@pytest.mark.parametrize("text", ["secret password", "{SSHA}", "{UNKNOWN}AAAA", "{SSHA}with space", "{SHA}line\nbreak"])
def test_what_is_no_hash_is_a_password(text: str) -> None:
    assert not accounts.HASHED.fullmatch(text)


def test_entry() -> None:
    account = Account("alice@lab.test", "Alice Liddell", "s01", 100, aliases=("a@lab.test",), spam_threshold=7)
    assert account.attributes("s01.lab.test") == {
        "cn": ["Alice Liddell"],
        "sn": ["Liddell"],
        "mail": ["alice@lab.test"],
        "mailLocalAddress": ["alice@lab.test", "a@lab.test"],
        "mailHost": ["s01.lab.test"],
        "posthouseQuota": ["100"],
        "posthouseStatus": ["active"],
        "posthouseForward": [],
        "posthouseForwardOnly": [],
        "posthouseSpamThreshold": ["7"],
    }
