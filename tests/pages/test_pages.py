"""The pages of a study and of an evaluation: what is in the file. How it behaves: test_pages_browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from discovr_monai.pages import drawing
from discovr_monai.pages.charts import draw_curve, headlines_of, metric_name, metric_tables
from discovr_monai.pages.drawing import draw_sheets, outlines, resize_labels
from discovr_monai.pages.page import CineView, Nearest, write_evaluation_page, write_study_page
from discovr_monai.phantom.cine import simulate_cine

GREY = np.zeros((4, 8, 8), np.uint8)


# ---- outlines ------------------------------------------------------------------------------


def polygons(path: str) -> list[np.ndarray]:
    """What a browser makes of our paths, in pixels."""
    found = []
    for part in re.findall(r"M[^z]*z", path):
        start, moves = part[1:-1].split("l")
        steps = [int(v) for v in re.findall(r"-?\d+", start + " " + moves)]
        found.append(np.cumsum(np.reshape(steps, (-1, 2)), axis=0) / drawing.UNITS)
    assert "".join(re.findall(r"M[^z]*z", path)) == path
    return found


def signed_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def ellipse(size, centre, radii) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] + 0.5
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 <= 1


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.floats(20, 44)] * 2), st.tuples(*[st.floats(5, 18)] * 2))
def test_an_outline_follows_the_edge(centre, radii):
    mask = ellipse(64, centre, radii)
    (polygon,) = polygons(outlines(mask.astype(np.uint8), ["a"])[0])
    assert abs(signed_area(polygon)) == pytest.approx(mask.sum(), rel=0.03)
    away = np.hypot((polygon[:, 1] - centre[0]) / radii[0], (polygon[:, 0] - centre[1]) / radii[1])
    assert np.abs(away - 1).max() * min(radii) < 1.1  # pixels
    np.testing.assert_allclose(polygon.mean(0)[::-1], centre, atol=0.15 * max(radii))


def test_every_structure_has_its_outline_and_holes_theirs():
    labels = np.zeros((40, 40), np.uint8)
    labels[ellipse(40, (20, 20), (15, 15))] = 2
    labels[ellipse(40, (20, 20), (8, 8))] = 1
    disc, ring, absent = (polygons(p) for p in outlines(labels, ["disc", "ring", "absent"]))
    assert (len(disc), len(ring), len(absent)) == (1, 2, 0)
    assert abs(sum(map(signed_area, ring))) == pytest.approx((labels == 2).sum(), rel=0.01)


@pytest.mark.parametrize("place", [np.s_[:, :], np.s_[0, 0], np.s_[3, 4], np.s_[2:4, :]])
def test_outlines_close_at_the_border_and_small_things_are_not_lost(place):
    labels = np.zeros((8, 8), np.uint8)
    labels[place] = 1
    (polygon,) = polygons(outlines(labels, ["a"])[0])
    assert len(polygon) >= 3
    assert 0.3 <= abs(signed_area(polygon)) / (labels == 1).sum() <= 1
    assert polygon.min() >= -0.15
    assert polygon.max() <= 8.15


# ---- frames --------------------------------------------------------------------------------


def cells(sheets: drawing.Sheets, count: int) -> np.ndarray:
    """Frames out of sheets, by the player's arithmetic."""
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(p.split(",")[1]))))
        for p in sheets.pictures
    ]
    found = []
    for frame in range(count):
        place = frame % sheets.per_sheet
        x = place % sheets.columns * sheets.cell[0]
        y = place // sheets.columns * sheets.cell[1]
        width, height = sheets.size
        found.append(pictures[frame // sheets.per_sheet][y : y + height, x : x + width])
    return np.stack(found)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40), st.integers(64, 4000))
def test_each_frame_is_found_where_the_player_looks(count, height, width, sheet):
    frames = np.repeat(np.arange(count) * (250 // count), height * width).astype(np.uint8)
    frames = frames.reshape(count, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "SHEET", sheet)
        found = cells(draw_sheets(frames), count)
    assert np.abs(found.astype(int) - frames).max() <= 2


def test_large_frames_are_made_smaller():
    sheets = draw_sheets(np.zeros((2, 600, 1024), np.uint8))
    assert sheets.size == (512, 300)


# ---- numbers -------------------------------------------------------------------------------


def test_area_is_in_square_centimetres():
    labels = np.zeros_like(GREY)
    labels[0, :4, :5] = 1
    labels[1] = 2
    view = CineView("a", GREY, labels=labels, structures=("lv", "la"), spacing=(2.0, 3.0))
    np.testing.assert_allclose(view.area, [1.2, 0, 0, 0])  # 20 pixels of 6 mm²
    assert view.area_unit == "cm²"
    view = CineView("a", GREY, labels=labels, structures=("lv", "la"))
    np.testing.assert_array_equal(view.area, [20, 0, 0, 0])
    assert view.area_unit == "pixels"


def test_curve_spans_the_box():
    curve = draw_curve(np.array([10.0, 5.0, 0.0]), 4.0, {"ED": 0, "ES": 2})
    assert (curve.points, curve.top) == ("0,0 500,500 1000,1000", 10)
    assert [(t.at, t.text) for t in curve.x_ticks][-1] == (100, "0.5")  # (3 - 1) / 4 s
    assert (curve.y_ticks[0].at, curve.y_ticks[-1].at) == (100, 0)
    assert curve.marks == [("ED", 0, 0, "start"), ("ES", 100, 100, "end")]


def test_the_true_area_is_drawn_where_it_is_known():
    true = np.array([20.0, np.nan, 10.0, 15.0])
    curve = draw_curve(np.array([10.0, 5.0, 5.0, 0.0]), None, {}, true)
    assert curve.top == 20
    assert curve.truth == ["0,0 0,0", "667,500 1000,250"]  # a dot, a line
    assert draw_curve(np.ones(3), None, {}).truth == []
    labels = np.zeros_like(GREY)
    labels[0, :2, :2] = 1
    view = CineView("a", GREY, labels=labels, reference=labels, structures=["lv"])
    np.testing.assert_array_equal(view.true_area, [4, np.nan, np.nan, np.nan])


def test_labels_are_resized_by_the_nearest():
    small = np.array([[[0, 1], [2, 3]]], np.uint8)
    large = resize_labels(small, 6)
    np.testing.assert_array_equal(large, small.repeat(3, 1).repeat(3, 2))
    np.testing.assert_array_equal(resize_labels(large, 2), small)


def test_curve_of_unknown_rate_counts_frames_from_one():
    for frames in (2, 3, 7):  # no half frames
        assert all(t.text.isdigit() for t in draw_curve(np.ones(frames), None, {}).x_ticks)
    ticks = draw_curve(np.ones(11), None, {}).x_ticks
    assert all(t.at == pytest.approx((float(t.text) - 1) * 10) for t in ticks)
    assert ticks


@pytest.mark.parametrize("area", [np.zeros(5), np.ones(1)])
def test_curve_of_nothing(area):
    assert "nan" not in draw_curve(area, 30.0, {"ED": 0}).points


def test_names_of_near_phases_part():
    marks = draw_curve(np.ones(101), 50.0, {"ED": 52, "ES": 48}).marks
    assert [(m[0], m[3]) for m in marks] == [("ES", "end"), ("ED", "start")]


def figure(metric="mae", value=None, low=None, high=None, **more):
    base = {"section": "test", "method": "ridge", "label_fraction": 1.0}
    return {**base, "metric": metric, "value": value, "low": low, "high": high, **more}


def test_metrics_share_an_axis():
    (table,) = metric_tables(
        [
            figure(value=5.04, low=4.0, high=7.0, samples=9, patients=1),
            figure(value=8.0, low=7.5, high=8.5, method="median", samples=9, patients=1),
            figure("r2", 0.5, -0.2, 0.75, samples=9, patients=1),
            figure("auroc", 0.875, 0.5, 1.0, samples=9, patients=1),
        ]
    )
    mae, r2, auroc = table.groups
    assert (table.section, table.count) == ("test", "9 cines of 1 patient")
    assert [r.method for r in mae.rows] == ["ridge", "median"]
    assert (mae.ends, mae.zero) == (("0", "10"), None)
    assert mae.rows[0].at == (50.4, 40, 70)
    assert (mae.rows[0].value, mae.rows[0].interval) == ("5.04", "4.00 to 7.00")
    begin, end = float(r2.ends[0].replace("−", "-")), float(r2.ends[1])
    assert r2.zero == pytest.approx(100 * -begin / (end - begin), abs=0.01)
    assert r2.rows[0].interval == "−0.200 to 0.750"
    assert (auroc.name, auroc.ends, auroc.rows[0].at) == ("AUROC", ("0", "1"), (87.5, 50, 100))


def test_undefined_figures_and_shares_of_labels():
    (table,) = metric_tables(
        [
            figure("f1", 0.5, 0.25, 0.75, label_fraction=0.1),
            figure("f1", None),
            figure("f1", float("nan")),
        ]
    )
    assert [r.method for r in table.groups[0].rows] == [
        "ridge, 10 % of the labels",
        *["ridge, all labels"] * 2,
    ]
    assert [r.value for r in table.groups[0].rows] == ["0.500", "not defined", "not defined"]
    assert table.groups[0].rows[1].at == (None, None, None)
    assert metric_tables([figure(), figure(samples=3)])[0].groups[0].rows[1].count == "3 cines"


def test_headlines_are_shown_with_their_interval():
    one, two = headlines_of(
        [
            figure(value=5.04, low=4.0, high=7.0, name="EF MAE"),
            figure("r2", 0.5, None, None, name="EF R2"),
            figure("f1", None, name="F1"),
        ]
    )
    assert (one.name, one.value, one.interval, one.about) == (
        "EF MAE", "5.04", "4.00 to 7.00", "test, ridge",
    )  # fmt: skip
    assert (two.value, two.interval) == ("0.500", "")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("macro_f1", "Macro F1"),
        ("hd95_lv_mm", "HD95 LV (mm)"),
        ("dice_left_atrium", "Dice left atrium"),
        ("coverage_90", "Coverage of the 90 % interval"),
        ("<b>", "<b>"),
    ],
)
def test_metric_names(key, name):
    assert metric_name(key) == name


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": GREY.astype(float)}, r"float64 \(4, 8, 8\) is not uint8 of \(T, H, W\)"),
        ({"frames": GREY[:0]}, r"uint8 \(0, 8, 8\) is not uint8 of \(T, H, W\), with something in it"),
        ({"labels": GREY[:2], "structures": ["lv"]}, r"labels \(2, 8, 8\) are not of the frames' \(4, 8, 8\)"),
        ({"labels": GREY}, "0 structures are named, of 1 to 6"),
        ({"labels": GREY + 2, "structures": ["lv"]}, "label 2 has no name"),
        ({"reference": GREY}, "there is a reference, but no labels"),
        ({"labels": GREY, "reference": GREY[:2], "structures": ["lv"]}, r"reference \(2, 8, 8\) is of another"),
        ({"labels": GREY, "reference": GREY + 2, "structures": ["lv"]}, "label 2 of the reference has no name"),
        ({"labels": GREY, "structures": ["lv"], "contours_withheld": "why"}, "both given and withheld"),
        ({"ef": (50, 40, 60), "ef_withheld": "why"}, "the EF is both given and withheld"),
        ({"ef": (50, 55, 60)}, "EF 50 does not lie in its interval 55 to 60"),
        ({"ef": (float("nan"), 0, 1)}, "EF nan does not lie"),
        ({"fps": 0.0}, "frame rate 0.0 is not above 0"),
        ({"spacing": (0.0, 1.0)}, r"spacing \(0.0, 1.0\) is not above 0"),
        ({"ed": 4}, "ed 4 is not among its 4 frames"),
        ({"es": -1}, "es -1 is not among its 4 frames"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^c1 cannot be drawn.*{message}"):
        CineView(**({"title": "c1", "frames": GREY} | wrong))


def test_no_cine_no_study(tmp_path):
    with pytest.raises(ValueError, match="needs at least one cine"):
        write_study_page(tmp_path / "a.html", "s", [])


def test_pictures_that_are_none_leave_the_former_page(tmp_path):
    page = tmp_path / "a.html"
    page.write_text("former")
    (tmp_path / "a.png").write_text("text")
    for picture, message in (
        (tmp_path / "b.png", "^b.png does not exist: give a PNG"),
        (tmp_path / "a.png", "^a.png is no picture"),
        (b"\x89PNG of nothing", "^the picture 'cap' is no picture"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            write_evaluation_page(page, "t", [], {}, [(picture, "alt", "cap")])
        assert str(tmp_path) not in str(caught.value)
    assert page.read_text() == "former"


def test_thumbnails_are_grey():
    with pytest.raises(ValueError, match=r"thumbnail of n cannot be drawn: uint8 \(2, 2, 3\)"):
        _ = Nearest("n", 0.5, np.zeros((2, 2, 3), np.uint8)).picture


# ---- the file ------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags, their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.inside: list[tuple[dict, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] in ("script", "style") and text.strip():
            self.inside.append((self.tags[-1][1], text))


def phantom(**more) -> CineView:
    cine = simulate_cine(3, num_frames=16, size=64)
    found = {
        "title": "3f9a", "frames": cine.frames, "fps": cine.fps, "labels": cine.masks,
        "structures": ("LV cavity", "LV myocardium", "left atrium"), "spacing": (1.5, 1.5),
        "ed": cine.ed_frame, "es": cine.es_frame, "ef": (55.0, 45.0, 65.0),
        "nearest": [Nearest("near", 0.93, cine.frames[0], "EF 61 %")],
    }  # fmt: skip
    return CineView(**(found | more))


def test_only_our_own_script_and_style_may_run(tmp_path):
    write_study_page(tmp_path / "a.html", "s", [phantom()])
    seen = Seen((tmp_path / "a.html").read_text())
    policy = next(a["content"] for t, a in seen.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    hashes = {
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for attributes, text in seen.inside
        if attributes.get("type") != "application/json"
    }
    assert hashes == set(re.findall(r"'sha256-([^']+)'", policy))
    assert len(hashes) == 2
    for tag, attributes in seen.tags:
        assert not [n for n in attributes if n == "style" or n.startswith("on")], tag
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), tag


def test_the_same_cine_gives_the_same_page(tmp_path):
    for name in "ab":
        write_study_page(tmp_path / name, "s", [phantom()], facts={"Model": "m"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_players_data(tmp_path):
    view = phantom(title="</script><!--")
    write_study_page(tmp_path / "a.html", "s", [view])
    seen = Seen((tmp_path / "a.html").read_text())
    (data,) = [json.loads(t) for a, t in seen.inside if a.get("type") == "application/json"]
    np.testing.assert_allclose(data["area"], view.area, atol=1e-3)
    assert (data["count"], data["phases"]) == (16, view.phases)
    assert len(data["paths"]) == 16
    assert {len(p) for p in data["paths"]} == {3}


def test_a_page_is_small_enough_to_send(tmp_path):
    cine = simulate_cine(3, num_frames=100, size=224)
    view = phantom(frames=cine.frames, labels=cine.masks)
    write_study_page(tmp_path / "a.html", "s", [view])
    assert (tmp_path / "a.html").stat().st_size < 2.5e6


def test_names_that_are_not_unicode_can_be_written(tmp_path):
    write_study_page(tmp_path / "a.html", "broken \udcff name", [phantom()])
    assert "broken \\udcff name" in (tmp_path / "a.html").read_text()
