from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import load_pem_x509_certificate

from posthouse import plan, secrets
from posthouse.model import Site
from posthouse.sitefile import SiteError, load, parse

CLASSES = """
classes:
  mail: {cores: 4, disk_gib: 100}
  lb: {cores: 2}
"""


def real(sound: str, extra: str = "") -> Site:
    """The small site on machines of its own instead of in the lab."""
    return parse(sound.replace("lab: {outside: 198.51.100.0/24}\n", CLASSES + extra))


def row(site: Site, start: str) -> dict[str, Any]:
    return next(row for row in plan.load(site) if row["what"].startswith(start))


def test_nodes_and_stores(site: Site) -> None:
    made = plan.plan(site)
    assert [node["name"] for node in made["nodes"]] == ["lb1", "lb2", "mail1", "mail2", "mail3"]
    assert made["nodes"][2]["class"] == "mail"
    assert made["stores"][0]["address"] == "10.77.0.101"


def test_ports_are_those_of_the_firewall(site: Site) -> None:
    ports = plan.plan(site)["ports"]
    for klass, name in (("lb", "lb1"), ("mail", "mail1")):
        opened = [rule.get("port", rule.get("protocol")) for rule in site.firewall(site.nodes[name])]
        assert [port["port"] for port in ports if port["class"] == klass] == opened
    assert {port["port"] for port in ports if port["from"] == "anyone"} == {"25", "465", "587", "993", "995", "4190"}


def test_need_is_the_busiest_hour(sound: str) -> None:
    site = real(sound, "load: {accounts: 864000, messages_per_account: 10, logins_per_account: 20, peak: 4}\n")
    assert row(site, "mail, all")["needed"] == 864000 * 10 / 86400 * 4
    assert row(site, "logins")["needed"] == 864000 * 20 / 86400 * 4


def test_capacity_follows_the_measured_costs(sound: str) -> None:
    """Three nodes of four cores do all the work of a message between them, two when one is down."""
    site = real(sound)
    cost = sum(sum(parts.values()) for parts in plan.message_costs().values())
    found = row(site, "mail, all")
    assert found["capacity"] == pytest.approx(12 / cost, rel=0.01)
    assert found["degraded"] == pytest.approx(8 / cost, rel=0.01)
    assert found["headroom"] == pytest.approx(found["degraded"] / found["needed"], rel=0.01)
    assert found["bound"].startswith("SpamAssassin: 9")


def test_spamd_alone_can_be_recalculated_from_the_calibration() -> None:
    spam = plan.calibration()["rates"]["spam"]
    assert (
        plan.message_costs()["filter"]["SpamAssassin"] == spam["cores"] / spam["rate"] == pytest.approx(0.137, rel=0.01)
    )


def test_every_figure_says_what_was_measured() -> None:
    figures = plan.calibration()
    assert "2 shared cores" in figures["source"]
    for figure in (*figures["rates"].values(), *figures["limits"].values()):
        assert figure["what"]
        assert figure.get("rate", figure.get("value")) > 0


def test_more_cores_do_more(sound: str) -> None:
    few, many = real(sound), parse(sound.replace("lab: {outside: 198.51.100.0/24}\n", CLASSES.replace("4,", "8,")))
    assert row(many, "mail, all")["capacity"] == pytest.approx(2 * row(few, "mail, all")["capacity"], rel=0.01)
    assert row(many, "logins")["capacity"] == row(few, "logins")["capacity"]


def test_filters_on_nodes_of_their_own_share_no_work(sound: str) -> None:
    """The slowest class bounds the rest."""
    split = """
classes:
  mail: {cores: 4, tiers: [directory, store, filter, mx, outbound, submission]}
  plain: {cores: 400, tiers: [directory, store]}
"""
    base = sound.replace("lab: {outside: 198.51.100.0/24}\n", split)
    site = parse(base.replace("vips:", "  plain[1:3]: {class: plain}\nvips:"))
    costs = plan.message_costs()
    on_mail = sum(costs["filter"].values()) + sum(costs["mx"].values()) + sum(costs["store"].values()) * 12 / 1212
    assert row(site, "mail, all")["capacity"] == pytest.approx(12 / on_mail, rel=0.01)


def test_one_balancer_has_no_headroom(sound: str) -> None:
    site = parse(sound.replace("lb[1:2]", "lb1").replace("lab: {outside: 198.51.100.0/24}\n", CLASSES))
    assert row(site, "logins")["degraded"] == row(site, "logins")["headroom"] == 0
    assert "On one node only: lb, access. While it is down, nobody does their work." in plan.plan(site)["notes"]


def test_disks_hold_every_copy(sound: str) -> None:
    found = row(real(sound, "load: {accounts: 1024, mailbox_mib: 100}\n"), "mailboxes")
    assert found["needed"] == 200
    assert (found["capacity"], found["degraded"]) == (240, 160)


def test_accounts_of_the_fullest_store_by_weight(sound: str) -> None:
    site = real(
        sound.replace("s02: {primary: mail2,", "s02: {weight: 2.0, primary: mail2,"), "load: {accounts: 4000}\n"
    )
    found = row(site, "accounts on")
    assert found["what"] == "accounts on s02, the fullest"
    assert found["needed"] == 2000


def test_notes_say_what_is_not_redundant(sound: str) -> None:
    bare = real(
        sound.replace("s01: {primary: mail1, replicas: [mail2]}", "s01: {primary: mail1}").replace(
            ", mail2]}\nst", "]}\nst"
        )
    )
    notes = " ".join(plan.plan(bare)["notes"])
    assert "Without a replica: s01." in notes
    assert "Only one directory provider" in notes
    assert len(plan.plan(real(sound))["notes"]) == 1, "nothing but the source of the figures"


# --- the tree of files ------------------------------------------------------------------------------------------------


def test_tree_holds_every_file_and_zone(site: Site, tmp_path: Path) -> None:
    count = plan.write_tree(site, tmp_path / "out", with_secrets=False)
    written = [path for path in (tmp_path / "out").rglob("*") if not path.is_dir() or path.is_symlink()]
    assert len(written) == count
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*site.nodes, "zones"}
    assert (tmp_path / "out" / "zones" / "lab.test.zone").read_text()
    assert "mail1" in (tmp_path / "out" / "mail1" / "etc" / "hostname").read_text()


def test_tree_has_placeholders_and_sound_certificates(site: Site, tmp_path: Path) -> None:
    plan.write_tree(site, tmp_path / "out", with_secrets=False)
    node = tmp_path / "out" / "mail1"
    assert "placeholder-store_replicator" in "".join(path.read_text() for path in node.glob("etc/cyrus/*/*/*"))
    load_pem_x509_certificate((node / "etc/ssl/posthouse/node.pem").read_bytes())
    assert (node / "etc/ssl/posthouse/node.key").stat().st_mode & 0o777 == 0o640


def test_tree_with_secrets(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "INVENTORY", tmp_path)
    (tmp_path / "lab").mkdir()
    opened = secrets.ensure(site)
    plan.write_tree(site, tmp_path / "out", with_secrets=True)
    key = (tmp_path / "out/mail1/etc/ssl/posthouse/node.key").read_text()
    assert key == opened.for_node(site.nodes["mail1"])["tls"]["key"]


@pytest.mark.parametrize("kind", ["file", "full", "link"])
def test_tree_overwrites_nothing(site: Site, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "full":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SiteError, match="is not an empty folder"):
        plan.write_tree(site, out, with_secrets=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_tree_in_a_place_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match="Not a directory"):
        plan.write_tree(site, tmp_path / "file" / "out", with_secrets=False)


def test_tree_that_does_not_fit_leaves_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = plan._write, []

    def write_some(path: Path, file: dict[str, str]) -> None:
        if len(written) == 50:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(path, file)

    monkeypatch.setattr(plan, "_write", write_some)
    with pytest.raises(SiteError, match="No space left on device"):
        plan.write_tree(site, tmp_path / "out", with_secrets=False)
    assert len(written) == 50
    assert list((tmp_path / "out").iterdir()) == []


def test_files_beside_each_other_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    file = {"content": "", "mode": "0644"}
    with pytest.raises(SiteError, match="File exists"):
        plan.write_files(tmp_path / "out", {"one": file, "folder/two": file, "one/three": file})
    assert list((tmp_path / "out").iterdir()) == []


def test_million_is_planned_and_rendered_whole(tmp_path: Path) -> None:
    site = load("million")
    assert all(found["headroom"] >= 1 for found in plan.load(site))
    plan.write_tree(site, tmp_path / "out", with_secrets=False)
    assert len(list((tmp_path / "out").iterdir())) == 111
    assert len(list((tmp_path / "out" / "mail104" / "etc" / "cyrus").iterdir())) == 8


def test_spares_are_named_and_counted_for_nothing(sound: str) -> None:
    more = sound.replace("address: 10.77.0.21}", "address: 10.77.0.21}\n  mail[4:5]: {class: mail, spare: true}")
    without, with_spares = plan.plan(parse(sound)), plan.plan(parse(more))
    assert with_spares["load"] == without["load"]
    assert [node["name"] for node in with_spares["nodes"] if node["spare"]] == ["mail4", "mail5"]
    assert any(note.startswith("Hot spares: mail4, mail5.") for note in with_spares["notes"])
    assert not any("spare" in note for note in without["notes"])
