"""Tables of pairs: what is read, and the message of everything that cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attnlab.circuits import HookedLM
from attnlab.circuits.pair_files import EXAMPLE, PairFileError, from_text, load, parse

HEAD = "clean,corrupt,answer,foil\n"
GOOD = "t2 t3 t4,t2 t5 t4,t6,t7\n"
ROW = {"clean": "t2 t3 t4", "corrupt": "t2 t5 t4", "answer": "t6", "foil": "t7"}


@pytest.fixture(scope="module")
def tokenizer(lm: HookedLM):
    return lm.tokenizer


def problems(text: str, tokenizer, **how) -> list[str]:
    with pytest.raises(PairFileError) as caught:
        from_text(text, tokenizer, "mine", **how)
    return [str(problem) for problem in caught.value.problems]


def test_csv_and_json_give_the_same_pairs(tokenizer):
    table = from_text(HEAD + GOOD, tokenizer)
    assert len(table) == 1
    assert from_text(json.dumps([ROW]), tokenizer).digest == table.digest
    assert from_text(json.dumps({"pairs": [ROW]}), tokenizer).digest == table.digest


@pytest.mark.parametrize("separator", [";", "\t"])
def test_spreadsheets_may_separate_otherwise(tokenizer, separator):
    text = (HEAD + GOOD).replace(",", separator)
    assert from_text(text, tokenizer).digest == from_text(HEAD + GOOD, tokenizer).digest


def test_what_does_not_matter_is_passed_over(tokenizer):
    text = "id, Foil ,answer,corrupt,clean\n\n1,t7,t6,t2 t5 t4,t2 t3 t4\n,,,,\n"
    assert from_text(text, tokenizer).digest == from_text(HEAD + GOOD, tokenizer).digest


def test_several_answers_are_separated_by_a_bar_or_listed(tokenizer):
    table = from_text(HEAD + "t2 t3,t2 t5,t6|t8,t7|t9\n", tokenizer)
    assert table.pairs[0].answers == ("t6", "t8")
    listed = {"clean": "t2 t3", "corrupt": "t2 t5", "answer": ["t6", "t8"], "foil": ["t7", "t9"]}
    assert from_text(json.dumps([listed]), tokenizer).digest == table.digest


def test_a_space_before_an_answer_stays():
    rows, wrong = parse(EXAMPLE)
    assert wrong == []
    assert len(rows) == 8
    assert rows[0].answers == (" Mary",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "there is nothing; the first line of a CSV is clean,corrupt,answer,foil"),
        (HEAD, "it has no rows; put at least one pair below the header"),
        ("[]", "it has no rows"),
        ("clean,corrupt,answer\na,b,c\n", "column foil is missing (there are clean, corrupt, answer); add it"),
        ("clean,corupt,answer,foil\na,b,c,d\n", "column corrupt is missing (there are clean, corupt, answer, foil); did you mean 'corupt'"),
        ("clean,clean,corrupt,answer,foil\na,a,b,c,d\n", "column clean occurs twice; keep one"),
        (HEAD + "t2 t3,t2 t4,,t7\n", "row 1 (line 2), column answer: the cell is empty; write one token"),
        (HEAD + "  ,t2 t4,t6,t7\n", "row 1 (line 2), column clean: the cell is empty; write a prompt"),
        (HEAD + GOOD + "t2 t3,t2 t4,t6,t7,t8\n", "row 2 (line 3): it has 5 cells and the header 4; put quotes"),
        (HEAD + '"t2 t3,t2 t4,t6,t7\n', "row 1 (line 2): the quotes do not close"),
        (HEAD + GOOD + "\n" + GOOD, "row 2 (line 4): it is the same as row 1; remove one"),
        (HEAD + "t2 t3,t2 t3,t6,t7\n", "row 1 (line 2), column corrupt: it is the same prompt as clean"),
        (HEAD + "t2 t3 t4,t2 t5,t6,t7\n", "clean has 3 tokens and corrupt 2, they part at token 1 ('t3 t4' / 't5')"),
        (HEAD + "t2 t3,t2 t5,t6 t8,t7\n", "column answer: 't6 t8' is 2 tokens ('t6', 't8') and metrics read one"),
        (HEAD + "t2 t3,t2 t5,zebra,t7\n", "column answer: 'zebra' is not in the model's vocabulary"),
        (HEAD + "t2 t3,t2 t5,t6,t6\n", "column foil: 't6' is an answer too; choose a word that is wrong"),
        ('[{"clean": "a"', "it is no JSON: "),
        ('{"rows": []}', "the JSON is no list of pairs; write [{"),
        ('["a"]', "row 1: it is a text; write an object with clean, corrupt, answer, foil"),
        ("[null]", "row 1: it is null; write an object"),
        (json.dumps([{k: v for k, v in ROW.items() if k != "foil"}]), "row 1, column foil: the key is missing (there are clean, corrupt, answer)"),
        (json.dumps([ROW | {"answer": 32}]), 'row 1, column answer: the value is a number; write "32"'),
        (json.dumps([ROW | {"clean": ["t2"]}]), "row 1, column clean: the value is a list; write a text in quotes"),
        (json.dumps([ROW | {"answer": []}]), "row 1, column answer: the cell is empty"),
    ],
)  # fmt: skip
def test_every_problem_says_where_and_what_would_do(tokenizer, text, message):
    assert message in "\n".join(problems(text, tokenizer))


def test_prompts_longer_than_the_model_reads(tokenizer):
    (only,) = problems(HEAD + GOOD, tokenizer, context=2)
    assert "3 tokens are more than the 2 that the model reads" in only


def test_all_problems_are_said_together_in_the_order_of_the_rows(tokenizer):
    text = HEAD + "t2 t3,t2 t4,,t7\n" + GOOD + "t2 t3,t2 t3,t6 t8,t7\n"
    found = problems(text, tokenizer, source="folder/mine.csv")
    assert [re.match(r"row (\d)", line)[1] for line in found] == ["1", "3", "3"]
    with pytest.raises(PairFileError, match=r"folder/mine.csv: 3 problems, nothing was run\n  folder/mine.csv, row 1"):
        from_text(text, tokenizer, source="folder/mine.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        ("clean,corrupt\nä,b\n".encode("latin-1"), "it is not UTF-8 (byte 0xe4 in line 2); save it again with the encoding UTF-8"),
        ("clean".encode("utf-16"), "it is not UTF-8 (UTF-16)"),
        (b"PK\x03\x04\x00\x00", "it holds zero bytes, so it is no text; save the table as CSV, not as XLSX"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, tokenizer, content, message):
    file = tmp_path / "pairs.csv"
    file.write_bytes(content)
    with pytest.raises(PairFileError, match=re.escape(message)) as caught:
        load(file, tokenizer)
    assert str(file) in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path, tokenizer):
    with pytest.raises(PairFileError, match=r"none.csv: 1 problem, nothing was run\n.*there is no such file"):
        load(tmp_path / "none.csv", tokenizer)
    with pytest.raises(PairFileError, match="this is a folder; name a CSV or JSON file in it"):
        load(tmp_path, tokenizer)


def test_a_file_names_its_data_and_may_carry_the_mark_of_a_spreadsheet(tmp_path: Path, tokenizer):
    file = tmp_path / "my pairs.csv"
    file.write_bytes(b"\xef\xbb\xbf" + (HEAD + GOOD).encode())
    pairs = load(file, tokenizer)
    assert pairs.name == "my pairs"
    assert pairs.digest == from_text(HEAD + GOOD, tokenizer).digest


def test_the_example_beside_the_notebook_is_the_one_of_the_package():
    from tools.chapters import ROOT

    assert (ROOT / "notebooks" / "explore" / "pairs.csv").read_text(encoding="utf-8") == EXAMPLE


@pytest.mark.model
def test_real_words_get_real_hints(smollm2_tokenizer):
    assert len(from_text(EXAMPLE, smollm2_tokenizer)) == 8
    text = HEAD + '"When Mary and John met, John gave","When Mary and John met, Mary gave",Zebediah, John\n'
    (only,) = problems(text, smollm2_tokenizer)
    assert "'Zebediah' is " in only
    assert " tokens ('" in only
