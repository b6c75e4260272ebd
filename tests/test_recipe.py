"""options/recipe.py: lists become rows, variables are filled in, a slip is one sentence that names the file."""

from pathlib import Path

import pytest

from bitloft.errors import OptionError
from bitloft.options.recipe import Row, read_recipe, recipe_of

TABLE = {
    "model": "m",
    "task": "sst2",
    "seeds": [0, 1],
    "train": {"steps": 3, "lr": 1e-3},
    "quantize": {"steps": 2},
    "rows": [
        {"regime": "lora", "rank": 4},
        {
            "regime": ["qlora", "loftq"],
            "format": ["nf2:64", "nf4:64"],
            "rank": 4,
            "quantize": {"start_format": "lm4:32"},
        },
    ],
}
ROOT = Path(__file__).parents[1]


def test_lists_stand_for_one_row_each() -> None:
    recipe = recipe_of(TABLE, "demo")
    assert [row.label for row in recipe.rows] == [
        "lora 16 bit r4", "qlora nf2:64 r4", "qlora nf4:64 r4", "loftq nf2:64 r4", "loftq nf4:64 r4",
    ]  # fmt: skip
    assert recipe.rows[0].quantize == {}
    options = recipe.rows[3].options
    assert (options.solver, options.rank, options.steps, options.start_format) == ("loftq", 4, 2, "lm4:32")
    assert recipe.rows[1].options.rank == 0  # qlora stores no start
    assert recipe.train.steps == 3
    assert recipe.train.save_every == 0
    assert [(row.label[:5], seed) for row, seed in recipe.cells()][4:6] == [("loftq", 0), ("lora ", 1)]


def test_untrained_rows_run_once() -> None:
    table = TABLE | {"rows": [{"regime": "full", "untrained": True}, {"regime": "lora"}]}
    assert [(row.regime, seed) for row, seed in recipe_of(table).cells()] == [("full", 0), ("lora", 0), ("lora", 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, "has no rows"),
        ({"sedes": [1]}, "a recipe has no key 'sedes'"),
        ({"train": {"rank": 4}}, r"\[train\] has no key 'rank'"),
        ({"rows": [{"regime": "lora", "bits": 4}]}, r"\[\[rows\]\] has no key 'bits'"),
        ({"rows": [{"regime": "magic"}]}, "unknown regime 'magic'"),
        ({"rows": [{"regime": "lora", "format": "nf4:64"}]}, "leave it out"),
        ({"rows": [{"regime": "qlora"}]}, "give one such as nf2:64"),
        ({"rows": [{"regime": "qalora", "format": "uniform4:32"}]}, r"use uniform4:32\+shift"),
        (
            {"rows": [{"regime": "loftq", "format": "nf2:64", "quantize": {"depth": 1}}]},
            "quantize has no setting depth",
        ),
        ({"rows": [{"regime": "lora"}, {"regime": "lora"}]}, "two rows .* are called 'lora 16 bit r16'"),
        ({"seeds": []}, "has no seeds"),
    ],
)
def test_slips_are_told(change: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        recipe_of(TABLE | change)


def test_files_variables_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.toml"
    file.write_text('# ${UNSET} in a comment\nmodel = "${PLACE}/m"\ntask = "sst2"\n[[rows]]\nregime = "lora"\n')
    with pytest.raises(OptionError, match=r"recipe .*r.toml: the variable PLACE is not set"):
        read_recipe(file)
    monkeypatch.setenv("PLACE", "/x")
    recipe = read_recipe(file)
    assert (recipe.name, recipe.model) == ("r", "/x/m")
    file.write_text("model = ")
    with pytest.raises(OptionError, match=r"recipe .*r.toml: "):
        read_recipe(file)
    with pytest.raises(OptionError, match="there is no recipe"):
        read_recipe(tmp_path / "none.toml")


def test_a_qalora_row_takes_a_shift() -> None:
    assert Row("qalora", "uniform4:32+shift").options.solver == "qalora"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda f: f.stem)
def test_every_recipe_in_the_repository_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BITLOFT_SHARED", "BITLOFT_MINILM", "BITLOFT_SMOLLM2"):
        monkeypatch.setenv(name, "/somewhere")
    recipe = read_recipe(file)
    assert recipe.rows
    assert len({row.label for row in recipe.rows}) == len(recipe.rows)
