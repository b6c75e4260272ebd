"""tasks/sources.py: files of every ending, aliases, and sentences that say which file and which columns are wanted."""

import sys
from pathlib import Path

import pytest

from bitloft.errors import DataError, OptionError
from bitloft.tasks.sources import Source, held_out, read_source

SOURCE = Source(("text", "label"), "some/set", aliases={"Quality": "label"}, lists=("tags",))


def test_every_ending_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a\u2028b", "Quality": 1}\n\n{"text": "c", "label": 0}\n')
    rows = read_source(SOURCE, tmp_path, "train")
    assert [row["text"] for row in rows] == ["a\u2028b", "c"]
    assert [row["label"] for row in rows] == [1, 0]
    (tmp_path / "tsv").mkdir()
    (tmp_path / "tsv" / "train.tsv").write_text('\ufefftext\tQuality\nsay "x\t1\nc\t0\n', encoding="utf-8")
    assert read_source(SOURCE, tmp_path / "tsv", "train") == [
        {"text": 'say "x', "label": "1"},
        {"text": "c", "label": "0"},
    ]
    (tmp_path / "rows.json").write_text('[{"text": "a", "label": 2, "tags": "[1, 2]"}]')
    assert read_source(SOURCE, tmp_path / "rows.json", "test") == [{"text": "a", "label": 2, "tags": [1, 2]}]
    (tmp_path / "rows.csv").write_text('text,label\n"a,b",1\n')
    assert read_source(SOURCE, tmp_path / "rows.csv", "test", limit=1)[0]["text"] == "a,b"


def test_missing_data_is_one_sentence_with_file_and_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no test data of sst2 at .*: put test.jsonl there .* columns text, label, or"):
        read_source(SOURCE, tmp_path, "test", name="sst2")
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"has no column 'label'; sst2 wants the columns text, label"):
        read_source(SOURCE, tmp_path, "test", name="sst2")
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows; task wants"):
        read_source(SOURCE, tmp_path, "test")
    with pytest.raises(OptionError, match="unknown split 'dev'; use one of train, test"):
        read_source(SOURCE, tmp_path, "dev")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a", "label": 1}\nnot json\n', "cannot be read as jsonl"),
        ("[1]\n", "does not hold a list of objects"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "has a row without 'label'"),
        ('{"text": "a", "label": 1, "tags": "[1"}\n', "has a 'tags' that is no list"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        read_source(SOURCE, tmp_path, "train")


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        OptionError, match=r"needs the package datasets \(bitloft\[eval\]\).*wants the columns text, label"
    ):
        read_source(SOURCE, None, "train")


def test_the_hub_s_rows_and_its_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        asked: tuple[object, ...] = ()

        def load_dataset(self, *where: object, split: str) -> list[dict[str, object]]:
            Hub.asked = (*where, split)
            if split == "validation":
                raise ConnectionError("no route\nmore")
            return [{"text": "a", "Quality": 1}, {"text": "b", "Quality": 0}]

    monkeypatch.setitem(sys.modules, "datasets", Hub())
    source = Source(
        ("text", "label"), "some/set", "cfg", {"train": "train", "test": "validation"}, aliases=SOURCE.aliases
    )
    assert read_source(source, None, "train") == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert Hub.asked == ("some/set", "cfg", "train")
    with pytest.raises(DataError, match=r"cannot be loaded from the hub \(no route\); give a local folder"):
        read_source(source, None, "test")


def test_rows_are_held_out_from_the_end() -> None:
    assert held_out([{"i": i} for i in range(20)]) == ([{"i": i} for i in range(18)], [{"i": 18}, {"i": 19}])
    with pytest.raises(DataError, match="is one row"):
        held_out([{}])
