"""The dashboard in a real browser, beside a long prompt and short ones.

LONGSPAN_SCREENSHOTS=FOLDER keeps what the browser has shown.
"""

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import zoo
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from program import PATIENCE_S, ServerProgram, wait_until

CHROMIUM = shutil.which("chromium")
KEY = "a key of the tests"
NUM_LONG, NUM_SHORT = 20_000, 200
PHONE_WIDTH = 360

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the dashboard is tested in Debian's chromium, which is not there"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    folder = tmp_path_factory.mktemp("dashboard")
    model = zoo.build("llama", folder / "model", max_position_embeddings=32_768)
    zoo.build_tokenizer(model)
    options = ("--served-model-name", "tiny", "--api-key", KEY, "--kv-cache-tokens", "14000")
    server = ServerProgram(model, folder, *options, "--max-num-seqs", "4", key=KEY)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=flags, chromium_sandbox=False, headless=True
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: ServerProgram) -> Iterator[Page]:
    """A page of its own; it must load nothing from elsewhere and complain of nothing."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1200, "height": 1000})
    context.set_default_timeout(1e3 * PATIENCE_S)
    page = context.new_page()
    elsewhere: list[str] = []
    faults: list[str] = []
    page.on("request", lambda asked: elsewhere.append(asked.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    yield page
    context.close()
    assert all(url.startswith((server.url, "data:")) for url in elsewhere), elsewhere
    unreached = re.compile("Failed to load resource.*(401|ERR_CONNECTION_REFUSED)")
    assert [fault for fault in faults if not unreached.match(fault)] == []


def watch(page: Page) -> None:
    """Open the dashboard and give it the key."""
    page.goto("/dashboard")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("status")).to_have_text("live")


@contextmanager
def at_work(server: ServerProgram, **asked: Any) -> Iterator[None]:
    """A completion that is under way, and done at the end."""
    body = {"model": "tiny", "ignore_eos": True, **asked}
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(server.http.post("/v1/completions", json=body).status_code)
    )
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)
    assert answers == [200]


@contextmanager
def frozen(server: ServerProgram) -> Iterator[None]:
    """Ranks that stand still, so that what is read of them one after the other fits together."""
    ranks = [psutil.Process(pid) for pid in server.rank_pids()]
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


def labelled(server: ServerProgram, name: str, label: str) -> dict[str, float]:
    """A figure of /metrics for each value of a label."""
    pattern = rf'^{name}{{.*{label}="([^"]*)".*}} (\S+)$'
    found = re.findall(pattern, server.http.get("/metrics").text, re.MULTILINE)
    return {value: float(figure) for value, figure in found}


def metrics(server: ServerProgram) -> dict[str, Any]:
    return {
        "running": server.figure("vllm:num_requests_running"),
        "waiting": server.figure("vllm:num_requests_waiting"),
        "used": list(labelled(server, "longspan:kv_pages_used", "rank").values()),
        "free": list(labelled(server, "longspan:kv_pages_free", "rank").values()),
    }


def number(text: str) -> float:
    return float(text.replace(",", ""))


def shown(page: Page) -> dict[str, Any]:
    """The same as the page has it."""
    texts = page.locator(".rank .pages").all_inner_texts()
    pages = [[number(part) for part in re.findall(r"[\d,]+", text)] for text in texts]
    return {
        "running": number(page.locator("#running").inner_text()),
        "waiting": number(page.locator("#waiting").inner_text()),
        "used": [used for used, _ in pages],
        "free": [total - used for used, total in pages],
    }


def keep_pictures(page: Page) -> None:
    """The page fits, whatever it is looked at with."""
    folder = os.environ.get("LONGSPAN_SCREENSHOTS")
    looks: dict[str, tuple[Literal["light", "dark"], int]] = {
        "light": ("light", 1200),
        "dark": ("dark", 1200),
        "phone": ("light", PHONE_WIDTH),
    }
    for name, (scheme, width) in looks.items():
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 1000})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name}: the page is {wide} pixels wide"
        if folder:
            page.wait_for_timeout(1500)
            page.screenshot(path=Path(folder) / f"dashboard-{name}.png", full_page=True)
    page.set_viewport_size({"width": 1200, "height": 1000})


def test_it_asks_for_the_key(page: Page, server: ServerProgram) -> None:
    """The page is anybody's, what it shows is not."""
    assert server.http.get("/dashboard/events", headers={"Authorization": ""}).status_code == 401
    page.goto("/dashboard")
    page.get_by_label("API key").fill("another")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_have_text("That is not the key.")
    expect(page.get_by_role("main")).to_be_hidden()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("main")).to_be_visible()
    expect(page.locator("#model")).to_have_text("tiny")
    page.reload()
    expect(page.get_by_role("main")).to_be_visible()
    assert KEY not in page.url


def test_it_shows_a_long_prompt_beside_short_ones(page: Page, server: ServerProgram) -> None:
    watch(page)
    long = [1 + index % 500 for index in range(NUM_LONG)]
    shorts = [[7 + which] * NUM_SHORT for which in range(3)]
    with at_work(server, prompt=long, max_tokens=8), at_work(server, prompt=shorts, max_tokens=100):
        bar = page.get_by_role("listitem").filter(has_text=f"of {NUM_LONG:,} tokens")
        bar = bar.get_by_role("progressbar")
        wait_until(
            lambda: shown(page)["running"] == 4 and prefilled(bar) >= 15,
            "all to run, and the long prompt to be well under way",
        )
        with at_work(server, prompt="x", max_tokens=1), frozen(server):
            wait_until(lambda: server.figure("vllm:num_requests_waiting") == 1, "one to wait")
            figures = metrics(server)
            wait_until(lambda: shown(page) == figures, f"the page to show {figures}", 20)
            assert figures["running"] == 4
            assert prefilled(bar) < 100
            check_requests(page)
            check_sent(page, server)
            keep_pictures(page)
    wait_until(lambda: shown(page)["running"] == 0, "all to end")
    expect(page.locator("#idle")).to_be_visible()
    for chart in ("first", "each"):
        expect(page.locator(f"#{chart}-chart .now")).to_have_text(re.compile(r"^[\d.]+ m?s "))
    figures = metrics(server)
    wait_until(lambda: shown(page) == figures, f"the page to show {figures}", 20)
    assert figures["used"] == [0, 0]
    kept = page.locator(".rank .kept").all_inner_texts()
    assert all(number(text.removesuffix(" cached")) > 0 for text in kept)


def prefilled(bar: Locator) -> int:
    """Percent, as a progress bar says."""
    return int(bar.get_attribute("aria-valuenow") or 0) if bar.count() == 1 else 0


def check_requests(page: Page) -> None:
    """The long one lies across the ranks, each short one on its own."""
    requests = page.locator(".request").all_inner_texts()
    assert len(requests) == 4
    for text in requests:
        places = re.findall(r"rank \d(?: \(home\))?: \d+ pages?", text)
        if f"{NUM_LONG:,}" in text:
            assert len(places) == 2, text
            assert re.search(r"\b(pass_kv|gather_kv|pass_q|tree)\b", text), text
        else:
            assert len(places) == 1, text
            assert re.search(r"\blocal\b", text), text
    badges = page.locator(".request .badge")
    assert len(set(badges.all_inner_texts())) == 4
    assert len({badges.nth(index).get_attribute("class") for index in range(4)}) == 4
    for rank, pool in enumerate(page.locator(".pool").all()):
        label = pool.get_attribute("aria-label") or ""
        assert label.startswith(f"Rank {rank}: "), label
        assert label.count("; request ") >= 1, label


def check_sent(page: Page, server: ServerProgram) -> None:
    sent = {k: v for k, v in labelled(server, "longspan:sent_bytes_total", "strategy").items() if v}
    assert sent
    names = page.locator(".sent b").all_inner_texts()
    assert sorted(names) == sorted(sent)
    amounts = page.locator(".sent .amount").all_inner_texts()
    for name, amount in zip(names, amounts, strict=True):
        shown, unit = amount.split(",")[0].split()
        factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
        assert float(shown) * factor == pytest.approx(sent[name], rel=0.06)


def test_a_watcher_does_not_keep_the_server(page: Page, server: ServerProgram) -> None:
    watch(page)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.said
    expect(page.get_by_role("status")).to_have_text(re.compile("no news for"))
