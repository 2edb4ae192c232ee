"""Every adapter on a tree in its set's layout, with the quirks of the real one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from discovr_monai.base.tables import read_table
from discovr_monai.cli import main
from discovr_monai.data.lists import catalogue
from discovr_monai.data.lists.catalogue import build_datalist
from discovr_monai.data.lists.report import near_duplicates
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.masks import read_masks
from discovr_monai.evaluation.report.segmentation_report import dice
from discovr_monai.phantom.layouts import LAYOUTS, SIZE, _heart, write_layout

ADAPTER = {"camus-mhd": "camus"}
PATIENTS = 4


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Layout -> its folder, written when first asked for."""
    base, made = tmp_path_factory.mktemp("sets"), {}

    def tree(name):
        if name not in made:
            made[name] = write_layout(name, base / name, patients=PATIENTS)
        return made[name]

    return tree


def rows_of(found):
    return [row for rows in found.sections.values() for row in rows]


def build(trees, name, **options):
    return build_datalist(ADAPTER.get(name, name), trees(name), **options)


def labels(root, row):
    cine = read_cine(root / row["image"], color="grey")
    return cine, read_masks(root, row["mask"], cine.frames.shape)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_set_becomes_a_datalist(trees, name):
    found = build(trees, name)
    rows = rows_of(found)
    assert rows and all((trees(name) / r["image"]).is_file() for r in rows)
    assert found.sections["training"] and found.sections["validation"]
    owners = [
        {r["patient"] for r in rows} for s, rows in found.sections.items() if s != "pretraining"
    ]
    assert sum(map(len, owners)) == len(set().union(*owners)), "a patient in two sections"
    assert len({r["image"] for r in rows}) == len(rows)
    for row in rows:
        assert len(row["patient"]) == 16 and int(row["patient"], 16) >= 0, "not salted"
        assert row.get("label") in (0, 1, None)
        assert 0 <= row.get("ef", 50) <= 100
        assert ("fps" in row) == ("fps_source" in row)
    for row in rows[:6]:
        cine = (
            read_cine(trees(name) / row["image"], color="grey") if name != "mimic-iv-echo" else None
        )
        if cine is not None and "mask" in row:
            masks = read_masks(trees(name), row["mask"], cine.frames.shape)
            assert masks.shape == cine.frames.shape and masks.any()
    assert found.licence and found.source


@pytest.mark.parametrize(
    "name", ["echonet-dynamic", "camus", "camus-mhd", "ted", "echonet-pediatric"]
)
def test_the_cavity_is_larger_at_end_diastole(trees, name):
    rows = [r for r in rows_of(build(trees, name)) if "mask" in r]
    for row in rows:
        _, masks = labels(trees(name), row)
        areas = (masks == 1).sum((1, 2))
        assert areas[row["ed_frame"]] > areas[row["es_frame"]] > 0


def test_echonet_dynamic(trees):
    root = trees("echonet-dynamic")
    found = build(trees, "echonet-dynamic")
    assert {n: len(r) for n, r in found.sections.items()} == {
        "training": 2, "validation": 1, "test": 1
    }  # fmt: skip
    assert [e.name for e in found.set_aside] == ["Videos/0XMISSING"]
    by_name = {r["image"][-8:-4]: r for r in rows_of(found)}
    assert "mask" not in by_name["7002"]  # no tracing
    assert read_cine(root / by_name["7001"]["image"]).frames.shape[1:] == (SIZE, SIZE)  # says 1024
    row, heart = by_name["7000"], _heart(0, 0)
    assert (row["ed_frame"], row["es_frame"]) == (heart.ed_frame, heart.es_frame)
    assert row["ef"] == pytest.approx(heart.ef, abs=1e-5)
    _, masks = labels(root, row)
    for frame in (heart.ed_frame, heart.es_frame):
        assert dice(masks[frame] == 1, heart.masks[frame] == 1) > 0.93
    assert set(np.flatnonzero(masks.any((1, 2)))) == {heart.ed_frame, heart.es_frame}


def test_the_threshold_is_a_key(trees):
    low, high = (build(trees, "echonet-dynamic", threshold=t) for t in (1.0, 99.0))
    assert {r["label"] for r in rows_of(low)} == {0}
    assert {r["label"] for r in rows_of(high)} == {1}


def test_echonet_pediatric_has_folds_and_polygons(trees):
    found = build(trees, "echonet-pediatric", test_fold=2, val_fold=0)
    assert {r["fold"] for r in found.sections["test"]} == {2}
    assert {r["fold"] for r in found.sections["validation"]} == {0}
    assert {r["view"] for r in rows_of(found)} == {"A4C", "PSAX"}
    assert len(found.sections["test"]) == 2, "both views of a patient on one side"
    only = build(trees, "echonet-pediatric", view="psax")
    assert {r["view"] for r in rows_of(only)} == {"PSAX"}
    assert len(only.set_aside) == 1
    row = next(
        r
        for r in rows_of(found)
        if r["image"].endswith("A4C/Videos/CR32a7000-CR32a9000-000000.avi")
    )
    heart = _heart(0, 0, "paediatric")
    _, masks = labels(trees("echonet-pediatric"), row)
    assert dice(masks[heart.ed_frame] == 1, heart.masks[heart.ed_frame] == 1) > 0.93


def test_echonet_lvh_trusts_the_table(trees):
    found = build(trees, "echonet-lvh")
    row = found.sections["training"][0]
    assert read_cine(trees("echonet-lvh") / row["image"]).fps == 50
    assert row["fps"] == 19.97 and row["fps_source"] == "MeasurementsList.csv"
    assert row["measurements"]["LVIDd"] == 46 and row["spacing"] == [0.5, 0.5]
    walls = {r["measurements"]["IVSd"]: r["label"] for r in rows_of(found)}
    assert walls == {9.0: 0, 16.0: 1}
    assert len(found.set_aside) == 1


def test_rvenet(trees):
    found = build(trees, "rvenet")
    assert {r["rvef"] < 45 for r in rows_of(found) if r["label"]} == {True}
    assert len({r["patient"] for r in rows_of(found)}) == PATIENTS
    assert len(found.sections["test"]) == 2  # the set's "validation"


def test_camus_axes_and_order(trees):
    root = trees("camus")
    found = build(trees, "camus")
    back = [r for r in rows_of(found) if r["ed_frame"] > r["es_frame"]]
    assert back and all(min(r["ed_frame"], r["es_frame"]) == 0 for r in rows_of(found))
    row = next(r for r in rows_of(found) if "patient0001_4CH" in r["image"])
    heart = _heart(0, 0)
    first, last = sorted((heart.ed_frame, heart.es_frame))
    cine, masks = labels(root, row)
    np.testing.assert_array_equal(cine.frames, heart.frames[first : last + 1])  # not rotated
    np.testing.assert_array_equal(masks, heart.masks[first : last + 1])
    assert row["spacing"] == [0.35, 0.35] and row["quality"] == "good" and row["view"] == "A4C"
    assert row["ef"] == round(heart.ef)
    assert len(found.set_aside) == 2  # patient0005's empty folder, two views
    assert {r["view"] for r in rows_of(build(trees, "camus", view="A2C"))} == {"A2C"}


def test_the_older_camus(trees):
    found = build(trees, "camus-mhd")
    row = next(r for r in rows_of(found) if "patient0001" in r["image"])
    assert row["spacing"] == [0.154, 0.308]  # (row, column): the file says x, y
    assert row["edv"] == pytest.approx(_heart(0, 0).edv, abs=0.05)
    assert row["mask"]["kind"] == "frames"
    _, masks = labels(trees("camus-mhd"), row)
    assert set(np.flatnonzero(masks.any((1, 2)))) == {row["ed_frame"], row["es_frame"]}
    assert all("testing" in r["image"] for r in found.sections["test"])


def test_mimic_keeps_the_unlabelled_apart(trees):
    found = build(trees, "mimic-iv-echo")
    assert all("ef" in r for s in ("training", "validation", "test") for r in found.sections[s])
    held = {r["patient"] for s in ("validation", "test") for r in found.sections[s]}
    assert not held & {r["patient"] for r in found.sections["pretraining"]}
    assert any("not there" in str(e) for e in found.set_aside)
    checked = build(trees, "mimic-iv-echo", check=True, workers=1)
    assert any("a still" in str(e) for e in checked.set_aside)


def test_hmc_qu(trees):
    found = build(trees, "hmc-qu")
    odd = next(r for r in rows_of(found) if "ES00001 N_4CH_2" in r["image"])
    heart = _heart(0, 1)
    assert odd["label"] == 1 and odd["view"] == "A4C"
    _, masks = labels(trees("hmc-qu"), odd)
    first, last = sorted((heart.ed_frame, heart.es_frame))
    np.testing.assert_array_equal(masks[first] == 2, heart.masks[first] == 2)
    assert not masks[: max(first, 0)].any() and not masks[last + 1 :].any()
    assert len(found.set_aside) == 1


def test_cardiac_uda(trees):
    found = build(trees, "cardiac-uda")
    assert {r.get("site") for r in rows_of(found)} == {"G", "R", None}
    labelled = [r for r in rows_of(found) if "label" in r]
    assert labelled and all("label_all_frame" in r["image"] for r in labelled)
    sparse = next(r for r in rows_of(found) if "mask" in r and "site" in r)
    _, masks = labels(trees("cardiac-uda"), sparse)
    assert masks.any((1, 2)).sum() == 5


def test_a_csv_as_the_public_code_reads(trees):
    found = build(trees, "csv-list")
    assert {e.kind for e in found.set_aside} >= {"refused", "missing"}
    assert not any("secret" in r["image"] or "odd" in r["image"] for r in rows_of(found))
    assert {r["label"] for r in rows_of(found)} == {0, 1}


def test_a_folder(trees):
    found = build(trees, "folder", patient_from="folder")
    assert [e.name for e in found.set_aside] == ["notes.txt"]
    assert any(r["image"] == "0_image.nii/0.nii" for r in rows_of(found))
    assert len({r["patient"] for r in rows_of(found)}) == PATIENTS + 1


# ---- splits --------------------------------------------------------------------------------


def test_folds_of_our_own(trees):
    images = []
    for fold in range(3):
        found = build(trees, "ted", folds=3, test_fold=fold)
        assert {r["fold"] for r in found.sections["test"]} == {fold}
        images += [r["image"] for r in found.sections["test"]]
    assert len(images) == len(set(images)) == PATIENTS


def test_a_patient_on_two_sides_stays_on_one(trees, tmp_path):
    root = tmp_path / "leaky"
    shutil.copytree(trees("echonet-dynamic"), root)
    table = root / "FileList.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1].replace("TRAIN", "TEST")]))
    found = build_datalist("echonet-dynamic", root)
    assert any("listed twice" in str(e) for e in found.set_aside)

    root = tmp_path / "peds"
    shutil.copytree(trees("echonet-pediatric"), root)
    table = root / "pediatric_echo_avi" / "PSAX" / "FileList.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[1].rsplit(",", 1)[0] + ",5", *lines[2:]]))
    found = build_datalist("echonet-pediatric", root)  # A4C of fold 0, PSAX of fold 5
    assert any("in section 'test' too" in str(e) for e in found.set_aside)
    owners = [{r["patient"] for r in rows} for rows in found.sections.values()]
    assert sum(map(len, owners)) == len(set().union(*owners))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonsense", {}, "data set 'nonsense' is unknown; there are camus"),
        ("ted", {"view": "A4C"}, "ted has no option 'view'; it has threshold"),
        ("ted", {"folds": 2}, "at least 3"),
        ("ted", {"test_fold": 1}, "give --folds too"),
        ("ted", {"val_fraction": 0.7, "test_fraction": 0.4}, "leave no rest"),
        ("camus", {"view": "PLAX"}, "view 'PLAX' must be A2C or A4C"),
        ("rvenet", {}, "does not look like RVENet: there is no codebook.csv"),
        ("echonet-dynamic", {}, "there is no FileList.csv"),
        ("mimic-iv-echo", {}, "neither echo-record-list.csv nor"),
        ("hmc-qu", {}, "no HMC_QU.xlsx"),
        ("cardiac-uda", {}, "no \\*_image.nii.gz"),
        ("csv-list", {}, "holds 0 CSV files"),
    ],
)
def test_wrong_folders_and_options(trees, name, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_datalist(name, trees("ted"), **options)


def test_tables_that_are_none(tmp_path):
    (tmp_path / "FileList.csv").write_bytes(b"FileName,EF\n\xff\xfe,3\n")
    (tmp_path / "Videos").mkdir()
    with pytest.raises(ValueError, match="FileList.csv lacks the column Split"):
        build_datalist("echonet-dynamic", tmp_path)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf Name , B \n\xe9t\xe9,1\n\n")
    assert list(read_table(tmp_path / "a.csv", ("Name",))) == [{"Name": "été", "B": "1"}]


# ---- the command -----------------------------------------------------------------------------


def test_the_command_writes_reports_and_draws(trees, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(trees("echonet-dynamic"), root)
    videos = sorted((root / "Videos").iterdir())
    videos[0].write_bytes(videos[0].read_bytes()[:3000])  # cut short
    shutil.copy(videos[3], videos[1])  # the same cine under two names, in two sections
    assert main(["datalist", "echonet-dynamic", str(root), "-o", str(tmp_path / "out" / "d.json"),
                 "--report", str(tmp_path / "report"), "--workers", "1"]) == 0  # fmt: skip
    content = json.loads((tmp_path / "out" / "d.json").read_text())
    assert len([r for s in ("training", "validation", "test") for r in content[s]]) == 3
    assert all(r["num_frames"] == 24 for r in content["training"])
    aside = (tmp_path / "out" / "d.set_aside.csv").read_text()
    assert "0XMISSING" in aside and "cut short" in aside
    assert str(tmp_path) not in aside + json.dumps(content)
    for name in ("contact_sheet.png", "histograms.png"):
        assert (tmp_path / "report" / name).stat().st_size > 5000
    assert "across sections" in (tmp_path / "report" / "duplicates.csv").read_text()
    said = capsys.readouterr().out
    assert "Licence: Stanford" in said and "2 files set aside" in said
    assert main(["datalist", "list"]) == 0
    assert "camus" in capsys.readouterr().out


def test_formulas_stay_text(tmp_path):
    from discovr_monai.base.types import CineError

    found = catalogue.Catalogue("n", "l", "s", {"training": []}, [CineError("=cmd()", "p", "r")])
    report = found.write(tmp_path / "d.json")
    assert "'=cmd()" in report.read_text()


def test_near_duplicates_are_found_exactly():
    rng = np.random.default_rng(0)
    codes = {f"n{i}": rng.bytes(16) for i in range(60)}
    for i, flips in enumerate((0, 1, 6, 7)):
        bits = np.unpackbits(np.frombuffer(codes[f"n{i}"], np.uint8)).copy()
        bits[rng.permutation(128)[:flips]] ^= 1
        codes[f"copy{i}"] = np.packbits(bits).tobytes()
    found = near_duplicates({k: v.hex() for k, v in codes.items()})
    assert [(a, b, d) for a, b, d in found] == [
        ("copy0", "n0", 0), ("copy1", "n1", 1), ("copy2", "n2", 6)
    ]  # fmt: skip
