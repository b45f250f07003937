"""The page of the HTTP API in a real browser: every route, and an example that is sent."""

from playwright.async_api import Browser, expect

from tests.conftest import fake_server


async def test_the_page_shows_every_route_and_sends_an_example(browser: Browser) -> None:
    async with fake_server(server={"accept_any_model": True}) as server:
        page = await browser.new_page()
        problems: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        await page.goto(f"{server.url}/docs")
        box = page.locator(".route", has=page.get_by_text("/v1/embeddings", exact=True))
        await box.locator("summary").click()
        await expect(box.get_by_role("row", name="dimensions")).to_be_visible()
        await box.get_by_role("button", name="Send").click()
        await expect(box.locator("pre")).to_contain_text('"space_id"')
        await expect(box.get_by_role("status")).to_contain_text("200 after")
        api = await (await page.request.get(f"{server.url}/openapi.json")).json()
        assert await page.locator(".route").count() == sum(len(methods) for methods in api["paths"].values())
        assert problems == []
        assert all(url.startswith(server.url) for url in requests)


async def test_a_wrong_body_shows_the_servers_own_words(browser: Browser) -> None:
    async with fake_server() as server:
        page = await browser.new_page()
        await page.goto(f"{server.url}/docs")
        box = page.locator(".route", has=page.get_by_text("/embed", exact=True))
        await box.locator("summary").click()
        await box.get_by_role("textbox").fill("<img src=x onerror=alert(1)>")
        await box.get_by_role("button", name="Send").click()
        await expect(box.locator("pre")).to_contain_text("not valid JSON")
        assert await page.locator("pre img").count() == 0
