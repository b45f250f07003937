"""The pages of a server that has keys: they ask for one, once, and keep it to themselves."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from tests.browser.page_kit import Watched
from tests.conftest import FakeServer, fake_server
from tests.integration.door_kit import KeysFile, keys_file


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    return keys_file(tmp_path)


@pytest.fixture
async def server(keys: KeysFile) -> AsyncIterator[FakeServer]:
    settings = {"auth": {"keys_file": str(keys.path)}, "accept_any_model": True}
    async with fake_server(server=settings) as fake:
        yield fake


async def test_the_page_asks_for_a_key_once_and_is_live(browser: Browser, server: FakeServer, keys: KeysFile) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    watched = Watched(page)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    await page.goto(server.url)
    form = page.locator("#key-form")
    await expect(form).to_contain_text("This server asks for a key.")
    await expect(page.locator("#status-text")).to_have_text("a key is needed")
    for name, problem in (("unknown", "This key is not known here."), ("infer", "This key has not the right to this.")):
        await form.get_by_label("Key").fill(keys.tokens.get(name, "mlis_nothing"))
        await form.get_by_role("button").click()
        await expect(form).to_contain_text(problem)
    await form.get_by_label("Key").fill(keys.tokens["metrics"])
    await form.get_by_label("Key").press("Enter")
    await expect(page.locator("#status-text")).to_have_text("ready")
    await expect(page.locator("#feed")).to_have_text("live")
    await expect(form).to_have_count(0)
    await page.reload()
    await expect(page.locator("#feed")).to_have_text("live")
    await expect(form).to_have_count(0)
    assert keys.tokens["metrics"] not in await page.content()
    assert not [url for url in sent if "mlis_" in url]
    assert {each for each in watched.complaints if "401" not in each and "403" not in each} == set()
    other = await context.new_page()  # another tab has a session of its own
    await other.goto(server.url)
    await expect(other.locator("#key-form")).to_be_visible()


async def test_a_key_that_is_taken_back_is_asked_for_again(
    browser: Browser, server: FakeServer, keys: KeysFile
) -> None:
    page = await browser.new_page()
    await page.goto(server.url)
    await page.locator("#key-form").get_by_label("Key").fill(keys.tokens["metrics"])
    await page.locator("#key-form").get_by_role("button").click()
    await expect(page.locator("#feed")).to_have_text("live")
    keys.path.write_text("keys: []")
    await expect(page.locator("#key-form")).to_contain_text("This key is not known here.", timeout=20_000)


async def test_the_page_of_the_api_sends_the_key(browser: Browser, server: FakeServer, keys: KeysFile) -> None:
    page = await browser.new_page()
    await page.goto(f"{server.url}/docs")
    box = page.locator(".route", has=page.get_by_text("/v1/embeddings", exact=True))
    await box.locator("summary").click()
    await box.get_by_role("button", name="Send").click()
    form = page.locator("#key-form")
    await expect(form).to_contain_text("This server asks for a key.")
    await form.get_by_label("Key").fill(keys.tokens["infer"])
    await form.get_by_role("button").click()
    await expect(box.get_by_role("status")).to_contain_text("200 after")
    await expect(box.locator("pre")).to_contain_text('"space_id"')
