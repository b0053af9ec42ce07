"""`loraplex export` and `import`; `pin`, `unpin`, `prefetch`, `tiers`."""

import json
import shutil
import tarfile

import pytest
from test_cli import ROOT, Served, assert_refused, inside, served, serving  # noqa: F401

from forks import Forks

UPPER, REVERSE = ROOT / "adapters" / "upper", ROOT / "adapters" / "reverse"


@pytest.fixture
def draft(served: Served, inside):  # noqa: F811
    """draft@1 is meant, draft@2 was rolled back; yields the environment of clients."""
    env = {"LORAPLEX_URL": served.url}
    first = json.loads(inside("push", REVERSE, "--name", "draft", "--json", **env).stdout)
    inside("push", UPPER, "--name", "draft", **env)
    inside("rollback", "draft", **env)
    yield env, first
    inside("rm", "draft", **env)


@pytest.mark.parametrize("kind", ["folder", "file.tar"])
def test_what_was_exported_is_the_same_elsewhere(draft, inside, tmp_path, kind: str, forks: Forks):  # noqa: F811
    env, first = draft
    out = tmp_path / kind
    manifest = json.loads(inside("export", out, "--json", **env).stdout)
    [exported] = [adapter for adapter in manifest["adapters"] if adapter["name"] == "draft"]
    assert exported["current"] == first["version"]
    assert len(exported["versions"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == [kind], "nothing temporary is left"
    assert_refused(inside("export", out, **env), "is there already", code=2)
    with serving(tmp_path / "data", forks.start) as other:
        there = {"LORAPLEX_URL": other.url}
        rows = json.loads(inside("import", out, "--json", **there).stdout)["data"]
        assert [row["to"] for row in rows if row["from"].startswith("draft@")] == ["draft@1", "draft@2"]
        shown = json.loads(inside("ls", "--json", **there).stdout)["data"]
        [row] = [row for row in shown if row["name"] == "draft"]
        assert (row["id"], row["digest"]) == ("draft@1", first["digest"]), "what the name meant"
        again = json.loads(inside("import", out, "--json", **there).stdout)["data"]
        assert again == rows, "nothing is made twice"


def test_a_tree_is_exported_and_imported(served: Served, inside, tmp_path, forks: Forks):  # noqa: F811
    """A child whose name comes first, on a version that is not what its parent means now; and other numbers there."""
    env = {"LORAPLEX_URL": served.url}
    inside("push", REVERSE, "--name", "z-root", **env)
    told = inside("push", UPPER, "--name", "a-leaf", "--parent", "z-root", **env).stdout
    assert "the sum of z-root@1 + a-leaf@1" in told
    inside("push", UPPER, "--name", "z-root", **env)
    assert "z-root@1" in inside("ls", **env).stdout
    assert_refused(inside("rm", "z-root", **env), "a-leaf@1")
    assert_refused(inside("push", UPPER, "--name", "z-root", "--parent", "a-leaf", **env), "on a path twice")
    out = tmp_path / "out"
    inside("export", out, **env)
    with serving(tmp_path / "data", forks.start) as other:
        there = {"LORAPLEX_URL": other.url}
        inside("push", ROOT / "adapters" / "json", "--name", "z-root", **there)
        rows = json.loads(inside("import", out, "--json", **there).stdout)["data"]
        moved = {row["from"]: row["to"] for row in rows}
        assert moved["z-root@1"] == "z-root@2"
        assert moved["z-root@2"] == "z-root@3"
        shown = {row["id"]: row for row in json.loads(inside("ls", "--json", **there).stdout)["data"]}
        assert shown["a-leaf@1"]["parent"] == "z-root@2"
        assert "z-root@3" in shown
        assert json.loads(inside("import", out, "--json", **there).stdout)["data"] == rows, "nothing is made twice"
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["adapters"] = [one for one in manifest["adapters"] if one["name"] == "a-leaf"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    orphaned = inside("import", out, "--json", **env)
    assert (orphaned.returncode, json.loads(orphaned.stdout)["data"]) == (1, [])
    assert orphaned.stderr.startswith("left out a-leaf@1: It stands on z-root@1, ")
    for name in ("a-leaf", "z-root"):
        inside("rm", name, **env)


def test_a_damaged_version_is_left_out(draft, served: Served, inside, tmp_path, forks: Forks):  # noqa: F811
    """One that another stands on, and that its name means; a demo adapter has the same files."""
    env, first = draft
    newer = inside("pull", "draft", "--version", first["version"] + 1, tmp_path / "newer", "--json", **env)
    inside("push", UPPER, "--name", "leaf", "--parent", first["id"], **env)
    weights = served.log.parent / "d" / "blobs" / first["digest"] / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        out = tmp_path / "out"
        exported = inside("export", out, "--json", **env)
        assert exported.returncode == 1
        left, reverse = json.loads(exported.stdout)["left_out"]
        assert (left["id"], reverse["id"]) == (first["id"], "reverse@1")
        assert (left["error"]["code"], left["error"]["status"]) == ("adapter_load_failed", 500)
        assert exported.stderr.splitlines()[0] == f"left out {first['id']}: {left['error']['message']}"
        assert not (out / first["id"]).exists()
        refused = inside("pull", "draft", tmp_path / "x", **env)
        assert_refused(refused, "the disk has changed them", code=5)
        with serving(tmp_path / "data", forks.start) as other:
            done = inside("import", out, "--json", LORAPLEX_URL=other.url)
        assert done.returncode == 1
        imported = json.loads(done.stdout)
        assert {json.loads(newer.stdout)["id"], "upper@1"} <= {row["from"] for row in imported["data"]}
        assert [row["id"] for row in imported["left_out"]] == ["leaf@1", "draft"]
        leaf, name = done.stderr.splitlines()
        assert leaf.startswith(f"left out leaf@1: It stands on {first['id']}, ")
        assert name.startswith(f"left out draft: It meant {first['id']}, ")
    finally:
        weights.write_bytes(whole)
        inside("rm", "leaf", LORAPLEX_URL=served.url)


def test_an_import_of_something_else(served: Served, inside, tmp_path):  # noqa: F811
    env = {"LORAPLEX_URL": served.url}
    assert_refused(inside("import", tmp_path, **env), "manifest.json", code=2)
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert_refused(inside("import", tmp_path / "x.tar", **env), "cannot be read as an export", code=2)
    outside = tmp_path / "victim"
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name in ("../victim", "draft@1/../../victim", "draft@1/evil.sh", "/victim"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("manifest.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert_refused(inside("import", tmp_path / "bad.tar", **env), "manifest.json", code=2)
    assert not outside.exists()
    (tmp_path / "e").mkdir()
    manifest = {"format": 1, "adapters": [{"name": "x", "current": 1, "versions": [{"version": 1, "folder": "../e"}]}]}
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(inside("import", tmp_path / "e", **env), "another format", code=2)
    shutil.rmtree(tmp_path / "e")


def test_tiers(served: Served, inside):  # noqa: F811
    env = {"LORAPLEX_URL": served.url}
    assert inside("prefetch", "json", "--to", "device", **env).stdout == "json@1 is in the tier device\n"
    assert inside("pin", "json", **env).stdout.startswith("json is pinned: json@1, ")
    table = inside("tiers", "--tier", "ram", **env).stdout
    assert table.startswith("RAM ")
    assert "json@1" in table
    assert json.loads(inside("tiers", "--json", **env).stdout)["ram"]["pinned"] == 1
    assert inside("unpin", "json", **env).stdout == "unpinned json\n"
    assert_refused(inside("unpin", "json", **env), "is not pinned", "loraplex tiers")
    assert json.loads(inside("pin", "json@1", "--json", **env).stdout)["pinned"]
    assert json.loads(inside("unpin", "json@1", "--json", **env).stdout)["unpinned"] == ["json@1"]
    assert_refused(inside("prefetch", "nobody", **env), "nobody")
