"""docs/architecture.md says what is so: rooms, imports, functions and where they are, the step, names in files."""

from __future__ import annotations

import inspect
import re

import pytest

from tests.docs.test_docs_commands import ROOT
from tests.test_imports import ALLOWED, DATA, PACKAGE

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def table(page: str, first: str) -> list[list[str]]:
    """Cells of the rows of the table whose header begins so, without backticks."""
    rows = page.partition(f"\n| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip().strip("|").split("|")] for row in rows]


def allowed(page: str) -> dict[str, set[str]]:
    """What the page's table of rooms says of imports, as in tests/test_imports.py."""
    rooms = {}
    for room, _, below in table(page, "room | what is in it"):
        names = set(filter(None, below.split(", ")))
        if names == {"everything"}:
            names = set(ALLOWED) - {"cli"}
        elif "data" in names:
            names = names - {"data"} | DATA
        rooms[room] = names
    return rooms


def places(page: str) -> list[tuple[str, str]]:
    """(name, file) wherever the page says `name` (`file`)."""
    return re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", page)


def is_defined(name: str, file: str) -> bool:
    """Whether a file of the package defines a name, and the class that stands before a dot."""
    text = (PACKAGE / file).read_text()
    return all(
        re.search(rf"^ *(def|class) {part}\b|^{part} = ", text, re.M) for part in name.split(".")
    )


def test_the_table_of_rooms_is_the_import_tests():
    assert allowed(PAGE) == ALLOWED


def test_another_table_would_be_noticed():
    other = PAGE.replace("files of weights | base, networks |", "files of weights | base |")
    assert allowed(other) == {**ALLOWED, "weights": {"base"}}


def test_functions_are_where_the_page_says():
    named = places(PAGE)
    assert len(named) > 25
    assert [pair for pair in named if not is_defined(*pair)] == []
    assert not is_defined("read_cine", "data/read/sector.py")


def test_files_and_folders_exist():
    paths = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", PAGE)) - {"discovr_monai/"}
    assert len(paths) > 15
    missing = [p for p in paths if not (PACKAGE / p).exists() and not (ROOT / p).exists()]
    assert missing == []


def test_the_step_is_the_trainers():
    from discovr_monai.training.trainer import DiscovrTrainer

    (block,) = re.findall(r'```python title="training/trainer.py"\n(.*?)```', PAGE, re.S)
    source = inspect.getsource(DiscovrTrainer._iteration)
    own = [line.strip() for line in source.splitlines()]
    lines = [line.strip() for line in block.splitlines()]
    at = own.index(lines[0])
    assert own[at : at + len(lines)] == lines


def test_names_in_files():
    from discovr_monai.networks.discovr import PARTS

    assert dict(table(PAGE, "in files")) == PARTS


@pytest.mark.parametrize("room", [*ALLOWED])
def test_every_room_is_a_folder_or_a_file(room):
    path = PACKAGE / room.replace(".", "/")
    assert path.is_dir() or path.with_suffix(".py").is_file()


def test_the_drawing_has_what_is_imported_further_down():
    (drawing,) = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    level = {
        word: number
        for number, line in enumerate(drawing.splitlines())
        for word in re.findall(r"(?:^|  )([a-z]+)(?=  )", line)
    }
    rooms = {room.partition(".")[0] for room in ALLOWED} - {"configuration"}
    assert rooms <= set(level)
    for room, below in ALLOWED.items():
        mine = room.partition(".")[0]
        for other in {name.partition(".")[0] for name in below} - {mine, "configuration"}:
            assert mine == "configuration" or level[mine] < level[other], f"{mine} above {other}"
