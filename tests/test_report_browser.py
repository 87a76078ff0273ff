"""The report in a real browser: no console error, no request, and what one does with charts does it."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Later
from report_runs import HOSTILE, full, long_metrics

from k2jax.report.build import Report

selenium = Later("selenium")
pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "about:blank",
)  # fmt: skip
WIDE, PHONE = (1280, 900), (390, 844)
SHOTS = os.environ.get("K2JAX_SHOTS")  # a folder that gets screenshots, to look at


class Browser:
    """A page in Chromium."""

    def __init__(self, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.set_script_timeout(60)

    def open(self, path: Path, size: tuple[int, int] = WIDE, theme: str = "light") -> "Browser":
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.js("try { sessionStorage.clear(); localStorage.clear(); } catch {}")  # what another test chose
        self.driver.get("about:blank")
        self.requests(), self.errors()
        self.driver.get(path.as_uri())
        self.wait("document.documentElement.dataset.ready")
        return self

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition: str, seconds: float = 30.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.js(f"return {condition}")):
            assert time.monotonic() < end, f"waited in vain for {condition}; console: {self.errors()}"
            time.sleep(0.05)
        return found

    def set(self, control: str, value: object, event: str) -> None:
        """As a person does."""
        code = "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
        self.js(f"{code} c.dispatchEvent(new Event(arguments[2]))", control, value, event)

    def show(self, title: str) -> str:
        """Scrolls to a chart; the JavaScript that names its element, when it is drawn."""
        found = f"[...document.querySelectorAll('figure')].find(f => f.querySelector('h3').textContent === {title!r})"
        self.js(f"{found}.scrollIntoView({{block: 'center'}})")
        self.wait(f"{found}.querySelector('.main-svg')")
        return f"{found}.querySelector('.plot')"

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        event = {"type": kind, "x": x, "y": y, **more}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def requests(self) -> list[str]:
        """Since the last time: what was asked of the network, or would have been, but for data within the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:", "about:", "chrome:"))]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def shot(self, name: str) -> None:
        if SHOTS:
            self.driver.save_screenshot(f"{SHOTS}/{name}.png")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not shutil.which(CHROMIUM) or not shutil.which(DRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


def written(run: Path) -> Path:
    Report(run).write(run / "report.html")
    return run / "report.html"


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything."""
    return written(full(tiny_run, tmp_path_factory.mktemp("full") / "run"))


def as_data(page: Path) -> str:
    return re.search('id="page-data">(.*?)</script>', page.read_text(), re.DOTALL)[1]


def look_through(browser: Browser, name: str) -> int:
    """Scrolls from top to bottom, so that all is drawn; returns the number of charts."""
    height = browser.js("return document.documentElement.scrollHeight")
    for number, top in enumerate(range(0, height, 700)):
        browser.js(f"scrollTo(0, {top})")
        time.sleep(0.15)
        browser.shot(f"{name}-{number:02d}")
    undrawn = "[...document.querySelectorAll('.plot')].filter(p => !p.querySelector('.main-svg'))"
    while browser.js(f"return {undrawn}.length"):
        browser.js(f"{undrawn}[0].scrollIntoView()")
        browser.wait(f"!({undrawn}.length) || {undrawn}[0].getBoundingClientRect().top > 2000 || true")
        time.sleep(0.1)
    return browser.js("return document.querySelectorAll('.plot .main-svg').length")


@pytest.mark.parametrize(("size", "theme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_all_is_drawn_with_no_error_and_no_request(browser, page, size, theme):
    browser.open(page, size, theme)
    assert look_through(browser, f"{'phone' if size == PHONE else 'wide'}-{theme}") > 40
    assert browser.errors() == [] and browser.requests() == [page.as_uri()]
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    background = browser.js("return getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", background)[0])
    assert red < 60 if theme == "dark" else red > 200
    assert browser.js("return document.querySelector('#gallery pre .answer').textContent").startswith("at 10")


def test_hover_says_the_values_and_zoom_narrows_the_axis(browser, page):
    plot = browser.open(page).show("Training loss")
    left, top, width, height = browser.js(
        f"const r = {plot}.querySelector('.nsewdrag').getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
    )
    browser.mouse("mouseMoved", left + width * 0.5, top + height * 0.5)
    browser.mouse("mouseMoved", left + width * 0.5 + 2, top + height * 0.5)
    text = browser.wait(f"{plot}.querySelector('.hoverlayer').textContent")
    assert re.search(r"loss : [\d.]+", text), text
    before = browser.js(f"return {plot}.layout.xaxis.range")
    browser.mouse("mousePressed", left + width * 0.3, top + height * 0.5, button="left", clickCount=1)
    for share in (0.4, 0.5, 0.6):
        browser.mouse("mouseMoved", left + width * share, top + height * 0.5, button="left", buttons=1)
    browser.mouse("mouseReleased", left + width * 0.6, top + height * 0.5, button="left", clickCount=1)
    browser.wait(f"{plot}.layout.xaxis.range[1] < {before[1]}")
    after = browser.js(f"return {plot}.layout.xaxis.range")
    share = (after[1] - after[0]) / (before[1] - before[0])
    assert share == pytest.approx(0.3, abs=0.05)
    browser.set("smoothing", 0.9, "input")
    time.sleep(0.3)
    assert browser.js(f"return {plot}.layout.xaxis.range") == pytest.approx(after)  # a zoom outlives other changes
    assert browser.errors() == []


def test_a_series_goes_with_a_click_on_its_name(browser, page):
    plot = browser.open(page).show("Training loss by subset")
    name = f"[...{plot}.querySelectorAll('.legendtoggle')][0]"
    x, y = browser.js(f"const r = {name}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y, button="left", clickCount=1)
    browser.wait(f"{plot}.data.some(t => t.visible === 'legendonly')")
    browser.set("smoothing", 0.3, "input")
    time.sleep(0.3)
    assert browser.js(f"return {plot}.data.some(t => t.visible === 'legendonly')"), "it is back after a change"


def test_axes_smoothing_marks_and_scale_change_the_charts(browser, page):
    plot = browser.open(page).show("Training loss")
    main = f"{plot}.data.find(t => t.name === 'loss' && t.showlegend !== false)"
    last = {axis: None for axis in ("step", "tokens", "flops", "hours")}
    for axis in last:
        browser.set("axis", axis, "change")
        last[axis] = browser.js(f"return {main}.x.at(-1)")
        assert browser.js(f"return {plot}.layout.xaxis.title.text").startswith(axis.replace("flops", "FLOPs"))
    assert (last["step"], last["tokens"]) == (25, 20 * 8 * 32 + 5 * 8 * 64)
    assert last["flops"] > 1e4 * last["tokens"] and 0 < last["hours"] < 1

    def spread(amount: float) -> float:
        browser.set("smoothing", amount, "input")
        time.sleep(0.3)
        y = browser.js(f"return {main}.y")
        return sum(abs(a - b) for a, b in zip(y, y[1:], strict=False))

    assert spread(0) > spread(0.5) > spread(0.95)
    assert browser.js(f"return {plot}.data.filter(t => t.yaxis === 'y2').length") == 3
    browser.js("document.getElementById('marks').click()")
    assert browser.js(f"return {plot}.data.filter(t => t.yaxis === 'y2').length") == 0
    browser.js(f"{plot}.closest('figure').querySelector('.log').click()")
    assert browser.js(f"return {plot}.layout.yaxis.type") == "log"
    assert browser.errors() == []


def test_the_theme_is_chosen_and_charts_follow(browser, page):
    plot = browser.open(page).show("Training loss")
    ink = browser.js(f"return {plot}.layout.font.color")
    button = "document.getElementById('theme')"
    browser.js(f"{button}.click(); {button}.click()")
    assert browser.js("return document.documentElement.dataset.theme") == "dark"
    assert browser.js(f"return {plot}.layout.font.color") != ink
    browser.js(f"{button}.click()")
    assert browser.js("return document.documentElement.dataset.theme || ''") == ""


def test_a_page_beside_a_training_reads_itself_anew_and_keeps_what_was_chosen(browser, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    report = Report(run)
    report.write(run / "report.html", reload_s=2)
    browser.open(run / "report.html")
    browser.js("window.first = true; scrollTo(0, 800)")
    browser.set("axis", "tokens", "change")
    report.subject.update()
    report.write(run / "report.html")
    browser.wait("window.first !== true && document.documentElement.dataset.ready && !DATA.reload_s")
    assert browser.js("return document.getElementById('axis').value") == "tokens"
    plot = browser.show("Training loss")
    assert browser.js(f"return {plot}.layout.xaxis.title.text") == "tokens"
    assert set(browser.requests()) == {(run / "report.html").as_uri()}  # as often as a slow write left it time for
    time.sleep(2.5)
    assert browser.requests() == [] and browser.errors() == []  # no more: the run has ended


def test_samples_are_browsed_by_task_document_and_checkpoint(browser, page):
    browser.open(page)
    choose = "const s = document.querySelectorAll('#samples select')[arguments[0]]; "
    choose += "s.value = [...s.options].find(o => o.textContent === arguments[1]).value; "
    choose += "s.dispatchEvent(new Event('change'))"
    browser.js(choose, 0, "gsm8k")
    cards = "document.querySelectorAll('#samples .card')"
    assert browser.js(f"return {cards}.length") == 1
    assert browser.js(f"return {cards}[0].querySelectorAll('h5').length") == 3
    browser.js(choose, 2, "step 20")
    steps = browser.js(f"return [...{cards}[0].querySelectorAll('h5')].map(h => h.textContent.slice(0, 7))")
    assert steps == ["step 20"]
    browser.js(choose, 1, "all")
    assert browser.js(f"return {cards}.length") == 8


def test_hostile_text_stays_text(browser, tiny_run, tmp_path):
    """Seen red with `innerHTML` in browse.js, and without `plain` in charts.js (a link in the legend)."""
    page = written(full(tiny_run, tmp_path / "run", HOSTILE))
    browser.open(page)
    look_through(browser, "hostile")
    assert browser.js("return window.hit === undefined")
    made = "main a, main img, main iframe, svg a, svg image[href^=http]"
    assert browser.js("return document.querySelectorAll(arguments[0]).length", made) == 0
    assert browser.errors() == [] and browser.requests() == [page.as_uri()]


def test_a_request_or_script_of_another_is_seen_and_refused(browser, page, tmp_path):
    """The other tests would see one: the policy refuses it, which is an error of the console."""
    bad = tmp_path / "bad.html"
    planted = '<main><img src="http://127.0.0.1:9/x.png"><script>window.hit=1</script>'
    bad.write_text(page.read_text().replace("<main>", planted))
    browser.open(bad)
    assert browser.js("return window.hit === undefined")
    assert len([error for error in browser.errors() if "Content Security Policy" in error]) == 2


def test_it_prints(browser, page, tmp_path):
    import base64

    browser.open(page)
    found = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(found["data"])
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 5
    if SHOTS:
        Path(SHOTS, "print.pdf").write_bytes(pdf)
    browser.js("dispatchEvent(new Event('beforeprint'))")
    assert browser.js("return [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    assert browser.js("return document.documentElement.dataset.theme") == "light"
    browser.js("dispatchEvent(new Event('afterprint'))")
    assert browser.errors() == []


def test_a_page_of_many_rows_opens_soon(browser, tiny_run, tmp_path):
    """Of as many points as a page can have: it is small, and draws what is looked at; a slow machine takes its time."""
    run = full(tiny_run, tmp_path / "run")
    template = json.loads((run / "metrics" / "chunk-00001.jsonl").read_text().splitlines()[0])
    template = {key: value for key, value in template.items() if not isinstance(value, dict)}
    template |= {f"{what}/subset{i}": 2.5 for what in ("loss", "targets") for i in range(26)}
    shutil.rmtree(run / "metrics")
    long_metrics(run / "metrics", template, 6_000, spike=1_234)
    page = written(run)
    browser.open(page)
    took = float(browser.wait("document.documentElement.dataset.drawn || (scrollTo(0, 900), 0)"))
    size, count = page.stat().st_size, "return document.querySelectorAll(arguments[0]).length"
    drawn, charts = browser.js(count, ".plot:has(.main-svg)"), browser.js(count, ".plot")
    print(f"{size:,} bytes, first chart after {took:.0f} ms, {drawn} of {charts} drawn")
    assert 0 < drawn < charts / 4 and size < 6_000_000
    assert 99.5 in dict(json.loads(as_data(page))["runs"]["0"]["series"])["loss"]["high"]
