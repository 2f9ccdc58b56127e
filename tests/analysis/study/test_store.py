"""The result store: whole cells or none, with several writers and under kill -9."""

import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pandas as pd
import pytest

from analysis.measure.shard import measure
from analysis.perturb.condition import Condition
from analysis.perturb.masks import DropTop
from analysis.study.store import DamagedCells, Store, cell_key
from analysis.study.tables import SCHEMA, TABLES

WRITERS = Path(__file__).with_name("writers.py")
IDENTITY = {
    "model": "0" * 64,
    "data": "1" * 64,
    "condition": Condition(DropTop(1)).to_dict(),
    "calibration": "2" * 64,
    "batch_size": 16,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
    "cpu_capability": "AVX2",
    "torch": "2.13.0",
    "source": "3" * 64,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


@pytest.fixture
def cells(model_of, shard):
    """The clean one and one with a condition."""
    return measure(model_of("cartesian"), [Condition(DropTop(1), "stage 1")], shard)


def write_in_processes(path, mode, *numbers) -> pd.DataFrame:
    """The log of `writers.py`: key, added."""
    log = path.with_name("log")
    command = [sys.executable, str(WRITERS), mode, str(path), str(log), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    # The last line of a killed process may be cut off.
    lines = [line.split() for line in log.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    return pd.DataFrame(lines, columns=["key", "added"]).astype({"added": int})


def damage_of(path, acknowledged, sequences=40) -> dict[str, int]:
    """What is wrong with a store that `writers.py` has filled."""
    with Store(path) as store:
        keys = store.keys()
        tables = [store.read(name, keys) for name in ("losses", "routing")]
    with closing(sqlite3.connect(path)) as db:
        orphans = sum(
            db.execute(
                f"SELECT count(*) FROM {t} WHERE cell NOT IN (SELECT id FROM cells)"
            ).fetchone()[0]
            for t in ("losses", "routing")
        )
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    counts = [table.groupby("key").size().reindex(sorted(keys), fill_value=0) for table in tables]
    duplicated = [table.duplicated(["key", "sequence_id"]).sum() for table in tables]
    mixed = (tables[0].nll_sum - 0.5 != tables[1].flips).sum()
    return {
        "lost": len(set(acknowledged) - keys),
        "torn": sum(int((count != sequences).sum()) for count in counts),
        "duplicated": int(sum(duplicated)),
        "orphans": orphans,
        "mixed": int(mixed),
    }


NO_DAMAGE = dict.fromkeys(["lost", "torn", "duplicated", "orphans", "mixed"], 0)


# ---- cells come back


def test_round_trip(path, cells):
    with Store(path) as store:
        assert store.keys() == set()
        for number, cell in enumerate(cells):
            assert store.add({"cell": number}, cell)
        wanted = [cell_key({"cell": number}) for number in range(2)]
        assert store.keys() == set(wanted)
    with Store(path) as store:
        for key, cell in zip(wanted, cells, strict=True):
            losses = store.read("losses", [key])
            assert (losses.pop("key") == key).all()
            pd.testing.assert_frame_equal(
                losses, cell.losses[[*TABLES["losses"]]], check_exact=True, check_dtype=False
            )
            routing = store.read("routing", [key]).drop(columns="key")
            pd.testing.assert_frame_equal(
                routing.astype(float, errors="ignore"),
                cell.routing.reindex(columns=[*TABLES["routing"]]),
                check_exact=True,
                check_dtype=False,
            )
        assert len(store.read("losses", wanted)) == sum(len(c.losses) for c in cells)
        assert store.read("losses", []).empty
        assert list(store.read("losses", ["unknown"])) == ["key", *TABLES["losses"]]


def test_a_dense_cell_has_no_routing(path, model_of, shard):
    (cell,) = measure(model_of("dense"), [], shard)
    with Store(path) as store:
        assert store.add({}, cell)
        assert store.read("routing", store.keys()).empty


def test_the_first_writer_stays(path, cells):
    with Store(path) as store, Store(path) as other:
        assert store.add(IDENTITY, cells[0])
        assert not other.add(IDENTITY, cells[1])
        assert not store.add(IDENTITY, cells[0])
        assert other.read("losses", other.keys()).nll_sum.equals(cells[0].losses.nll_sum)
        assert len(store.read("losses", store.keys())) == len(cells[0].losses)


def test_a_failed_add_leaves_nothing(path, cells):
    with Store(path) as store:
        with closing(sqlite3.connect(path)) as db:
            refuse = "BEGIN SELECT RAISE(ABORT, 'no'); END"
            db.execute(f"CREATE TRIGGER broken BEFORE INSERT ON routing {refuse}")
            with pytest.raises(ValueError, match=r"results\.sqlite is damaged: no"):
                store.add(IDENTITY, cells[0])
            db.execute("DROP TRIGGER broken")
        assert store.keys() == set()
        assert store.add(IDENTITY, cells[0])
        assert len(store.read("losses", store.keys())) == len(cells[0].losses)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM losses").fetchone() == (len(cells[0].losses),)


def test_a_ctrl_c_while_a_cell_is_written(path, cells, monkeypatch):
    """It is raised afterwards, also where code below lets go of it, as C code now and then does."""
    assign = pd.DataFrame.assign

    def letting_go(frame, **columns):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return assign(frame, **columns)

    with Store(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(pd.DataFrame, "assign", letting_go)
            with pytest.raises(KeyboardInterrupt):
                store.add(IDENTITY, cells[0])
        assert len(store.read("losses", [cell_key(IDENTITY)])) == len(cells[0].losses)


def test_tokens(path, model_of, shard):
    model = model_of("cartesian")
    cells = measure(model, [Condition(DropTop(1))], shard, keep_tokens=True)
    with Store(path) as store:
        for number, cell in enumerate(cells):
            store.add({"cell": number}, cell)
        for number, cell in enumerate(cells):
            got = store.read("tokens", [cell_key({"cell": number})]).drop(columns="key")
            expected = cell.tokens.reindex(columns=got.columns)
            assert got.targets.isna().all() == (number == 1)
            pd.testing.assert_frame_equal(got.fillna(0), expected.fillna(0), check_dtype=False)


def test_many_rows_are_read_in_parts(path, cells, monkeypatch):
    with Store(path) as store:
        for number in range(5):
            store.add({"cell": number}, cells[1])
        whole = {t: store.read(t, store.keys()) for t in ("losses", "routing")}
        monkeypatch.setattr("analysis.study.store.ROWS", 7)  # parts of 7 rows, the last one empty
        for table, expected in whole.items():
            pd.testing.assert_frame_equal(store.read(table, store.keys()), expected)


def test_failures(path, cells):
    """Kept until the cell is measured."""
    with Store(path) as store:
        store.fail(IDENTITY, "it died", 3)
        store.fail(IDENTITY | {"threads": 2}, "it died", 3)
        store.fail(IDENTITY, "it died again", 6)
        assert len(store.failures()) == 2
        assert store.keys() == set()
        store.add(IDENTITY | {"threads": 2}, cells[0])
        (row,) = store.failures().to_dict("records")
    assert row == {"key": cell_key(IDENTITY), "reason": "it died again", "attempts": 6}


def test_seconds(path, cells):
    with Store(path) as store:
        store.add(IDENTITY, cells[0])
        assert store.seconds() == {cell_key(IDENTITY): cells[0].seconds}


# ---- keys


@pytest.mark.parametrize("field", IDENTITY)
def test_every_field_is_part_of_the_key(field):
    for other in ("other", None, 17):
        assert cell_key(IDENTITY | {field: other}) != cell_key(IDENTITY)
    assert cell_key({k: v for k, v in IDENTITY.items() if k != field}) != cell_key(IDENTITY)


def test_keys_do_not_depend_on_order():
    assert cell_key(dict(reversed(IDENTITY.items()))) == cell_key(IDENTITY)


# ---- other files


def test_a_file_of_something_else(path):
    path.write_bytes(b"this is no database, but long enough to be taken for one" * 100)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is not a result store"):
        Store(path)
    assert path.read_bytes() == before


def test_a_directory(path):
    path.mkdir()
    with pytest.raises(ValueError, match="is not a result store"):
        Store(path)


def test_a_damaged_store(path, cells):
    with Store(path) as store:
        store.add(IDENTITY, cells[0])
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 200 + content[200:])
    with pytest.raises(ValueError, match="is not a result store"):
        Store(path)


@pytest.mark.parametrize("damage", ["flips", "cuts"])
def test_damage_is_refused_by_name_or_without_effect(path, cells, damage):
    with Store(path) as store:
        for number, cell in enumerate(cells):
            store.add({"cell": number}, cell)
        store.fail(IDENTITY, "died", 3)

    def read():
        with Store(path, readonly=True) as store:
            keys = store.keys()
            tables = [store.read(table, keys).to_csv() for table in TABLES]
            return *tables, store.seconds(), store.failures().to_csv()

    def damaged():
        if damage == "cuts":
            yield from (content[:length] for length in range(0, len(content), 512))
            return
        draw, used = random.Random(0), [place for place, byte in enumerate(content) if byte]
        for place in draw.sample(used, 200):
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            yield flipped

    content, expected, refused = path.read_bytes(), read(), 0
    for changed in damaged():
        path.write_bytes(changed)
        try:
            found = read()
        except (ValueError, OSError) as error:
            found, said = None, str(error)
        if found is None:
            assert str(path) in said
            refused += 1
        else:
            assert found == expected
    assert refused > 50


def test_damaged_cells_are_named_and_removed(path, cells):
    with Store(path) as store:
        for number, cell in enumerate(cells):
            store.add({"cell": number}, cell)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE routing SET flips = flips + 1 WHERE cell = 2 AND sequence_id > 0")
        wanted = [cell_key({"cell": number}) for number in range(2)]
        assert len(store.read("losses", wanted)) == sum(len(c.losses) for c in cells)
        with pytest.raises(DamagedCells, match="1 cells are not as they were written") as damaged:
            store.read("routing", wanted)
        assert damaged.value.keys == wanted[1:]
        store.remove(damaged.value.keys)
        assert store.keys() == set(wanted[:1])
        assert store.add({"cell": 1}, cells[1])
        assert len(store.read("routing", wanted)) == sum(len(c.routing) for c in cells)


def test_readonly(path, cells):
    with pytest.raises(FileNotFoundError, match=r"there are no results at .*results\.sqlite"):
        Store(path, readonly=True)
    assert not path.exists()
    with Store(path) as store:
        store.add(IDENTITY, cells[0])
    with (
        Store(path, readonly=True) as store,
        pytest.raises(OSError, match=r"results\.sqlite: attempt to write a readonly database"),
    ):
        store.add(IDENTITY, cells[0])


@pytest.mark.parametrize("version", [1, SCHEMA + 1])
def test_another_version(path, version):
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={version}")
    db.close()
    with pytest.raises(ValueError, match=rf"schema version {version}; this program reads {SCHEMA}"):
        Store(path)


def test_a_database_of_another_program(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(ValueError, match="schema version 0"):
        Store(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    db.close()


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    with Store(path) as store:
        assert store.keys() == set()


# ---- several writers, and kills


def test_opened_at_once(path):
    """A store that is not there yet, by 8 processes: they wait for each other, 25 times."""
    log = write_in_processes(path, "opened", 8, 25)
    assert len(log) == log.added.sum() == 8 * 25


def test_writers_at_once(path):
    """All of them open a store that is not there yet, and add the same cells."""
    log = write_in_processes(path, "together", 6, 12)
    assert len(log) == 6 * 12
    assert log.groupby("key").added.sum().tolist() == [1] * 12  # one was first, once
    assert damage_of(path, log.key) == NO_DAMAGE


def test_killed_writers(path):
    log = write_in_processes(path, "killed", 4, 0)
    assert damage_of(path, log.key) == NO_DAMAGE


@pytest.mark.slow
def test_many_killed_writers(path, record_property, capsys):
    log = write_in_processes(path, "killed", 20, 1)
    damage = damage_of(path, log.key)
    with capsys.disabled():
        print(f"\n20 kills, {len(log)} acknowledged cells: {damage}")
    assert len(log) > 20
    assert damage == NO_DAMAGE


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "different"), [("together", 200), ("apart", 8 * 200)])
def test_many_writers_at_once(path, capsys, mode, different):
    """Each adds 200 cells: all the same ones, or each its own."""
    log = write_in_processes(path, mode, 8, 200)
    damage = damage_of(path, log.key)
    with capsys.disabled():
        print(f"\n8 writers x 200 cells, {different} different: {log.added.sum()} added, {damage}")
    assert len(log) == 8 * 200
    assert log.groupby("key").added.sum().tolist() == [1] * different
    assert damage == NO_DAMAGE
