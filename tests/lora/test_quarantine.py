"""Quarantine and proofs as the registry keeps them, in SQLite and PostgreSQL."""

import pytest
from test_registry import A, B, C, Open, open_registry, publish, push, registry, said  # noqa: F401  two are fixtures

from loraplex.errors import AdapterQuarantined
from loraplex.lora.registry import Registry

# ruff: noqa: F811  the fixtures' names


def test_quarantine_is_of_the_files_and_of_this_base(registry: Registry, open_registry: Open):
    """Every version made of them, under whatever name; it keeps its meaning, its number and its files."""
    other_base = open_registry("other")
    push(registry, "sql", A, B)
    push(registry, "twin", B)
    push(other_base, "far", B)
    found = registry.quarantine(B, "it gave NaN.", who="server")
    assert [version.model_id for version in found] == ["sql@2", "twin@1"]
    assert not registry.quarantine(B, "again", who="server"), "those that were served until now"
    for name, version in (("sql", None), ("sql", 2), ("twin", None)):
        with pytest.raises(AdapterQuarantined, match="it gave NaN"):
            registry.get(name, version)
        assert registry.look(name, version).state == "quarantined"
    assert registry.get("sql", 1).digest == A
    assert other_base.get("far").digest == B
    assert B in registry.live_digests()
    assert said(registry, "twin")[-1] == "server: quarantine twin@1, twin@1 to twin@1"
    with pytest.raises(AdapterQuarantined):
        open_registry().get("sql")


def test_what_ends_a_quarantine(registry: Registry):
    push(registry, "sql", A, B, C)
    registry.quarantine(C, "it gave NaN.", who="server")
    assert registry.rollback("sql", who="me").version.digest == B
    with pytest.raises(AdapterQuarantined):
        registry.rollback("sql", 3, who="me")
    registry.quarantine(B, "it gave NaN.", who="server")
    assert registry.delete("sql", 2, who="me")[0].state == "quarantined"
    assert registry.get("sql").digest == A
    change = publish(registry, "sql", C, proof={"passed": True, "seconds": 2})
    assert (change.version.version, change.version.state, change.is_new) == (3, "ready", False)
    assert registry.get("sql") == change.version
    assert change.version.proof == {"passed": True, "seconds": 2}
    assert change.version.quarantine is None


def test_the_current_version_in_quarantine_is_lifted_by_its_own_files(registry: Registry):
    publish(registry, "sql", A, proof={"seconds": 1})
    registry.quarantine(A, "it gave NaN.", who="server")
    lifted = publish(registry, "sql", A, proof={"seconds": 2})
    assert (lifted.version.version, lifted.version.proof) == (1, {"seconds": 2})
    assert registry.get("sql").proof == {"seconds": 2}
    assert registry.events("sql")[0][0].detail["lifted"] == "quarantine"


def test_a_rollback_passes_over_what_is_in_quarantine(registry: Registry):
    push(registry, "sql", A, B, C)
    registry.quarantine(B, "it gave NaN.", who="server")
    assert registry.rollback("sql", who="me").version.digest == A


def test_proofs_are_those_of_these_files_on_this_base(registry: Registry, open_registry: Open):
    publish(registry, "one", A, proof={"n": 1})
    publish(registry, "two", A, proof={"n": 2})
    publish(registry, "three", A)
    publish(open_registry("other"), "one", A, proof={"n": 3})
    assert sorted(proof["n"] for proof in registry.proofs(A)) == [1, 2]
    assert registry.proofs(B) == []
    registry.quarantine(A, "it gave NaN.", who="server")
    assert registry.proofs(A) == [], "they are not believed any more"


def test_a_version_without_report_and_proof_gets_them(registry: Registry):
    publish(registry, "sql", A)
    version = publish(registry, "sql", A, report={"rank": 4}, proof={"n": 1}).version
    assert (version.report, version.proof) == ({"rank": 4}, {"n": 1})
    assert registry.get("sql") == version
    assert publish(registry, "sql", A, report={"rank": 5}, proof={"n": 2}).version == version, "and keeps them"
