"""Every source gives the same rows with their places, and every bad input one clear error."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from prefixtune.data import Row, check_splits, load_rows, parse_fields
from prefixtune.data.row import field_text
from prefixtune.errors import ConfigError, DataError

ROWS = [
    {"instruction": "Say hello", "input": "", "output": "Hello"},
    {"instruction": "什么是三原色？", "input": "色", "output": "红、蓝、黄"},
    {"instruction": 'a "quote", a comma', "input": "two\nlines", "output": "done"},
]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    return str(caught.value)


def csv_text(rows: list[dict[str, Any]], separator: str = ",") -> str:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(
        separator.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in cells
    )


def saved_as(kind: str, folder: Path) -> str:
    if kind == "array.json":
        return write(folder / "rows.json", json.dumps(ROWS, indent=2, ensure_ascii=False))
    if kind == "lines.json":
        return write(folder / "rows.json", lines(ROWS))
    if kind in ("jsonl", "ndjson"):
        return write(folder / f"rows.{kind}", lines(ROWS))
    if kind == "bom.jsonl":
        return write(folder / "rows.jsonl", "\ufeff" + lines(ROWS))
    if kind == "csv":
        return write(folder / "rows.csv", "\ufeff" + csv_text(ROWS))
    if kind == "tsv":
        return write(folder / "rows.tsv", csv_text(ROWS, "\t"))
    table = datasets.Dataset.from_list(ROWS)
    if kind == "parquet":
        table.to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    saved: Any = (
        datasets.DatasetDict({"train": table, "dev": table.select([0])}) if kind == "splits" else table
    )
    saved.save_to_disk(folder / "rows")
    return str(folder / "rows")


KINDS = [
    "array.json", "lines.json", "jsonl", "ndjson", "bom.jsonl", "csv", "tsv", "parquet", "folder", "splits",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert [row.values for row in load_rows(saved_as(kind, tmp_path))] == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_limit_takes_the_first_rows_of_every_source(kind: str, tmp_path: Path) -> None:
    assert [row.values for row in load_rows(saved_as(kind, tmp_path), limit=2)] == ROWS[:2]


def test_limit_does_not_read_what_follows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", lines(ROWS[:2]) + "broken")
    assert len(load_rows(source, limit=2)) == 2
    assert "rows.jsonl:3" in refusal(source)
    with pytest.raises(ConfigError, match="limit: expected more than 0"):
        load_rows(source, limit=0)


def test_origin_of_a_json_line_is_its_line_even_after_blank_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", "\n" + lines(ROWS[:1]) + "  \r\n" + lines(ROWS[1:]))
    assert [row.origin for row in load_rows(source)] == ["rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:5"]


def test_a_unicode_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    source = write(tmp_path / "rows.jsonl", lines([{"output": text}, {"output": "next"}]))
    rows = load_rows(source)
    assert [row.values["output"] for row in rows] == [text, "next"]
    assert [row.origin for row in rows] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_origin_of_an_array_element_is_the_line_on_which_it_starts(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.json", '[\n{"a": "1"}, {"a":\n"2"},\n\n  {"a": "3"}\n]\n')
    assert [row.origin for row in load_rows(source)] == ["rows.json:2", "rows.json:2 (row 2)", "rows.json:5"]


def test_origin_of_a_csv_row_is_the_physical_line_on_which_it_starts(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", 'a,b\n"1\n1\n1",x\n\n2,y\n')
    assert [row.origin for row in load_rows(source)] == ["rows.csv:2", "rows.csv:6"]


@pytest.mark.parametrize(("kind", "origin"), [("parquet", "rows.parquet[2]"), ("folder", "rows[2]")])
def test_origin_of_a_row_without_lines_is_its_index(kind: str, origin: str, tmp_path: Path) -> None:
    assert load_rows(saved_as(kind, tmp_path))[2].origin == origin


def test_split_chooses_among_those_of_a_folder(tmp_path: Path) -> None:
    source = saved_as("splits", tmp_path)
    assert [row.values for row in load_rows(source, split="dev")] == ROWS[:1]
    message = refusal(source, split="test")
    assert "no split 'test'; there are train, dev" in message


def test_one_split_is_not_for_training_and_evaluation_both(tmp_path: Path) -> None:
    source, file = saved_as("splits", tmp_path), saved_as("jsonl", tmp_path)
    for same in (source, str(tmp_path / "x" / ".." / "rows")):
        with pytest.raises(ConfigError, match=r"the split 'train' is trained on.*\n.*--eval-split"):
            check_splits(source, same, split="train", eval_split="train")
    with pytest.raises(ConfigError, match="owner/rows: the split 'train'"):
        check_splits("owner/rows", "owner/rows", split="train", eval_split="train")
    check_splits(source, source, split="train", eval_split="dev")
    check_splits(source, "owner/rows", split="train", eval_split="train")
    for whole in (file, "demo", "none.json"):  # without splits, or told as missing by `load_rows`
        check_splits(whole, whole, split="train", eval_split="train")


def test_fields_rename_columns_and_leave_the_others(tmp_path: Path) -> None:
    source = write(tmp_path / "e2e.csv", "mr,ref,id\nname[X],X is nice.,7\n")
    rows = load_rows(source, fields=parse_fields("input=mr,output=ref"))
    assert rows == [Row(values={"id": "7", "input": "name[X]", "output": "X is nice."}, origin="e2e.csv:2")]


def test_fields_can_swap_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", "input,output\nq,a\n")
    assert load_rows(source, fields={"input": "output", "output": "input"})[0].values == {
        "input": "a",
        "output": "q",
    }


def test_a_mapped_column_that_is_absent_is_named_with_what_there_is(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"question": "q", "answer": "a"}\n')
    message = refusal(source, fields={"output": "reply"})
    assert "rows.jsonl:1: no 'reply' field; the row has question, answer" in message
    assert "--fields output=<column>" in message


def test_parse_fields_reads_pairs() -> None:
    assert parse_fields("input=mr, output = ref ") == {"input": "mr", "output": "ref"}
    assert parse_fields("input=customer rating") == {"input": "customer rating"}
    assert parse_fields('input=mr, "output=ref, final"') == {"input": "mr", "output": "ref, final"}
    assert parse_fields(None) == parse_fields(" ") == {}


@pytest.mark.parametrize(
    "text", ["input", "input=", "=mr", "input=mr,,output=ref", "input=mr,", "input=a,input=b", "a=b\nc=d"]
)
def test_parse_fields_refuses_what_is_no_pair(text: str) -> None:
    with pytest.raises(ConfigError, match="fields: "):
        parse_fields(text)


# each: file name, content, what the error must say
BAD = {
    "empty": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "white space only": ("a.json", b" \n\t\n", "a.json: the file is empty"),
    "only a byte order mark": ("a.csv", b"\xef\xbb\xbf", "a.csv: the file is empty"),
    "empty array": ("a.json", b"[ ]\n", "the data set is empty"),
    "header only": ("a.csv", b"instruction,output\n", "the data set is empty"),
    "malformed line": ("a.jsonl", b'{"a": "1"}\n{"a": oops}\n', "a.jsonl:2: column 7: malformed JSON"),
    "cut line": ("a.jsonl", b'{"a": "1"}\n{"a": "1', "a.jsonl:2: column 7: malformed JSON"),
    "two objects on a line": ("a.jsonl", b'{"a": "1"} {"a": "2"}\n', "a.jsonl:1: column 12: malformed JSON"),
    "malformed array": ("a.json", b'[\n{"a": "1"},\n{"a" "2"}\n]', "a.json:3: column 6: malformed JSON"),
    "array without comma": ("a.json", b'[\n{"a": "1"}\n{"a": "2"}\n]', "a.json:3: column 1: malformed JSON"),
    "array without end": ("a.json", b'[\n{"a": "1"},\n', "a.json:3: column 1: malformed JSON"),
    "trailing comma": ("a.json", b'[\n{"a": "1"},\n]', "a.json:3: column 1: malformed JSON"),
    "text after the array": ("a.json", b'[{"a": "1"}]\n  x', "a.json:2: column 3: malformed JSON"),
    "endless nesting": ("a.json", b"[" * 100_000, "a.json:1: column 1: malformed JSON: nested too deeply"),
    "the same field twice": ("a.jsonl", b'{"a": "1", "a": "2"}', "a.jsonl:1: column 1: malformed JSON: "
                             "the object has the field 'a' twice"),
    "array of texts": ("a.json", b'[\n"one",\n"two"]', "a.json:2: expected an object"),
    "the second row of a line": ("a.json", b'[{"a": 1}, 2]', "a.json:1 (row 2): expected an object"),
    "the third of three lines": ("a.json", b'[{"a": 1},\n {},\n 3]', "a.json:3: expected an object"),
    "array of lists": ("a.json", b'[[1, 2]]', "a.json:1: expected an object"),
    "lines of numbers": ("a.jsonl", b"1\n2\n", "a.jsonl:1: expected an object"),
    "a lone null": ("a.json", b"null", "a.json:1: expected an object"),
    "one object over lines": ("a.json", b'{\n"data": [1]\n}', "over several lines, with the fields data"),
    "array named jsonl": ("a.jsonl", b'[\n{"a": "1"}\n]', "one JSON array must be named .json"),
    "Latin-1": ("a.jsonl", '{"a": "x"}\n{"a": "é"}\n'.encode("latin-1"), "a.jsonl:2: expected text in UTF-8; "
                "got byte 0xe9 at offset 18"),
    "GB18030": ("a.csv", "问,答\n".encode("gb18030"), "iconv -f <its encoding"),
    "UTF-16": ("a.csv", "a,b\n1,2\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 a.csv"),
    "too few columns": ("a.csv", b"a,b\n1,2\n3\n", "a.csv:3: expected 2 columns (a, b); got 1"),
    "too many columns": ("a.csv", b"a,b\n1,2\n3,4,5\n", "a.csv:3: expected 2 columns (a, b); got 3"),
    "the same column twice": ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: the header names the column 'a' twice"),
    "a quote that is never closed": ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "a.csv:3: malformed CSV"),
    "text after a quote": ("a.csv", b'a,b\n"1"x,2\n', "a.csv:2: malformed CSV"),
    "no Parquet": ("a.parquet", b"PAR1 it is not", "a.parquet: not a readable Parquet file"),
    "unknown suffix": ("a.txt", b"text", "expected JSON, JSONL, NDJSON, CSV, TSV or Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    name, content, expected = BAD[case]
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    "source",
    ["nowhere.json", "NOWHERE.CSV", "./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "nowhere/", "a b"],
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(source: str) -> None:
    assert f"{source}: no such file or folder" in refusal(source)


def test_a_name_below_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert "data/trian: no such file or folder" in refusal("data/trian")


@pytest.mark.parametrize("name", ["no-such-set", "no-such-owner/v1.5"])
def test_a_hub_name_that_cannot_be_reached_says_so(name: str, tmp_path: Path) -> None:
    # in a process of its own: the hub's libraries read the offline switch once, at import
    code = f"""
from prefixtune.data import load_rows
from prefixtune.errors import DataError
try:
    load_rows({name!r})
except DataError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert f"{name}: no file or folder of this name here, and not loaded from the hub" in done.stdout
    assert "offline, download the data" in done.stdout


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_cell_may_be_of_any_length_and_the_limit_of_csv_stays(suffix: str, tmp_path: Path) -> None:
    long = [{"instruction": "word " * 30_000, "output": "yes"}, {"instruction": "b", "output": "x" * 140_000}]
    limit = csv.field_size_limit()
    source = write(tmp_path / f"a.{suffix}", csv_text(long, "\t" if suffix == "tsv" else ","))
    assert [row.values for row in load_rows(source)] == long
    assert load_rows(source, limit=1)[0].values == long[0]
    assert csv.field_size_limit() == limit


def test_a_quote_that_is_never_closed_is_told_with_its_line_in_a_long_file_too(tmp_path: Path) -> None:
    rest = "3,4\n" * 50_000
    message = refusal(write(tmp_path / "a.csv", 'a,b\n1,2\n"3,4\n' + rest))
    assert "a.csv:3: malformed CSV: unexpected end of data" in message
    assert "put a cell with quotes into quotes" in message


def written(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_text_that_is_not_utf8_is_refused_with_its_row_and_field(tmp_path: Path) -> None:
    latin = pyarrow.array([b"a"] * 1500 + [b"caf\xe9"]).view(pyarrow.string())
    source = written(tmp_path / "a.parquet", instruction=latin, output=["b"] * 1501)
    message = refusal(source)
    assert (
        "a.parquet[1500]: field 'instruction': expected text in UTF-8; got byte 0xe9 at offset 3" in message
    )
    assert len(load_rows(source, limit=1500)) == 1500


def test_a_parquet_date_that_python_does_not_have_is_refused_only_where_it_is_read(tmp_path: Path) -> None:
    far = pyarrow.array([0, 2**40], pyarrow.timestamp("s"))
    rows = load_rows(written(tmp_path / "a.parquet", instruction=["a", "b"], output=["c", "d"], date=far))
    assert [(row.values["instruction"], row.origin) for row in rows] == [
        ("a", "a.parquet[0]"),
        ("b", "a.parquet[1]"),
    ]
    with pytest.raises(DataError, match=r"a.parquet\[1\]: field 'date': expected text; got a Timestamp"):
        field_text(rows[1], "date")


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["x", "x"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet: the header names the column 'x' twice" in refusal(str(tmp_path / "a.parquet"))


def test_a_folder_that_datasets_did_not_write_is_refused_and_its_files_offered(tmp_path: Path) -> None:
    write(tmp_path / "train.json", "[]")
    message = refusal(str(tmp_path))
    assert "expected a folder written by datasets' save_to_disk" in message
    assert str(tmp_path / "train.json") in message


def test_a_broken_datasets_folder_is_refused(tmp_path: Path) -> None:
    source = saved_as("folder", tmp_path)
    for shard in Path(source).glob("*.arrow"):
        shard.write_bytes(b"broken")
    assert "datasets cannot load this folder" in refusal(source)


def test_demo_names_what_there_is_when_the_part_is_unknown() -> None:
    assert "there are demo, demo:train, demo:heldout" in refusal("demo:dev")


def test_demo_is_a_packaged_file_or_a_clear_error() -> None:
    from importlib.resources import files

    for source, part in (("demo", "train"), ("demo:train", "train"), ("demo:heldout", "heldout")):
        if (files("prefixtune") / "datasets" / f"support_mail.{part}.jsonl").is_file():
            assert load_rows(source, limit=1)[0].origin == f"support_mail.{part}.jsonl:1"
        else:
            assert "is missing from this installation" in refusal(source)
