import json
import os
from pathlib import Path

import numpy as np
import pytest

from attnlab import claims, lab, records
from attnlab.claims import ClaimError, declaration

TOML = """
[overlap]
statement = "Two tasks use <largely> the same heads."
paper_value = "25 of 32 heads (78%)"
source = "abstract"
source_read = false
quantity = "heads in both top lists"
unit = "heads"
confirm = "exceeds(value, chance) and exceeds(value, control)"
refute = "not exceeds(value, chance)"
setting = "a small model, 24 prompts"
controls = ["chance", "control"]
seeds = [0]

[repair]
statement = "Forcing four heads repairs the answer."
paper_value = "49.6 to 93.7"
source = "section 5"
source_read = true
quantity = "gain in accuracy"
unit = "percentage points"
confirm = "value > 20"
refute = "value < 5"
applies = "within(value, -50, 50)"
setting = "the same"
seeds = []
"""
CONTROLS = {"chance": 0.73, "control": (4.0, (2.0, 6.0))}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """One declared paper, and a folder of our own for what is measured."""
    (tmp_path / "toml").mkdir()
    (tmp_path / "toml" / "circuit-reuse.toml").write_text(TOML)
    monkeypatch.setattr(declaration, "FOLDER", tmp_path / "toml")
    monkeypatch.setenv("ATTNLAB_OUT", str(tmp_path / "out"))


def declare(old: str, new: str) -> None:
    assert old in TOML
    (declaration.FOLDER / "circuit-reuse.toml").write_text(TOML.replace(old, new, 1))


def overlap(value=10.0, interval=(8.0, 12.0), controls=CONTROLS, **more) -> claims.Card:
    return claims.check("circuit-reuse/overlap", value, interval=interval, controls=controls, **more)


def written() -> list[Path]:
    return sorted((lab.out_dir() / "claims").glob("*"))


class TestVerdicts:
    @pytest.mark.parametrize(
        ("value", "interval", "verdict"),
        [
            (10, (8, 12), "confirmed"),
            (1, (0.5, 2), "refuted"),
            (5, (4, 7), "not distinguishable"),  # above chance, not above the control
        ],
    )
    def test_the_rule_decides(self, value, interval, verdict):
        assert overlap(value, interval).verdict == verdict

    @pytest.mark.parametrize(
        ("value", "verdict"),
        [(30, "confirmed"), (0, "refuted"), (10, "not distinguishable"), (60, "different setting")],
    )
    def test_a_claim_that_does_not_apply_is_a_different_setting(self, value, verdict):
        assert claims.check("circuit-reuse/repair", value).verdict == verdict

    def test_rules_that_hold_together_are_an_error(self):
        declare("value < 5", "value < 30")
        with pytest.raises(ClaimError, match="circuit-reuse/repair: confirm and refute must exclude each other"):
            claims.check("circuit-reuse/repair", 25)
        assert written() == []


class TestDeclarations:
    def test_what_is_declared_is_read(self):
        assert claims.declared() == ["circuit-reuse"]
        claim = claims.load("circuit-reuse")["overlap"]
        assert (claim.name, claim.controls, claim.seeds) == ("circuit-reuse/overlap", ("chance", "control"), (0,))
        assert claims.load("circuit-reuse")["repair"].applies is not None

    def test_unknown_names_are_answered_with_close_ones(self):
        with pytest.raises(ClaimError, match="circuit-reuse/overlp: no such claim; did you mean 'overlap'"):
            claims.check("circuit-reuse/overlp", 1)
        with pytest.raises(ClaimError, match=r"circuit-resue: no claims.*did you mean 'circuit-reuse'"):
            claims.check("circuit-resue/overlap", 1)
        with pytest.raises(ClaimError, match="circuit-reuse: no such claim; there is 'overlap', 'repair'"):
            claims.check("circuit-reuse", 1)

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            ("[overlap]", "[Over_lap]", "circuit-reuse/Over_lap: an id is"),
            ("[overlap]", "overlap = 3\n[other]", "circuit-reuse/overlap: a claim is a table"),
            ('unit = "heads"\n', "", "circuit-reuse/overlap: missing: unit"),
            ('unit = "heads"', 'units = "heads"\nunit = ""', "unknown: units; did you mean 'unit'"),
            ('unit = "heads"', 'unit = ""', "unit: is empty"),
            ('unit = "heads"', "unit = 3", "unit: str is wanted, not 3"),
            ("source_read = false", 'source_read = "no"', "source_read: bool is wanted"),
            ("source_read = false", "source_read = false\nours = 1", "ours: bool is wanted"),
            ("seeds = [0]", 'seeds = ["0"]', "seeds: a list of integers"),
            ("seeds = [0]", "seeds = [true]", "seeds: a list of integers"),
            ("seeds = [0]", "seeds = 0", "seeds: list is wanted"),
            ('["chance", "control"]', '["chance"]', "confirm: the rule .* fails at 'control'"),
            ('["chance", "control"]', '["chance", "control", "other"]', "controls: no rule looks at other"),
            ('["chance", "control"]', '["chance", "value"]', "controls: a name other than 'value'"),
            ('["chance", "control"]', '["chance", "my control"]', "controls: a name other than 'value'"),
            ('"value > 20"', '"3 > 2"', "circuit-reuse/repair: confirm: the rule does not look at 'value'"),
            ('"value > 20"', '"value >"', "circuit-reuse/repair: confirm: .*no expression"),
            ('"within(value, -50, 50)"', '"value"', "circuit-reuse/repair: applies: "),
            ("[overlap]", "[overlap", "circuit-reuse.toml: no TOML"),
        ],
    )
    def test_a_wrong_declaration_is_refused_when_it_is_read(self, old, new, complaint):
        declare(old, new)
        with pytest.raises(ClaimError, match=complaint):
            claims.load("circuit-reuse")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("value > 20", "value > 21"),
            ("value < 5", "value < 4"),
            ("-50, 50", "-50, 51"),
            ("percentage points", "%"),
            ("gain in accuracy", "loss of accuracy"),
        ],
    )
    def test_the_hash_changes_with_all_that_judges(self, old, new):
        before = claims.get("circuit-reuse/repair").rule_hash
        declare(old, new)
        assert claims.get("circuit-reuse/repair").rule_hash != before

    def test_the_hash_ignores_how_the_rule_is_laid_out(self):
        before = claims.get("circuit-reuse/repair").rule_hash
        declare("value > 20", "value   >  20")
        assert claims.get("circuit-reuse/repair").rule_hash == before


class TestMeasurements:
    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"value": float("nan")}, "value: a finite number"),
            ({"value": float("inf")}, "value: a finite number"),
            ({"value": "10"}, "value: one number is wanted"),
            ({"value": True}, "value: one number is wanted"),
            ({"value": None}, "value: one number is wanted"),
            ({"value": np.arange(3)}, "value: one number is wanted"),
            ({"interval": None}, "value: the rule .* needs its interval"),
            ({"interval": (11, 12)}, r"value: the interval \(11, 12\) does not contain the value 10"),
            ({"interval": (12, 8)}, "does not contain the value"),
            ({"interval": (8, float("inf"))}, "value: hi: a finite number"),
            ({"interval": (8, 9, 12)}, r"value: an interval is \(lo, hi\)"),
            ({"interval": 3}, r"value: an interval is \(lo, hi\)"),
            (
                {"controls": None},
                "controls: the claim declares chance, control; missing or superfluous: chance, control",
            ),
            ({"controls": {"chance": 1}}, "missing or superfluous: control"),
            ({"controls": {**CONTROLS, "other": 1}}, "missing or superfluous: other"),
            ({"controls": {**CONTROLS, "chance": float("nan")}}, "chance: a finite number"),
            ({"controls": {**CONTROLS, "control": (4, (5, 6))}}, "control: the interval"),
            ({"controls": {**CONTROLS, "control": (4, 5, 6)}}, r"control: a control is a number or"),
            ({"seconds": float("nan")}, "seconds: a finite number"),
        ],
    )
    def test_a_measurement_out_of_order_is_refused_and_not_recorded(self, change, complaint):
        with pytest.raises(
            ClaimError, match=f"circuit-reuse/overlap: {complaint}|circuit-reuse/overlap: .*{complaint}"
        ):
            overlap(**change)
        assert written() == []

    def test_numbers_of_libraries_are_numbers(self):
        assert overlap(np.float32(10), (np.int64(8), np.float64(12))).row["value"] == 10.0

    def test_a_mean_may_miss_its_interval_by_a_rounding_error(self):
        mean = float(np.mean([0.1, 0.1, 0.1])) * 100
        assert overlap(mean, (10.0, 10.0)).verdict == "confirmed"

    def test_a_claim_without_controls_refuses_one(self):
        with pytest.raises(ClaimError, match="the claim declares none; missing or superfluous: chance"):
            claims.check("circuit-reuse/repair", 30, controls={"chance": 1})


class TestRows:
    def test_the_row_has_everything_that_the_verdict_rests_on(self):
        card = overlap(seconds=1.5)
        (file,) = written()
        row = json.loads(file.read_text())
        assert file.name == "circuit-reuse--overlap.json"
        assert row == card.row
        assert row["schema"] == 1
        assert row["claim"] == "circuit-reuse/overlap"
        assert (row["value"], row["interval"], row["unit"]) == (10.0, [8.0, 12.0], "heads")
        assert row["controls"] == {
            "chance": {"value": 0.73, "interval": None},
            "control": {"value": 4.0, "interval": [2.0, 6.0]},
        }
        assert row["verdict"] == "confirmed"
        assert row["rule"]["refute"] == "not exceeds(value, chance)"
        assert (row["seeds"], row["seconds"], row["origin"]) == ([0], 1.5, "run")
        assert row["machine"]["cpus"] == os.cpu_count()
        assert set(row["machine"]) == {"platform", "cpus", "gpu"}
        assert set(row["versions"]) == {"python", "torch", "attnlab"}
        assert row["date"].startswith("20")

    def test_a_second_run_replaces_the_first(self):
        overlap()
        overlap(1, (0.5, 2))
        (row,) = claims.rows()
        assert row["verdict"] == "refuted"
        assert len(written()) == 1

    def test_rows_of_records_are_read_beside_runs(self, tmp_path):
        overlap()
        row = claims.measure("circuit-reuse/repair", 30, origin="record")
        records = tmp_path / "records"
        records.mkdir()
        (records / "gpu.json").write_text(json.dumps({"schema": 1, "rows": [{"case": "speed", "ms": 3}, row]}))
        found = claims.rows(records=records)
        assert [(r["claim"], r["origin"], r["stale"]) for r in found] == [
            ("circuit-reuse/overlap", "run", False),
            ("circuit-reuse/repair", "record", False),
        ]

    def test_a_value_from_a_record_names_the_machine_and_the_day_of_the_record(self, tmp_path):
        made = {
            "schema": 1,
            "command": "python -m somewhere",
            "commit": "0123abc",
            "date": "2026-01-02T03:04:05+00:00",
            "machine": {"platform": "Linux", "cpus": 16, "gpu": "Some GPU"},
            "versions": {"python": "3.9", "torch": "1.0"},
            "rows": [],
        }
        (tmp_path / "gpu.json").write_text(json.dumps(made))
        card = overlap(record=records.load("gpu", tmp_path))
        assert "Seed 0; Some GPU; 2026-01-02" in repr(card)
        (row,) = claims.rows()
        assert {key: row[key] for key in ("machine", "versions", "date")} == {
            key: made[key] for key in ("machine", "versions", "date")
        }
        assert (row["origin"], row["verdict"]) == ("record", "confirmed")
        assert claims.measure("circuit-reuse/repair", 30)["origin"] == "run"

    def test_measuring_alone_writes_nothing(self):
        claims.measure("circuit-reuse/repair", 30)
        assert written() == []

    def test_a_row_under_another_rule_is_stale(self):
        claims.check("circuit-reuse/repair", 30)
        declare("value > 20", "value > 40")
        (row,) = claims.rows()
        assert row["stale"]

    @pytest.mark.parametrize("content", ["[]", '{"claim": "circuit-reuse/overlap"}'])
    def test_a_file_that_is_no_row_is_named(self, tmp_path, content):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ClaimError, match=r"bad.json: this is no row"):
            claims.rows(tmp_path)

    def test_a_row_of_another_schema_is_named(self):
        card = claims.check("circuit-reuse/repair", 30)
        written()[0].write_text(json.dumps({**card.row, "schema": 2}))
        with pytest.raises(ClaimError, match="schema 2 of circuit-reuse/repair"):
            claims.rows()


class TestAudit:
    @pytest.fixture
    def complete(self):
        overlap()
        claims.check("circuit-reuse/repair", 30)
        return claims.rows()

    def test_a_complete_ledger_has_no_problems(self, complete):
        assert claims.audit(["circuit-reuse"], complete) == []

    def test_what_is_declared_must_be_recorded(self, complete):
        assert claims.audit(["circuit-reuse"], complete[:1]) == ["circuit-reuse/repair: declared but not recorded"]

    def test_papers_that_have_no_chapter_are_left_alone(self):
        assert claims.audit([], []) == []

    def test_a_chapter_without_claims_is_a_problem(self):
        assert claims.audit(["aaren"], []) == ["aaren: no claims are declared"]

    def test_what_is_recorded_must_be_declared(self, complete):
        strays = [{**complete[0], "claim": name} for name in ("circuit-reuse/other", "aaren/x")]
        found = claims.audit(["circuit-reuse"], [*complete, *strays])
        assert found == ["circuit-reuse/other: recorded but not declared", "aaren/x: recorded but not declared"]

    def test_a_stale_row_is_a_problem(self, complete):
        declare("value > 20", "value > 25")
        (problem,) = claims.audit(["circuit-reuse"], complete)
        assert problem.startswith("circuit-reuse/repair: recorded under another rule (run of 20")

    def test_a_verdict_set_by_hand_is_a_problem(self, complete):
        complete[1]["verdict"] = "refuted"
        assert claims.audit(["circuit-reuse"], complete) == [
            "circuit-reuse/repair: recorded as 'refuted', but the rule says 'confirmed'"
        ]

    def test_a_run_with_other_seeds_is_a_problem_and_a_record_may_have_them(self, complete):
        complete[0]["seeds"] = [7]
        (problem,) = claims.audit(["circuit-reuse"], complete)
        assert problem == "circuit-reuse/overlap: recorded with seeds [7], declared with [0]"
        complete[0]["origin"] = "record"
        assert claims.audit(["circuit-reuse"], complete) == []

    def test_one_claim_and_no_control_is_too_little(self, complete):
        (declaration.FOLDER / "circuit-reuse.toml").write_text(TOML[TOML.index("[repair]") :])
        found = claims.audit(["circuit-reuse"], complete[1:])
        assert found == [
            "circuit-reuse: fewer than two claims are declared",
            "circuit-reuse: no claim has a control that could refute it",
        ]


def test_every_declaration_of_the_package_can_be_read(monkeypatch):
    monkeypatch.setattr(declaration, "FOLDER", Path(declaration.__file__).parent)
    from attnlab import papers

    for slug in claims.declared():
        assert slug in papers.all()
        assert len(claims.load(slug)) >= 2
