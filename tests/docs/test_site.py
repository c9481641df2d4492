"""The documentation site in a browser: it builds without warnings, and every page works."""

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from research.analysis import wire

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline", "selenium")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
CHROMES = ("chromium", "chromium-browser", "google-chrome")
CHROME = next(filter(None, map(shutil.which, CHROMES)), None)
DRIVER = shutil.which("chromedriver")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1300, "height": 900, "deviceScaleFactor": 1, "mobile": False}
FLAGS = (
  *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
  *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(MISSING), reason=f'pip install -e ".[docs]": no {", ".join(MISSING)}'),
  pytest.mark.skipif(not (CHROME and DRIVER), reason="apt install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def site():
  """The address of the site, built with warnings as errors and served from this process."""
  build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
  environ = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [*build, str(ROOT / "docs"), str(SITE)],
    capture_output=True,
    text=True,
    env=environ,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  handler = functools.partial(Quiet, directory=str(SITE))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
  """Serves files without a line for each."""

  def log_message(self, format, *args):
    del format, args


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = str(CHROME)
  for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  service = webdriver.ChromeService(str(DRIVER))
  driver = webdriver.Chrome(options=options, service=service)
  try:
    yield driver
  finally:
    driver.quit()


def shown_as(browser, size) -> None:
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def until(condition: Callable[[], object], seconds: float = 20.0) -> object:
  """Waits for a condition to hold; returns its value, or that of the end."""
  end = time.monotonic() + seconds
  while not (found := condition()) and time.monotonic() < end:
    time.sleep(0.1)
  return found


def pages() -> list[str]:
  """All pages; the theme leaves templates of its own among its static files."""
  every = (str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
  return sorted(page for page in every if not page.startswith("_static"))


# Every formula is typeset, or the page has none.
TYPESET = """
return !document.querySelector('.math') || !!document.querySelector('mjx-container')
"""


def test_every_page_opens_without_errors_and_without_a_network(site, browser):
  wrong = {}
  for page in pages():
    shown_as(browser, DESK)
    browser.get(site + quote(page))
    typeset = until(lambda: browser.execute_script(TYPESET))
    logged = [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    from_where = "return performance.getEntriesByType('resource').map(one => one.name)"
    fetched = [url for url in browser.execute_script(from_where) if not url.startswith(site)]
    fetched = [url for url in fetched if not url.startswith("data:")]
    faulty = browser.execute_script("return document.querySelectorAll('mjx-merror').length")
    shown_as(browser, PHONE)
    wide = browser.execute_script("return document.documentElement.scrollWidth") - PHONE["width"]
    found = {
      "console": logged,
      "fetched from elsewhere": fetched,
      "formulas that do not parse": faulty,
      "not typeset": not typeset,
      "pixels wider than a phone": wide if wide > 10 else 0,
    }
    if any(found.values()):
      wrong[page] = {name: value for name, value in found.items() if value}
  assert not wrong


def test_search_finds_a_method(site, browser):
  shown_as(browser, DESK)
  browser.get(site + "search.html?q=diloco")
  links = "return [...document.querySelectorAll('ul.search li a')].map(one => one.href)"
  is_found = lambda: any("catalogue/methods" in url for url in browser.execute_script(links))
  assert until(is_found), browser.execute_script(links)


def test_a_code_block_copies(site, browser):
  from selenium.webdriver import ActionChains

  shown_as(browser, DESK)
  browser.get(site + "index.html")
  rights = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
  browser.execute_cdp_cmd("Browser.grantPermissions", rights)
  there = "return document.querySelectorAll('button.copybtn').length"
  assert until(lambda: browser.execute_script(there))
  text = browser.execute_script("return document.querySelector('.highlight pre').innerText")
  shown = browser.find_element("css selector", "button.copybtn")
  ActionChains(browser).move_to_element(shown).click().perform()
  read = """
    const done = arguments[0];
    navigator.clipboard.readText().then(done, error => done('refused: ' + error));
  """
  copied = until(lambda: (browser.execute_async_script(read) or "").strip())
  assert copied == text.strip()


def test_dark_mode_can_be_chosen(site, browser):
  shown_as(browser, DESK)
  browser.get(site + "index.html")
  theme = "return document.documentElement.dataset.theme"
  browser.find_element("css selector", ".theme-switch-button").click()
  browser.find_element("css selector", ".theme-change-button[data-mode=dark]").click()
  assert browser.execute_script(theme) == "dark"


# Bandwidth in bits per second, latency and computing in seconds, workers, parameters.
PLACES = (
  (1e9, 1e-3, 1.0, 8, 1_000_000_000),
  (1e6, 0.3, 100.0, 2, 1_000_000_000_000),
  (1e12, 1e-6, 0.001, 10_000, 100_000),
  (5e7, 0.02, 0.05, 64, 30_000_000),
)


@pytest.mark.parametrize("place", PLACES)
def test_the_advisor_ranks_as_python_does(site, browser, place):
  """The page is opened as a file, without a server."""
  from experiments.reports import advice
  from research.analysis import cost
  from research.analysis.network import Network

  del site
  bandwidth, latency, computing, workers, parameters = place
  browser.get(f"file://{SITE}/advisor.html")
  named = f"{{bandwidth: {bandwidth}, latency: {latency}, computing: {computing}, workers: "
  named += f"{workers}, parameters: {parameters}, encoding: 0}}"
  methods = browser.execute_script("return window.ADVISOR_DATA.methods")
  found = browser.execute_script(f"return window.advisor.rank({named})")

  def option(method):
    rows = [
      {
        "operation": one["operation"],
        "axis": "data",
        "payload_bytes": (one["fixed"] + one["by_workers"] / workers) * parameters,
        "sent_bytes": (one["fixed"] + one["by_workers"] / workers)
        * parameters
        * wire.ring_share(one["operation"], workers),
        "messages": one["messages"],
      }
      for one in method["transfers"]
    ]
    low, ratio, high = method["steps"]
    load = cost.load(rows, {"data": workers})
    rest = (method["period"], method["delay"], ratio, low, high)
    return advice.Option(method["name"], method["spec"], (), load, 0.0, 0.0, *rest)

  network = Network(upload=bandwidth, download=bandwidth, latency=latency)
  options = [option(method) for method in methods]
  want = advice.ranked(options, network, workers=workers, computing=computing)
  assert [one["method"]["name"] for one in found] == [row["name"] for row in want]
  for one, row in zip(found, want, strict=True):
    assert one["seconds"] == pytest.approx(row["step_seconds"], rel=1e-9)
    assert one["sent"] == pytest.approx(row["bytes_per_step"], rel=1e-9)


SHOWN = "return document.getElementById(arguments[0]).textContent"
SLIDERS = ("bandwidth", "latency", "computing", "workers", "parameters")


def test_the_advisor_moves_with_its_sliders(site, browser):
  """By keyboard, to both ends of every slider, and on a phone."""
  from selenium.webdriver.common.keys import Keys

  shown_as(browser, PHONE)
  browser.get(site + "advisor.html")
  rows = "return document.querySelectorAll('#advisor-ranking tr').length"
  count = browser.execute_script("return window.ADVISOR_DATA.methods.length")
  seen = set()
  for name in SLIDERS:
    slider = browser.find_element("id", f"advisor-{name}")
    for key in (Keys.HOME, Keys.END, Keys.ARROW_LEFT):
      before = browser.execute_script(SHOWN, f"advisor-{name}-text")
      slider.send_keys(key)
      seen.add(browser.execute_script(SHOWN, "advisor-verdict"))
      assert browser.execute_script(rows) == count
      text = browser.execute_script("return document.querySelector('article').textContent")
      assert not {"NaN", "Infinity", "undefined"} & {*text.split()}
      if key == Keys.ARROW_LEFT:
        assert browser.execute_script(SHOWN, f"advisor-{name}-text") != before
  assert any(said.startswith("Do not compress") for said in seen)
  assert any(said.startswith("Use ") for said in seen)
  dots = "return document.querySelectorAll('#advisor-front circle').length"
  assert browser.execute_script(dots) == count
  address = browser.current_url  # the sliders' values are in the address
  browser.get("about:blank")
  browser.get(address)
  assert browser.execute_script(SHOWN, "advisor-verdict") in seen
  assert not [one for one in browser.get_log("browser") if one["level"] == "SEVERE"]
