"""The report and MLflow's pages in a real browser: `make test-browser`, with Chromium and its driver installed.

The report is that of synthetic results, and of the run in RLHF_RUN (a folder in which `dvc repro` has finished) where that is
set; MLflow's pages are of that run, or of what `publish` writes for the synthetic one.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
from test_report import source

from rlhf_vs_dpo.report import content, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
RUN = os.environ.get("RLHF_RUN")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs Chromium and its driver (chromium, chromium-driver)"
    ),
]
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 800)
SHOTS = Path(os.environ.get("RLHF_SHOTS", "")) if os.environ.get("RLHF_SHOTS") else None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def sized(driver, size, dark=False):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600},
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def shot(driver, name):
    if SHOTS is not None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(SHOTS / f"{name}.png"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports to open, by name."""
    folder = tmp_path_factory.mktemp("report")
    found = synthetic.found()
    (folder / "index.html").write_text(page.render(content.blocks(source(found)), families=found["families"]))
    shown = {"synthetic": folder / "index.html"}
    if RUN:
        shown["run"] = Path(RUN).resolve() / "report" / "index.html"
    return shown


def opened(driver, address: str) -> None:
    """Open a page and wait until its figures are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(address)
    drawn = "const all = [...document.querySelectorAll('.chart')]; return all.length > 0 && all.every((chart) => chart.querySelector('svg'))"
    WebDriverWait(driver, 60).until(lambda _: driver.execute_script(drawn), "figures that are not drawn")


@pytest.mark.parametrize("which", ["synthetic", *(["run"] if RUN else [])])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_report_opens_sorts_and_shows_its_texts(browser, pages, which, size):
    from selenium.webdriver.common.by import By

    sized(browser, size)
    browser.get_log("browser")  # what came before
    opened(browser, pages[which].as_uri())
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("RLHF versus DPO")
    # The page itself does not scroll sideways; wide tables do, inside their frame.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".chart svg")) >= 8
    if size == DESKTOP:  # ...and on a screen nothing has to
        browser.execute_script(
            "document.querySelectorAll('section > details').forEach((section) => { section.open = true })"
        )
        frames = "return [...document.querySelectorAll('.wide, .chart')].filter((frame) => frame.scrollWidth > frame.clientWidth + 1).map((frame) => frame.getAttribute('aria-label'))"
        assert browser.execute_script(frames) == []
        browser.execute_script(
            "document.querySelectorAll('section:not(:first-child) > details').forEach((section) => { section.open = false })"
        )
    shot(browser, f"report-{which}-{size[0]}")

    def column(number):
        return [
            row.find_elements(By.CSS_SELECTOR, "th, td")[number].text
            for row in browser.find_elements(By.CSS_SELECTOR, "#table-main tbody tr")
        ]

    gold = [float(re.match(r"-?[\d.]+", text).group()) for text in column(1)]
    assert gold == sorted(gold, reverse=True)  # best first, as it is
    buttons = browser.find_elements(By.CSS_SELECTOR, "#table-main thead button")
    buttons[0].click()
    assert (
        column(0) == sorted(column(0), key=str.lower)
        and buttons[0].find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    )
    kl = next(i for i, button in enumerate(buttons) if button.text.strip(" ▲▼") == "KL")
    browser.execute_script("arguments[0].scrollIntoView({inline: 'center', block: 'center'})", buttons[kl])
    buttons[kl].click()
    values = [float(re.match(r"-?[\d.]+", text).group()) for text in column(kl)]
    assert values == sorted(values, reverse=True)
    buttons[kl].click()
    assert column(kl) != [] and [float(re.match(r"-?[\d.]+", t).group()) for t in column(kl)] == sorted(values)

    link = browser.find_element(By.CSS_SELECTOR, "nav a[href='#texts']")
    browser.execute_script("arguments[0].click()", link)
    post = browser.find_element(By.CSS_SELECTOR, "#texts details")
    said = post.find_element(By.CSS_SELECTOR, "td.said")
    assert not said.is_displayed()
    post.find_element(By.TAG_NAME, "summary").click()
    assert said.is_displayed() and len(post.find_elements(By.CSS_SELECTOR, "tbody tr")) >= 4
    browser.execute_script("arguments[0].scrollIntoView()", post)
    shot(browser, f"texts-{which}-{size[0]}")
    first = browser.find_element(By.CSS_SELECTOR, "#table-main tbody th a")
    target = first.get_attribute("href").rpartition("#")[2]
    browser.execute_script("arguments[0].click()", first)
    assert browser.find_element(By.ID, target).is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_a_policy_is_picked_out_everywhere(browser, pages):
    """By its name in the list, by a mark of a figure, by a row of a table; Escape lets it go."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    sized(browser, DESKTOP)
    opened(browser, pages["synthetic"].as_uri())

    def picked() -> tuple[set, set, set]:
        """By the list, by the signal of every figure, by the rows of tables."""
        rows = browser.find_elements(By.CSS_SELECTOR, "tr.picked")
        pressed = browser.find_elements(By.CSS_SELECTOR, ".policies [aria-pressed=true]")
        signals = browser.execute_script("return views.map((view) => view.signal('picked'))")
        return (
            {b.get_attribute("data-policy") for b in pressed},
            set(signals),
            {r.get_attribute("data-policy") for r in rows},
        )

    def faded() -> float:
        """Least opacity of a point in the comparison."""
        marks = browser.find_elements(By.CSS_SELECTOR, "#figure-comparison svg path[role='graphics-symbol']")
        return min(float(mark.get_attribute("opacity") or 1) for mark in marks)

    assert faded() > 0.8 and picked() == (set(), {""}, set())
    browser.find_element(By.CSS_SELECTOR, ".policies [data-policy=dpo]").send_keys(Keys.ENTER)
    assert picked() == ({"dpo"}, {"dpo"}, {"dpo"}) and faded() < 0.2
    row = browser.find_element(By.CSS_SELECTOR, "#table-main tr[data-policy=ppo] td")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", row)
    assert picked() == ({"ppo"}, {"ppo"}, {"ppo"})
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert picked() == (set(), {""}, set()) and faded() > 0.8
    marks = browser.find_elements(
        By.CSS_SELECTOR, "#figure-comparison svg [aria-roledescription='point'][aria-label*='policy: dpo']"
    )
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", marks[0])
    ActionChains(browser).move_to_element(marks[0]).pause(0.3).perform()
    assert "dpo" in browser.find_element(By.ID, "vg-tooltip-element").text
    ActionChains(browser).click(marks[0]).perform()
    assert picked()[0] == {"dpo"}
    shot(browser, "report-picked")


def test_the_report_can_be_read_in_the_dark_and_on_paper(browser, pages):
    sized(browser, DESKTOP, dark=True)
    opened(browser, pages["synthetic"].as_uri())

    def colours():
        return browser.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")

    def brightness(colour):
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    ink, paper = map(brightness, colours())
    assert ink > 180 and paper < 60
    shot(browser, "report-dark")
    sized(browser, DESKTOP)
    ink, paper = map(brightness, colours())
    assert ink < 60 and paper > 180
    sized(browser, DESKTOP, dark=True)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    ink, paper = map(brightness, colours())
    assert ink < 60 and paper > 180  # dark on a screen is no dark paper
    closed = "return document.querySelectorAll('details:not([open])').length"
    assert browser.execute_script(closed) > 0
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(closed) == 0
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(closed) > 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


# ---- MLflow ----------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def made_up_store(folder: Path) -> None:
    """A store as a run leaves it, from synthetic results: a run for each policy, then what `evaluate` publishes."""
    script = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import synthetic
from pathlib import Path
from rlhf_vs_dpo.run import frame, publish, recorder
from rlhf_vs_dpo.evaluation import views
inputs, found = synthetic.inputs(seeds=(0, 1)), synthetic.found(seeds=(0, 1))
folders = sorted({entry["folder"] for entry in views.for_tracking(found, inputs)} - {"best_of_4-0", "best_of_4-1"})
outs = "".join(f"  x@{f}:\\n    outs:\\n    - path: models/{f}\\n      md5: {i:032d}.dir\\n" for i, f in enumerate(folders))
Path("dvc.lock").write_text("stages:\\n" + outs)
Path("params.yaml").write_text((Path(sys.argv[2]).parent / "params.yaml").read_text())
entries = {entry["folder"]: entry for entry in views.for_tracking(found, inputs)}  # one of a policy with two prompts
pools = [{"folder": f"pool-{seed}", "method": "pool", "family": None} for seed in (0, 1)]
with recorder.shared(Path("mlflow.log")):
    for entry in [*entries.values(), *pools]:
        tags = {"method": entry["method"], "family": entry["family"], "policy": entry["folder"], "seed": str(entry["seed"])} if entry["family"] else {}
        if entry["family"] != "best_of_n":
            with frame.stage(f"x@{entry['folder']}", [], Path("runs") / f"{entry['folder']}.json", **tags) as run:
                for step in range(20):
                    run.log({"loss": 1 / (step + 1), "rollout/score": float(step)}, step)
publish.publish(views.for_tracking(found, inputs), found["axes"], print)
"""
    environment = {**os.environ, "DVC_ROOT": str(folder)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", script, tests.parent / "src", tests],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def mlflow_ui(tmp_path_factory):
    """Address of the experiment's runs, in the view that `make ui` opens."""
    if RUN:
        folder = Path(RUN).resolve()
    else:
        folder = tmp_path_factory.mktemp("store")
        made_up_store(folder)
    port = free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    told = subprocess.run(
        [sys.executable, "-m", "rlhf_vs_dpo.run.store"], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": store, "DVC_ROOT": str(folder)},
    ).stdout.strip()  # fmt: skip
    server = subprocess.Popen(
        [Path(sys.executable).parent / "mlflow", "ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(180):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        yield folder, told.replace(":5000", f":{port}")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def policies_of(folder: Path) -> set[str]:
    """The runs that belong in the view: every policy of the store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf-vs-dpo")
    return {run.info.run_name for run in client.search_runs([experiment.experiment_id])}


@pytest.mark.slow
def test_mlflow_shows_a_row_per_policy_and_compares_four(browser, mlflow_ui):
    """Everything is waited for: the page draws rows, columns and charts one after another, slowly on a busy machine."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def until(what, complaint: str):
        patient = WebDriverWait(browser, 240, ignored_exceptions=[StaleElementReferenceException])
        return patient.until(lambda _: what(), complaint)

    def of(css: str) -> list:
        return browser.find_elements(By.CSS_SELECTOR, css)

    def shown(words: str) -> bool:
        return words in browser.find_element(By.TAG_NAME, "body").text

    folder, address = mlflow_ui
    expected = sorted(policies_of(folder))
    sized(browser, (2600, 1100))
    browser.get(address.partition("#")[0])
    for key, value in (
        ("panelOpen_v1", "false"),
        ("fab.autoOpenedOnFirstLoad_v1", "true"),
    ):  # a panel that hides columns
        browser.execute_script(f"localStorage.setItem('mlflow.assistant.{key}', '{value}')")
    browser.get(address)
    until(lambda: sorted(link.text for link in of("[role=row] a[href*='/runs/']")) == expected, f"rows {expected}")
    for column in ("gold", "reward", "win_rate_vs_sft", "length_controlled_win_rate", "kl"):
        until(lambda column=column: shown(f"evaluation/{column}"), f"no column evaluation/{column}")
    shot(browser, "mlflow-runs")

    def choose_four() -> bool:  # the real boxes are hidden behind drawn ones; a table that is drawn anew forgets them
        boxes = of("[role=row] input[aria-label^='Press Space to toggle row selection']")[:4]
        for box in boxes:
            if not box.is_selected():
                browser.execute_script("arguments[0].click()", box)
        return len(boxes) == 4 and all(box.is_selected() for box in boxes)

    until(choose_four, "no four boxes that stay chosen")

    def compare() -> bool:
        found = browser.find_elements(By.XPATH, "//button[normalize-space()='Compare']")
        if found and found[0].is_enabled():
            browser.execute_script("arguments[0].click()", found[0])
        return shown("Comparing 4 Runs")

    until(compare, "no comparison of four")

    def drawn() -> bool:
        charts = of(".js-plotly-plot")
        return bool(charts) and charts[0].size["width"] > 200 and bool(charts[0].find_elements(By.CSS_SELECTOR, "path"))

    until(drawn, "no chart in the comparison")
    shot(browser, "mlflow-compare")

    sized(browser, (1700, 1000))
    browser.get(f"{address.partition('?')[0]}?compareRunsMode=CHART")
    browser.refresh()
    until(lambda: of("input[placeholder='Search metric charts']"), "no search")[0].send_keys("evaluation/")
    until(lambda: shown("evaluation\n("), "charts are not grouped by prefix")
    until(lambda: len(of(".js-plotly-plot .bars path")) >= 4, "no bars")
    shot(browser, "mlflow-charts")


@pytest.mark.slow
def test_policies_are_registered_and_the_best_has_an_alias(mlflow_ui):
    from mlflow.tracking import MlflowClient

    folder, _ = mlflow_ui
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    versions = client.search_model_versions("name = 'rlhf-vs-dpo-policy'")
    trained = {name for name in policies_of(folder) if not re.match(r"best_of_\d+-\d+$", name)}
    assert {version.tags["policy"] for version in versions} == trained and trained
    best = client.get_model_version_by_alias("rlhf-vs-dpo-policy", "best")
    assert best.tags["dvc.path"].startswith("models/") and best.tags["dvc.md5"]
