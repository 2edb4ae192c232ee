"""How the pages behave in a browser: keys, curve, print, phone, dark, hostile names, no network."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from discovr_monai.base.notice import NOTICE
from discovr_monai.pages.page import (
    CineView,
    Nearest,
    write_evaluation_page,
    write_study_page,
)
from discovr_monai.phantom.cine import simulate_cine

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
FRAMES, FPS, ED, ES = 20, 10.0, 4, 12
WHY = "This cine is unlike those that the head was trained on."
HOSTILE = '</script><img src=x onerror="window.harm=1"><script>window.harm=1</script>\'"{{7*7}}&amp;\u2028'


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, names)), own)
        if not Path(found).exists():
            pytest.skip("no Chromium on this machine (playwright install chromium)")
        chromium = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield chromium
        chromium.close()


def grey_cine(title="grey", **more) -> CineView:
    """Frame k is of grey 10 k, with a disc that shrinks until end systole; pixels are not square."""
    frames = np.repeat(np.arange(FRAMES) * 10, 60 * 42).reshape(-1, 60, 42).astype(np.uint8)
    rows, columns = np.mgrid[:60, :42]
    radii = 18 - 8 * np.sin(np.pi * np.arange(FRAMES) / FRAMES) ** 2
    labels = (np.hypot(rows - 29.5, columns - 20.5) <= radii[:, None, None]).astype(np.uint8)
    found = {
        "title": title, "frames": frames, "fps": FPS, "labels": labels,
        "structures": ("LV cavity",), "spacing": (1.0, 1.5), "ed": ED, "es": ES,
    }  # fmt: skip
    return CineView(**(found | more))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    cine = simulate_cine(3, num_frames=16, size=64)
    cases = [Nearest(f"near{i}", 0.9 - i / 10, cine.frames[i], f"EF {60 - i} %") for i in range(5)]
    views = [
        grey_cine(ef=(57.0, 48.0, 66.0), facts={"View": "A4C"}, nearest=cases),
        CineView("silent", cine.frames, ef_withheld=WHY, contours_withheld=WHY),
    ]
    write_study_page(folder / "study.html", "Study 8d41", views, facts={"Model": "small"})
    figures = [
        {"section": s, "method": m, "label_fraction": f, "metric": k, "value": v, "low": v - 0.1,
         "high": v + 0.1}
        for s in ("validation", "test") for m in ("ridge", "training median") for f in (0.1, 1)
        for k, v in (("mae", 6.0), ("r2", 0.05), ("auroc", 0.8))
    ]  # fmt: skip
    figures[-1].update(value=None, low=None, high=None, method="only one", metric="f1")
    animation, still = io.BytesIO(), io.BytesIO()
    pictures = [Image.fromarray(f) for f in cine.frames]
    pictures[0].save(animation, "GIF", save_all=True, append_images=pictures[1:], duration=60)
    pictures[0].resize((900, 400)).save(still, "PNG")
    write_evaluation_page(
        folder / "evaluation.html", "Ejection fraction", figures,
        {"branch": "video_teacher", "clip": {"size": 64}},
        [(animation.getvalue(), "a beating heart", "Best."), (still.getvalue(), "dots", "ROC.")],
        [grey_cine(reference=np.roll(views[0].labels, 4, axis=2))],
        [(Nearest("query", None, cine.frames[0]), cases)],
        headlines=[{**figures[0], "name": "EF MAE"}],
    )  # fmt: skip
    harm = grey_cine(
        HOSTILE, structures=(HOSTILE,), facts={HOSTILE: HOSTILE}, ef_withheld=HOSTILE,
        nearest=[Nearest(HOSTILE, 0.5, cine.frames[0], HOSTILE)],
    )  # fmt: skip
    silent = CineView(HOSTILE, cine.frames, contours_withheld=HOSTILE)
    write_study_page(
        folder / "harm_study.html",
        HOSTILE,
        [harm, silent],
        notice=HOSTILE,
        facts={HOSTILE: HOSTILE},
    )
    figure = {**figures[0], "section": HOSTILE, "method": HOSTILE, "metric": HOSTILE}
    write_evaluation_page(
        folder / "harm_evaluation.html", HOSTILE, [figure], {HOSTILE: {HOSTILE: [HOSTILE]}},
        [(still.getvalue(), HOSTILE, HOSTILE)], [harm], [(harm.nearest[0], harm.nearest)],
        headlines=[{**figure, "name": HOSTILE}], notice=HOSTILE,
    )  # fmt: skip
    return folder


@pytest.fixture
def show(browser, pages):
    """Opens a page; at the end nothing may have been asked for or complained about."""

    @contextmanager
    def opened(name: str, **options) -> Iterator[SimpleNamespace]:
        settings = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        context = browser.new_context(**(settings | options))
        page = context.new_page()
        asked, complaints = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: complaints.append(m.text))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        address = (pages / f"{name}.html").as_uri()
        page.goto(address)
        yield page
        assert [a[:80] for a in asked if a != address and not a.startswith("data:")] == []
        assert complaints == []
        context.close()

    return opened


def frame_of(page, cine=1) -> int:
    """The frame that the counter names, from 0; slider and cursor must agree."""
    section = page.locator(f"#cine-{cine}")
    frame = int(re.match(r"Frame (\d+) of", section.locator(".counter").text_content())[1]) - 1
    assert section.locator(".slider").input_value() == str(frame + 1)
    if section.locator(".cursor").count():
        place = float(section.locator(".cursor line").get_attribute("x1").rstrip("%"))
        assert place == pytest.approx(100 * frame / (FRAMES - 1))
    return frame


GREY_AT = """([x, y]) => {
  const [from, to] = [document.querySelector("canvas"), document.createElement("canvas")];
  to.getContext("2d").drawImage(from, x * from.width, y * from.height, 1, 1, 0, 0, 1, 1);
  return [...to.getContext("2d").getImageData(0, 0, 1, 1).data]; }"""
DRAWN = f"() => ({GREY_AT})([0.1, 0.1])[3]"


# ---- the player ----------------------------------------------------------------------------


def test_keys_step_through_the_cine(show):
    with show("study") as page:
        assert frame_of(page) == ED  # where it begins
        for key, expected in (
            ("ArrowRight", ED + 1), ("ArrowRight", ED + 2), ("ArrowLeft", ED + 1), ("End", FRAMES - 1),
            ("ArrowRight", FRAMES - 1), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1),
        ):  # fmt: skip
            page.keyboard.press(key)
            assert frame_of(page) == expected, key
        assert (
            page.locator("#cine-1 .counter").text_content().startswith("Frame 2 of 20 · 0.10 s · ")
        )


def test_the_picture_and_its_contour_are_those_of_the_frame(show):
    with show("study") as page:
        page.wait_for_function(DRAWN)
        size = page.locator("canvas").first.bounding_box()
        assert size["width"] / size["height"] == pytest.approx(42 * 1.5 / 60, rel=0.01)
        for frame in (ED, ES, FRAMES - 1, 0):
            page.locator("#cine-1 .slider").fill(str(frame + 1))
            for x in (0.01, 0.5, 0.98):
                assert page.evaluate(GREY_AT, [x, 0.4]) == pytest.approx(
                    [*[10 * frame] * 3, 255], abs=2
                )
        page.get_by_role("button", name="ES", exact=True).click()
        edge = grey_cine().labels[ES, 30].argmax() / 42  # of the disc, at the left
        near = [edge + d / 500 for d in range(-6, 7)]

        def bluest() -> int:
            return max(p[2] - p[0] for p in (page.evaluate(GREY_AT, [x, 0.5]) for x in near))

        assert bluest() > 100
        page.get_by_role("button", name="Contours").click()
        assert page.get_by_role("button", name="Contours").get_attribute("aria-pressed") == "false"
        assert bluest() < 10


def test_the_reference_is_dashed_and_can_be_hidden(show):
    with show("evaluation") as page:
        page.locator("#cine-1").scroll_into_view_if_needed()
        page.wait_for_function(DRAWN)
        edge = np.roll(grey_cine().labels[ED, 30], 4).argmax() / 42  # of the moved disc
        near = [[edge + d / 400, y / 100] for d in range(-3, 4) for y in range(40, 62, 2)]

        def white() -> int:
            return max(min(page.evaluate(GREY_AT, place)[:3]) for place in near)

        assert white() > 150
        page.get_by_role("button", name="Reference").click()
        assert page.get_by_role("button", name="Reference").get_attribute("aria-pressed") == "false"
        assert white() < 120
        assert page.locator(".curve polyline.truth").count() == 1


def test_buttons_jump_and_the_phase_is_named(show):
    with show("study") as page:
        first = page.locator("#cine-1")
        for name, frame in (("ES", ES), ("ED", ED)):
            first.get_by_role("button", name=name, exact=True).click()
            assert frame_of(page) == frame
            assert first.locator(".phase").text_content() == name
        first.get_by_role("button", name="Next frame").click()
        assert frame_of(page) == ED + 1
        assert first.locator(".phase").is_hidden()
        assert first.locator(".slider").get_attribute("aria-valuetext").startswith("Frame 6 of 20")


def test_the_curve_seeks_where_it_is_touched(show):
    with show("study") as page:
        box = page.locator("#cine-1 .curve").bounding_box()
        for frame in (15, 3):
            page.mouse.click(box["x"] + box["width"] * frame / (FRAMES - 1), box["y"] + 50)
            assert frame_of(page) == frame
        page.mouse.down()
        page.mouse.move(box["x"] + 2 * box["width"], box["y"], steps=4)
        page.mouse.up()
        assert frame_of(page) == FRAMES - 1
        marks = page.locator("#cine-1 circle.mark").evaluate_all(
            "all => all.map(m => m.getAttribute('cx'))"
        )
        assert [float(m[:-1]) for m in marks] == pytest.approx(
            [100 * f / 19 for f in (ED, ES)], abs=0.01
        )


@pytest.mark.parametrize(("speed", "passed"), [("1", 13), ("0.1", 1)])
def test_it_plays_at_its_own_rate(browser, pages, speed, passed):
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.clock.install(time=0)
    page.goto((pages / "study.html").as_uri())
    page.clock.pause_at(1000)
    page.locator("#cine-1 .speed").select_option(speed)
    page.locator("body").click(position={"x": 3, "y": 300})
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Pause").count() == 1
    page.clock.run_for(1350)  # 13.5 frames of 100 ms
    assert frame_of(page) == (ED + passed) % FRAMES
    page.keyboard.press("Space")
    page.clock.run_for(1000)
    assert frame_of(page) == (ED + passed) % FRAMES
    context.close()


def test_keys_act_on_the_cine_in_focus_and_leave_other_controls_alone(show):
    with show("study") as page:
        page.locator("#cine-2 .slider").focus()
        page.keyboard.press("ArrowRight")
        assert (frame_of(page), frame_of(page, 2)) == (ED, 1)
        page.locator("#cine-1 .speed").focus()
        page.keyboard.press("End")
        assert frame_of(page) == ED
        page.locator("#cine-1 .next").focus()
        page.keyboard.press("Space")  # presses the button
        assert frame_of(page) == ED + 1
        assert page.get_by_role("button", name="Pause").count() == 0
        page.keyboard.press("Control+ArrowRight")
        assert frame_of(page) == ED + 1


def test_nothing_moves_by_itself_for_those_who_want_no_motion(show):
    with show("study") as page:
        assert page.get_by_role("button", name="Pause").count() == 0
    with show("study", reduced_motion="no-preference") as page:
        assert page.get_by_role("button", name="Pause").count() == 1  # the first cine only
    with show("evaluation") as page:
        picture = page.get_by_alt_text("a beating heart")
        assert picture.evaluate("i => i.currentSrc").startswith("data:image/png")
    with show("evaluation", reduced_motion="no-preference") as page:
        picture = page.get_by_alt_text("a beating heart")
        assert picture.evaluate("i => i.currentSrc").startswith("data:image/gif")


# ---- what is said --------------------------------------------------------------------------


def test_the_study_says_what_was_found_and_what_was_withheld(show):
    with show("study") as page:
        assert page.locator(".notice").text_content().strip() == NOTICE
        first, second = page.locator("#cine-1"), page.locator("#cine-2")
        said = [line for line in first.locator(".ef").inner_text().split("\n") if line]
        assert said[:4] == ["Ejection fraction", "57 %", "90 % interval", "48 to 66 %"]
        scale = first.locator(".scale")
        assert "57 %, 90 % interval 48 to 66 %" in scale.get_attribute("aria-label")
        assert scale.locator(".value").get_attribute("cx") == "57.0%"
        assert WHY in second.locator(".ef").inner_text()
        assert second.locator(".viewer .withheld").inner_text() == f"Contours withheld. {WHY}"
        assert second.locator("svg.scale, .curve, .contours, .legend").count() == 0
        assert "frame rate unknown" in second.locator(".counter").inner_text()
        assert first.locator(".case strong").first.text_content() == "EF 60 %"


def test_the_evaluation_lists_every_figure(show):
    with show("evaluation") as page:
        assert page.get_by_role("table").count() == 2
        row = page.get_by_role("row", name="ridge, 10 % of the labels").first
        assert row.get_by_role("cell").first.inner_text() == "6.00 5.90 to 6.10"
        assert page.get_by_text("not defined").count() == 1
        said = page.locator(".headlines").inner_text().split("\n")
        assert said[0] == "EF MAE"
        assert "5.90 to 6.10" in " ".join(said)
        page.get_by_text("Settings").click()
        assert page.get_by_text("clip.size").is_visible()
        assert page.get_by_alt_text("Query: query").count() == 1


# ---- everyone, everywhere ------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["study", "evaluation"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(show, name, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with show(name, color_scheme=scheme, viewport={"width": width, "height": 900}) as page:
        for summary in page.locator("summary").all():
            summary.click()
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", ground)[0]) < 60) == (scheme == "dark")


@pytest.mark.parametrize("name", ["study", "evaluation", "harm_study", "harm_evaluation"])
def test_a_phone_needs_no_sideways_scrolling(show, name):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with show(name, **phone) as page:
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        small = page.locator(".viewer button, .viewer select").evaluate_all(
            "all => all.map(b => b.getBoundingClientRect()).filter(b => b.width < 36 || b.height < 36).length"
        )
        assert small == 0


def test_print_shows_both_phases_and_no_controls(show):
    with show("study", color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator(".notice").is_visible()
        assert page.locator("#cine-2 .printed").inner_text() == NOTICE
        for selector in ("button", "select", "input", "canvas", ".cursor", "summary"):
            assert not any(e.is_visible() for e in page.locator(selector).all()), selector
        stills = page.locator("#cine-1 .stills figure")
        assert [s.is_visible() for s in stills.all()] == [True, True]
        assert "End systole: frame 13, 1.20 s" in stills.nth(1).inner_text()
        assert stills.nth(1).locator("path.s1").bounding_box()["width"] > 50
        assert page.locator("#cine-1 .curve .line").is_visible()
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )


def test_without_scripts_the_findings_are_there(show):
    with show("study", java_script_enabled=False) as page:
        first = page.locator("#cine-1")
        assert first.locator(".stills svg").first.is_visible()
        assert first.locator(".curve .line").is_visible()
        assert "57" in first.locator(".ef-value").inner_text()
        assert not first.locator(".player").is_visible()
        assert not first.locator(".cursor").is_visible()


@pytest.mark.parametrize("name", ["harm_study", "harm_evaluation"])
def test_hostile_names_are_text(show, name):
    with show(name) as page:
        page.wait_for_timeout(100)
        assert page.evaluate("window.harm") is None
        assert page.locator("h1").text_content() == HOSTILE
        assert page.title().startswith("</script><img src=x")
        cines = page.locator(".cine").count()
        assert page.locator("script").count() == 1 + cines
        assert page.locator("[onerror], img[src='x']").count() == 0
        assert page.locator("#cine-1 h2").text_content() == HOSTILE
        page.keyboard.press("Home")
        assert frame_of(page) == 0


def test_the_policy_holds_even_if_escaping_failed(browser, pages, tmp_path):
    text = (pages / "study.html").read_text()
    beacon = '<img src="https://example.invalid/a.png"><script>window.harm=1</script>'
    (tmp_path / "a.html").write_text(text.replace("<main", f"{beacon}<main"))
    page = browser.new_page()
    said = []
    page.on("console", lambda m: said.append(m.text))
    page.goto((tmp_path / "a.html").as_uri())
    assert page.evaluate("window.harm") is None
    assert sum("violates" in s for s in said) == 2, said
    page.close()
