"""The built book, served on this machine, and a browser that lets no page ask anybody else."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

BUILD = Path(os.environ.get("ATTNLAB_BUILD", Path(__file__).parents[2] / "_build")).resolve()
HTML = BUILD / "html"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pages() -> list[str]:
    """Return the names of the book's pages, the root first; only the root if the book is not built."""
    toc = BUILD / "site" / "_toc.yml"
    if not toc.is_file():
        return ["book/index"]
    return list(_files(yaml.safe_load(toc.read_text(encoding="utf-8"))))


def _files(entry: dict) -> Iterator[str]:
    """Yield the pages of a table of contents in order."""
    name = entry.get("root") or entry.get("file")
    if name:
        yield name.removesuffix(".md").removesuffix(".ipynb")
    for key in ("parts", "chapters", "sections"):
        for child in entry.get(key, []):
            yield from _files(child)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``name`` runs for every page of the table of contents."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", pages())


@pytest.fixture(scope="session")
def build() -> Path:
    """The folder that holds ``html``, ``out`` and ``site``."""
    return BUILD


@pytest.fixture(scope="session")
def page_with() -> Callable[[str], str]:
    """Find the first page of the book whose HTML holds a marker."""

    def find(marker: str) -> str:
        for page in pages():
            file = HTML / f"{page}.html"
            if file.is_file() and marker in file.read_text(encoding="utf-8"):
                return f"{page}.html"
        pytest.fail(f"no page of the book holds {marker!r}")

    return find


def _give_up(reason: str) -> None:
    """Skip, or fail where the browser tests are required."""
    if os.environ.get("ATTNLAB_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing: a request a line would bury a failure."""


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The address under which the built book is served."""
    if not (HTML / "book" / "index.html").is_file():
        _give_up(f"no built book in {HTML}: run `make book` first")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(HTML)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or the one that `playwright install chromium` brought."""
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            _give_up("no Chromium: install it, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Reader:
    """Somebody with a screen of one size who opens pages and notes what goes wrong on them."""

    def __init__(self, browser: Browser, site: str, width: int, scheme: str = "light") -> None:
        self.site = site
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            has_touch=width < 500,
        )
        self.context.route("**/*", self._route)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _route(self, route) -> None:
        """Let requests to the book through; note and refuse all others."""
        url = route.request.url
        if url.startswith(self.site) or urlsplit(url).scheme in ("data", "blob"):
            route.continue_()
        else:
            self.foreign.append(url)
            route.abort()

    def open(self, address: str) -> Page:
        """Open a page of the book and wait until its charts and equations are drawn."""
        self.page.goto(f"{self.site}/{address}")
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait for equations, and for every chart that has room to be drawn or to say why it was not."""
        self.page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")
        self.page.wait_for_function(
            """() => [...document.querySelectorAll(".attnlab-chart")].every(
                (box) => !box.clientWidth || box.dataset.state === "drawn" || box.querySelector(".attnlab-error"))"""
        )


@pytest.fixture
def reader(browser: Browser, site: str) -> Iterator:
    """A maker of readers: ``reader(width, scheme)``. Their windows close with the test."""
    contexts = []

    def make(width: int = 1280, scheme: str = "light") -> Reader:
        made = Reader(browser, site, width, scheme)
        contexts.append(made.context)
        return made

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, reader: Callable[..., Reader], page_with: Callable[[str], str]) -> Page:
    """The page with the test module's ``FIGURE``, on a desk and on a phone."""
    return reader(request.param).open(page_with(f'id="{request.module.FIGURE}"'))
