"""Opens the page of `vrtrain report` and `vrtrain watch` in Chromium as a person would: hovers, toggles, filters, zooms,
and sees the live page follow a run, a resume that cuts it back, and a run that appears.

Usage: browser_test.py VRTRAIN CHROMIUM CONFIG FOLDER
CONFIG is a config of a run of 60 steps with an evaluation every 7; FOLDER an empty folder. Needs playwright (pip).
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

vrtrain, chromium, config, folder = sys.argv[1:5]
folder = Path(folder).resolve()
runs = folder / "runs"


def train(name, *settings, resume=False, wait=True):
    command = [vrtrain, "pretrain", "--quiet", "--run-dir", str(runs / name)]
    command += ["--resume"] if resume else ["--config", config]
    for setting in settings:
        command += ["--set", setting]
    process = subprocess.Popen(command)
    if wait:
        assert process.wait() == 0, command
    return process


def records(name):
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


class Page:
    """A page that fails the test on any error and on any request but those that `allowed` begins."""

    def __init__(self, browser, address, allowed, width=1400, scheme="light"):
        self.problems = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        foreign = lambda request: not request.url.startswith((allowed, "data:"))
        self.page.on("request", lambda request: foreign(request) and self.problems.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector(".uplot canvas")

    def expect_shown(self, text):
        for _ in range(100):
            if self.page.inner_text("#count") == text:
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{self.page.inner_text('#count')!r} is not {text!r}")

    def hover(self, chart, share):
        box = self.page.locator(f"#{chart} .u-over").bounding_box()
        self.page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
        self.page.wait_for_selector(f"#{chart} .tip:not([hidden])")
        rows = self.page.locator(f"#{chart} .tip tr").all()
        return [[cell.inner_text().strip() for cell in row.locator("td").all()] for row in rows]

    def step_of(self, name):
        """The step that the list shows of a run, 0 where it shows none."""
        script = """(name) => {
          for (const run of document.querySelectorAll("#runs .run"))
            if (run.querySelector(".name").textContent === name)
              return Number((/step ([\\d,]+)/.exec(run.textContent) || [0, "0"])[1].replaceAll(",", ""));
          return 0;
        }"""
        return self.page.evaluate(script, name)

    def wait_for_entries(self, count):
        for _ in range(100):
            if self.page.locator("#runs .run").count() == count:
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"the list does not come to {count} runs")

    def wait_for_step(self, name, step):
        for _ in range(300):
            if self.step_of(name) == step:
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{name} is at step {self.step_of(name)}, not {step}")

    def close(self):
        assert not self.problems, self.problems
        self.page.close()


def report(browser):
    out = folder / "report.html"
    subprocess.run([vrtrain, "report", str(runs), "--out", str(out)], check=True)
    view = Page(browser, out.as_uri(), out.as_uri())
    page = view.page
    view.expect_shown("2 of 2 runs shown")

    # The values under the cursor are those of metrics.jsonl.
    rows = view.hover("chart-loss", 0.5)
    training = next(row for row in rows if row[0] == "one training")
    step = int(training[3].removeprefix("step ").replace(",", ""))
    expected = records("one")[step - 1]["loss"]
    assert abs(float(training[1]) / expected - 1) < 1e-5, (training, expected)
    assert len(rows) == 4, rows

    # Toggling, filtering and "only" change what is drawn.
    box = page.locator("#runs input").first
    box.uncheck()
    view.expect_shown("1 of 2 runs shown")
    assert [row[0] for row in view.hover("chart-gate", 0.5)] == ["two"]
    box.check()
    page.fill("#filter", "ONE")
    view.wait_for_entries(1)
    view.expect_shown("1 of 2 runs shown")
    page.fill("#filter", "")
    view.wait_for_entries(2)
    page.locator(".only").nth(1).click(force=True)
    view.expect_shown("1 of 2 runs shown")
    page.click("#all")

    # Axes, scales, smoothing.
    page.click("[data-x=tokens]")
    view.hover("chart-loss", 0.5)
    assert page.inner_text("#chart-loss .tip-head").startswith("Tokens: "), page.inner_text("#chart-loss .tip-head")
    page.click("[data-x=elapsed_s]")
    view.hover("chart-loss", 0.5)
    assert page.inner_text("#chart-loss .tip-head").startswith("Training time: ")
    page.click("[data-x=step]")
    page.check("#log-x")
    page.click("#chart-loss button")
    assert page.get_attribute("#chart-loss button", "aria-pressed") == "true"
    view.hover("chart-loss", 0.5)
    page.uncheck("#log-x")
    page.fill("#smoothing", "0")
    assert view.hover("chart-loss", 0.4)[0][2] == ""

    # Zoom by dragging, and back.
    area = page.locator("#chart-gate .u-over").bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.2, area["y"] + 50)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] * 0.4, area["y"] + 50, steps=4)
    page.mouse.up()
    assert page.is_visible("#unzoom")
    zoomed = view.hover("chart-loss", 0.99)[0]
    assert int(zoomed[3].removeprefix("step ")) < 30, zoomed
    page.click("#unzoom")

    # Only the settings that differ, or all of them.
    keys = lambda: page.locator("#config tr:not(:first-child) th").all_inner_texts()
    assert keys() == ["optimizer.lr"], keys()
    page.uncheck("#different")
    assert "train.steps" in keys()

    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = ground()
    page.click("#theme")
    assert ground() != light
    view.close()

    for width in (390, 1400):
        for scheme in ("light", "dark"):
            view = Page(browser, out.as_uri(), out.as_uri(), width, scheme)
            assert view.page.evaluate("document.documentElement.scrollWidth") <= width
            view.close()


def watch(browser):
    server = subprocess.Popen([vrtrain, "watch", str(runs), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip()
        view = Page(browser, address, address)
        view.wait_for_step("two", 60)
        # A run appears and grows while the page is open.
        process = train("three", "train.steps=4000", wait=False)
        seen = set()
        for _ in range(600):
            seen.add(view.step_of("three"))
            if len(seen) > 4:
                break
            view.page.wait_for_timeout(100)
        assert len(seen) > 4, seen
        process.terminate()
        assert process.wait() == 3
        last = records("three")[-1]["step"]
        view.wait_for_step("three", last)
        view.page.wait_for_selector("#runs .state.interrupted", timeout=10_000)
        # A resume from an earlier checkpoint cuts the run back.
        newest = max((runs / "two" / "checkpoints").iterdir())
        shutil.rmtree(newest)
        (runs / "two" / "latest").unlink()
        train("two", "train.steps=58", resume=True)
        view.wait_for_step("two", 58)
        rows = view.hover("chart-loss", 0.001)
        assert any(row[0].startswith("two") for row in rows), rows
        view.close()
    finally:
        server.terminate()


train("one")
train("two", "optimizer.lr=0.001")
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    report(browser)
    watch(browser)
    browser.close()
print("ok")
