"""The page as a browser shows it, and the figures behind it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitloft.options import ServeOptions
from bitloft.serve.http import Server, background, open_service
from bitloft.serve.page import ROWS, policy, source
from tests.browser import Browser, browsing
from tests.serving import NAMES, World, error_of, raw, slowed

HOSTILE = "<img src=x onerror=window.broken=1>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as found:
        yield found


def page_of(server: Server) -> str:
    return server.url.removesuffix("v1")


def test_the_page_is_one_file_that_loads_nothing() -> None:
    html = source()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[a-z]+:""", html)
    assert "innerHTML" not in html
    assert "outerHTML" not in html
    assert "document.write" not in html
    assert "localStorage" not in html
    assert "sessionStorage" not in html
    assert not re.search(r"\son[a-z]+\s*=\s*[\"']", html)  # handlers in attributes
    assert not re.search(r"\sstyle\s*=", html)
    assert "unsafe" not in policy(html)
    assert "default-src 'none'" in policy(html)
    assert len(html) < 64_000


def test_the_page_and_its_headers(world: World) -> None:
    status, headers, body = raw(world.url, "GET", "/")
    assert (status, body.decode()) == (200, source())
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"] == policy(source())
    with world.server_with(page=False) as server:
        assert raw(server.url, "GET", "/")[0] == 404


def test_status(world: World) -> None:
    with world.server_with() as server:
        body = {"model": "beta", "prompt": "one two", "max_tokens": 5, "temperature": 0}
        assert raw(server.url, "POST", "/v1/completions", body)[0] == 200
        found = json.loads(raw(server.url, "GET", "/status")[2])
        assert (found["base"], found["reason"], found["requests"]) == ("base", None, 1)
        assert found["completion_tokens"] == 5
        assert (found["store"]["adapters"], found["store"]["resident"]) == (4, 4)
        rows = {row["name"]: row for row in found["rows"]}
        assert next(iter(rows)) == "base"
        assert set(NAMES) < set(rows)
        assert rows["beta"]["requests"] >= 1
        body["model"] = "base"
        assert raw(server.url, "POST", "/v1/completions", body)[0] == 200
        (found,) = json.loads(raw(server.url, "GET", "/status?search=base")[2])["rows"]
        assert (found["state"], found["requests"], found["completion_tokens"], found["running"]) == ("base", 1, 5, 0)
        assert rows["beta"]["bytes"] == world.service.store.find("beta").nbytes
        assert rows["poison"] == {
            "name": "poison", "state": "refused", "bytes": None, "running": 0, "requests": 0, "completion_tokens": 0,
            "note": "refused; the server's log says why",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("search=ALPH", ["alpha"]),
        ("search=a&sort=name&limit=3", ["base", "alpha", "beta"]),
        ("search=ta&sort=name", ["beta", "delta"]),
        ("search=nothing", []),
        ("search=foreign", ["foreign"]),
        ("limit=0", []),
    ],
)
def test_rows_are_found_and_cut_on_the_server(world: World, query: str, names: list[str]) -> None:
    found = json.loads(raw(world.url, "GET", f"/status?{query}")[2])
    assert [row["name"] for row in found["rows"]] == names
    assert found["matched"] >= len(names)


def test_the_largest_come_first(world: World) -> None:
    rows = json.loads(raw(world.url, "GET", "/status?sort=bytes")[2])["rows"]
    sizes = [row["bytes"] for row in rows if row["bytes"] is not None]
    assert sizes == sorted(sizes, reverse=True)
    assert rows[1]["name"] == "delta"  # the plain one


@pytest.mark.parametrize("query", ["sort=luck", "limit=-1", "limit=101", "limit=x", "limit=99999999999"])
def test_status_queries_that_are_refused(world: World, query: str) -> None:
    status, _, body = raw(world.url, "GET", f"/status?{query}")
    assert (status, error_of(body)["code"]) == (400, "invalid_value")
    assert ROWS == 100


def figures(browser: Browser, side: str) -> str:
    browser.until(f"document.getElementById('figures-{side}').textContent !== ''")
    return browser.text(f"figures-{side}")


def shown(browser: Browser, side: str) -> str:
    return str(browser.run(f"document.getElementById('answer-{side}').textContent"))


def test_two_adapters_side_by_side(world: World, browser: Browser) -> None:
    with world.server_with() as server:
        browser.open(page_of(server))
        browser.until("document.getElementById('health').textContent === 'ready'")
        browser.until("document.querySelectorAll('#rows tr').length > 4")
        assert browser.text("base") == "base"
        browser.type("prompt", "one two")
        browser.run("(document.getElementById('chat').checked = false, true)")
        browser.type("tokens", "7")
        browser.type("model-a", "alpha")
        browser.run("(document.querySelector('[aria-label=\"B: gamma\"]').click(), true)")
        browser.click("send")
        for side, name in (("a", "alpha"), ("b", "gamma")):
            assert "7 tokens · first after" in figures(browser, side)
            expected = world.alone(world.encode("one two"), name, 7)
            assert shown(browser, side) == (expected or "(an empty answer)")
        browser.until("Number(document.getElementById('requests').textContent) === 2")
        assert not browser.errors


def test_an_unknown_adapter_is_told_on_its_side_only(world: World, browser: Browser) -> None:
    with world.server_with() as server:
        browser.open(page_of(server))
        browser.until("document.getElementById('health').textContent === 'ready'")
        browser.type("prompt", "one two")
        browser.type("tokens", "3")
        browser.type("model-a", HOSTILE)
        browser.type("model-b", "beta")
        browser.click("send")
        assert "3 tokens" in figures(browser, "b")
        browser.until("document.getElementById('answer-a').className === 'answer failed'")
        assert shown(browser, "a") == f"the model {HOSTILE!r} does not exist."
        assert browser.run("window.broken") is None


def test_stopping_frees_the_rows(world: World, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.05)
    with world.server_with() as server:
        browser.open(page_of(server))
        browser.until("document.getElementById('health').textContent === 'ready'")
        browser.type("prompt", "one two")
        browser.type("tokens", "200")
        browser.click("send")
        browser.until("document.getElementById('running').textContent === '2'")
        browser.click("stop")
        assert figures(browser, "a") == "stopped"
        browser.until("document.getElementById('running').textContent === '0'")
        assert server.service.engine.idle


def test_a_key_is_asked_for_and_not_kept(world: World, browser: Browser) -> None:
    with world.server_with(api_key="k") as server:
        browser.open(page_of(server))
        browser.until("document.getElementById('health').textContent === 'key needed'")
        assert "needs an API key" in browser.text("notice")
        browser.type("key", "wrong")
        browser.until("document.getElementById('notice').textContent === 'This API key is wrong.'")
        browser.type("key", "k")
        browser.until("document.getElementById('health').textContent === 'ready'")
        browser.type("prompt", "one")
        browser.type("tokens", "2")
        browser.click("send")
        assert "2 tokens" in figures(browser, "a")
        assert browser.run("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == '[{},{},""]'
        browser.open(page_of(server))
        browser.until("document.getElementById('health').textContent === 'key needed'")


def test_a_server_that_is_gone(world: World, browser: Browser) -> None:
    with world.server_with() as server:
        browser.open(page_of(server))
        browser.until("document.getElementById('health').textContent === 'ready'")
        server.service.engine.drain()
        browser.until("document.getElementById('health').textContent === 'shutting down'")
    browser.until("document.getElementById('health').textContent === 'not reachable'")
    assert "does not answer" in browser.text("notice")


def test_names_from_the_disk_are_text(world: World, browser: Browser, tmp_path: Path) -> None:
    """A directory that is named like markup is shown as it is written."""
    directory = tmp_path / "adapters"
    (directory / HOSTILE).mkdir(parents=True)
    service = open_service(world.base, directory, ServeOptions(port=0), lambda line: None)
    with background(service, lambda line: None) as server:
        browser.open(page_of(server))
        browser.until("document.querySelectorAll('#rows tr').length === 2")
        cells: Any = browser.run("[...document.querySelectorAll('#rows td.name')].map((cell) => cell.textContent)")
    assert cells == ["base", HOSTILE]
    assert browser.run("document.querySelectorAll('#rows img').length") == 0
    assert browser.run("window.broken") is None


def test_the_policy_holds_in_the_browser(world: World, browser: Browser) -> None:
    browser.open(page_of_world(world))
    browser.until("document.getElementById('health').textContent === 'ready'")
    browser.errors.clear()
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.broken = 1';"
        " document.body.append(s); return true; })()"
    )
    assert browser.run("window.broken") is None
    assert any("Content Security Policy" in error for error in browser.errors)
    browser.errors.clear()


def page_of_world(world: World) -> str:
    return world.url.removesuffix("v1")


def test_a_browser_that_is_missing_skips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("chromium") is None
    assert os.environ["PATH"] == str(tmp_path)
    with pytest.raises(pytest.skip.Exception, match="needs a browser"), browsing(tmp_path):
        pass
