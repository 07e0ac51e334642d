"""The built site in a headless Chromium: `make test-site`. Not collected by `make test`.

Chromium is Debian's package, or what CHROMIUM names.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site" / "html"
PAGES = sorted(o.relative_to(SITE).as_posix() for o in SITE.glob("**/*.html"))
PAGES = [o for o in PAGES if not o.startswith("_static/") and o != "404.html"]
BOOK = [o for o in PAGES if o != "search.html"]
SLOW = 240_000  # ms: a busy machine takes a minute to load a page
PHONE, DESKTOP = dict(width=390, height=800), dict(width=1280, height=900)


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.exit("no Chromium: apt-get install chromium, or set CHROMIUM to one", returncode=1)
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(
        viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(SLOW)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def phone(browser):
    "One page for all loads, so that scripts and styles are fetched once"
    started = browser.new_page(viewport=PHONE)
    started.set_default_timeout(SLOW)
    yield started
    started.close()


@pytest.mark.parametrize("name", BOOK)
def test_page_loads_without_error_and_fits_a_phone(phone, address, name):
    problems = []

    def said(message):
        if message.type == "error":
            problems.append(message.text)

    def asked(request):
        if not request.url.startswith((address, "data:")):
            problems.append(f"not from the site: {request.url}")

    def answered(response):
        if response.status > 399:
            problems.append(f"{response.status} {response.url}")

    events = dict(console=said, request=asked, response=answered)
    events["pageerror"] = lambda error: problems.append(str(error))
    for event, listener in events.items():
        phone.on(event, listener)
    phone.goto(address + name)
    formulas = "() => !document.querySelector('.math') || document.querySelector('mjx-container')"
    phone.wait_for_function(formulas)
    broken = "[...document.images].filter(o => o.complete && !o.naturalWidth).map(o => o.src)"
    problems += phone.evaluate(broken)
    problems += phone.evaluate("[...document.querySelectorAll('mjx-merror')].map(o => o.title)")
    width = phone.evaluate("document.documentElement.scrollWidth")
    glyphs = phone.locator("div.math mjx-c")
    lefts = glyphs.evaluate_all("all => all.map(o => o.getBoundingClientRect().left)")
    for event, listener in events.items():
        phone.remove_listener(event, listener)
    assert not problems
    assert width <= PHONE["width"]
    assert min(lefts, default=0) >= 0  # where no scrolling leads


class Anchors(HTMLParser):
    "Links, images and ids of a page"

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[o] for o in ("id", "name") if given.get(o)}
        for attribute in ("href", "src"):
            if given.get(attribute) and tag != "form":
                self.links.append(given[attribute])


def test_no_internal_link_or_image_is_broken():
    pages = {o: Anchors((SITE / o).read_text(encoding="utf-8")) for o in PAGES}
    broken = []
    for name, found in pages.items():
        for link in found.links:
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.I):
                continue
            path, anchor = urldefrag(urljoin(name, link))
            path = unquote(path.partition("?")[0]) or name
            if not (SITE / path).exists():
                broken.append((name, link))
            elif anchor and path in pages and unquote(anchor) not in pages[path].ids:
                broken.append((name, link))
    assert not broken


def test_links_between_chapters_equations_and_figures_are_many():
    text = {o: (SITE / o).read_text(encoding="utf-8") for o in BOOK if not o.startswith("api/")}
    inside = sum(
        len(
            re.findall(
                r'<a class="reference internal" href="[^"]*(?:#|\.html)', o.partition("<article")[2]
            )
        )
        for o in text.values()
    )
    citations = sum(len(re.findall(r'href="[^"]*114_references.html#id', o)) for o in text.values())
    assert inside >= 150 and citations >= 60


def test_search_finds_the_gradient(page, address):
    page.goto(address + "search.html?q=leave-one-out")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("document.querySelector('#search-results').innerText.includes('found')")
    found = page.eval_on_selector_all("#search-results li > a", "all => all.map(o => o.href)")
    assert any("theory/104_gradient" in o for o in found[:3])


def test_a_solution_opens_and_closes(page, address):
    page.goto(address + "exercises/804_gradient.html")
    solution = page.locator("details.solution").first
    code = solution.locator("div.highlight").first
    assert page.locator("details.solution").count() >= 4
    assert not code.is_visible()
    solution.locator("summary").first.click()
    assert code.is_visible()
    solution.locator("summary").first.click()
    assert not code.is_visible()


def test_long_code_folds(page, address):
    page.goto(address + "theory/104_gradient.html")
    fold = page.locator("details.hide").first
    assert not fold.locator("pre").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").first.is_visible()


def test_code_copies(page, address):
    page.goto(address + "index.html")
    button = page.locator("button.copybtn").first
    button.hover()
    button.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    shown = page.locator("div.highlight pre").first.inner_text()
    assert copied.strip() and copied.split() == shown.split()


def test_the_table_of_libraries_filters(page, address):
    page.goto(address + "theory/105_libraries.html")
    box = page.locator("input.filter").first
    rows = page.locator('table[id="T_libraries_reward"] tbody tr')
    all_rows = rows.count()
    box.fill("trl grpo")
    kept = [o for o in rows.all() if o.is_visible()]
    assert 0 < len(kept) < all_rows
    assert all("GRPO" in o.inner_text() for o in kept)
    box.fill("no such library")
    assert not any(o.is_visible() for o in rows.all())
    box.fill("")
    assert all(o.is_visible() for o in rows.all())


@pytest.mark.parametrize("theme, dark", [("light", False), ("dark", True)])
def test_the_theme_follows_the_reader(browser, address, theme, dark):
    page = browser.new_page(color_scheme=theme)
    page.set_default_timeout(SLOW)
    page.goto(address + "theory/104_gradient.html")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", colour)[0])
    turned = page.evaluate("getComputedStyle(document.querySelector('.cell_output img')).filter")
    page.goto(address + "theory/105_libraries.html")
    grounds = page.locator(".cell_output .text_html").evaluate_all(
        "all => all.map(o => getComputedStyle(o).backgroundColor)"
    )
    page.close()
    assert (red < 60) == dark and ("invert" in turned) == dark
    assert set(grounds) == {"rgba(0, 0, 0, 0)"}  # the page's own, in both


def test_first_page_leads_to_what_a_stranger_looks_for(page, address):
    "Definition, proof, gain, the own trainer, the command: all a click away"
    page.goto(address + "index.html")
    text = page.locator("article").inner_text()
    assert "klrb measure" in text
    links = page.eval_on_selector_all("article a", "all => all.map(o => o.href)")
    for wanted in ("102_value", "104_gradient", "701_variance", "105_libraries", "401_guide"):
        assert any(wanted in o for o in links), wanted


def test_where_nothing_is_and_what_there_is(page, address):
    page.goto(address + "404.html")
    assert "no such page" in page.inner_text("h1")
    listed = (SITE / "sitemap.xml").read_text()
    assert all(
        o == "index.html" or o in listed for o in BOOK if o != "genindex.html" and "-mod" not in o
    )
    urls = re.findall(r"<loc>(.*)</loc>", listed)
    root = page.get_attribute("a", "href")  # of the site, where a host puts it
    assert len(urls) == len(set(urls)) and urls[0] == root
    assert all((SITE / o.removeprefix(root)).exists() for o in urls)


# ---- the interactive page ----

EXPLORER = "prefix_explorer.html"


def part(page, name: str):
    return page.locator(f'#prefix-explorer [data-part="{name}"]')


def number(page, name: str) -> float:
    return float(part(page, name).inner_text().replace(",", "").replace("\u2212", "-"))


def bars(page) -> list:
    return part(page, "rows").locator(".bar").evaluate_all("all => all.map(o => o.style.width)")


def test_another_prefix_has_other_bars_and_another_kl(page, address):
    recorded = json.loads((ROOT / "site" / "prefix_explorer.json").read_text(encoding="utf-8"))
    page.goto(address + EXPLORER)
    seen = set()
    for i, row in enumerate(recorded["prefixes"]):
        part(page, "prefix").select_option(str(i))
        assert part(page, "prefix").locator("option:checked").inner_text() == row["text"]
        assert abs(number(page, "kl") - row["kl"]) <= 0.001  # stored roots, shown to 3 digits
        products = part(page, "rows").locator("td:last-child").all_inner_texts()
        products = [float(o.replace("\u2212", "-")) for o in products]
        assert abs(sum(products) - number(page, "total")) <= 0.0005 * (len(products) + 1)
        seen.add(tuple(bars(page)))
    assert len(seen) == len(recorded["prefixes"])


def test_draws_come_to_the_sum(page, address):
    "Within five standard errors at every prefix; the draws are the same at each visit"
    page.goto(address + EXPLORER)
    for i in range(part(page, "prefix").locator("option").count()):
        part(page, "prefix").select_option(str(i))
        assert number(page, "count") == 0
        for _ in range(4):
            page.locator('button[data-draws="1000"]').click()
        assert number(page, "count") == 4000
        error = number(page, "deviation") / 4000**0.5  # exact, of the mean
        assert abs(number(page, "mc") - number(page, "rb")) <= 5 * error + 0.001
        # A variance from n draws is off by sqrt(kurtosis / n) of itself, its root by half of that;
        # the kurtosis is below 80 at every prefix, and two digits are shown.
        assert abs(number(page, "error") / error - 1) < 5 * 0.5 * (80 / 4000) ** 0.5 + 0.05
        assert part(page, "rb").inner_text() == part(page, "kl").inner_text()
        assert part(page, "rows").locator("tr.drawn").count() == 1
        line = part(page, "chart").locator("polyline.mc").get_attribute("points")
        assert len(line.split()) > 100
    part(page, "again").click()
    assert number(page, "count") == 0 and part(page, "rows").locator("tr.drawn").count() == 0


def test_the_interactive_page_answers_to_keys(page, address):
    page.goto(address + EXPLORER)
    before = bars(page)
    part(page, "prefix").focus()
    page.keyboard.press("ArrowDown")
    assert bars(page) != before
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert number(page, "count") == 2
    assert "\u201c" in part(page, "last").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_interactive_page_on_a_phone_and_from_a_file(browser, theme):
    page = browser.new_page(viewport=PHONE, color_scheme=theme)
    page.set_default_timeout(SLOW)
    problems = []
    page.on("console", lambda o: problems.append(o.text) if o.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda o: o.url.startswith("file:") or problems.append(o.url))
    page.goto((SITE / EXPLORER).as_uri())
    for i in range(part(page, "prefix").locator("option").count()):
        part(page, "prefix").select_option(str(i))
        page.locator('button[data-draws="100"]').click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        right = "all => Math.max(...all.map(o => o.getBoundingClientRect().right))"
        assert page.locator("#prefix-explorer *").evaluate_all(right) <= PHONE["width"]
    page.close()
    assert not problems


def test_size():
    size = sum(o.stat().st_size for o in SITE.glob("**/*") if o.is_file())
    assert size < 40e6
