"""The chat page in a real browser, against hotloop's own server and a tiny model."""

from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="the page's tests need playwright")

from browser import TIMEOUT_MS, started_browser
from playwright.sync_api import Locator, Page, expect
from serving import serving

from hotloop import LLM

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(llm: LLM) -> Iterator[Page]:
    """The page of a server that asks for a key, once it has got it."""
    with serving(llm, keys=("secret",)) as server, started_browser() as browser:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="tiny")).to_be_visible()
        page.get_by_label("Settings", exact=True).click()
        yield page


def ask(page: Page, *, temperature: str, max_tokens: str) -> Locator:
    """Begins a chat, and returns its answer."""
    page.get_by_role("button", name="New chat", exact=True).click()
    page.get_by_label("Temperature").fill(temperature)
    page.get_by_label("Maximum tokens").fill(max_tokens)
    page.get_by_label("Maximum tokens").press("Tab")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    return finished(page)


def finished(page: Page) -> Locator:
    answer = page.locator(".message.assistant")
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(answer.get_by_role("alert")).to_have_count(0)
    return answer


def source(page: Page, answer: Locator) -> str:
    answer.get_by_label("Copy the answer").click()
    expect(answer.get_by_label("Copied")).to_be_visible()
    return page.evaluate("navigator.clipboard.readText()")


def test_the_same_seed_gives_the_same_answer(page: Page) -> None:
    answer = ask(page, temperature="1", max_tokens="40")
    expect(page.get_by_role("meter", name="Context in use")).to_be_visible()
    answer.get_by_role("button", name="seed").click()
    answer.get_by_label("Regenerate the answer").click()
    expect(answer).to_contain_text("same answer")


def test_an_answer_that_reached_its_limit_is_continued(page: Page) -> None:
    answer = ask(page, temperature="0", max_tokens="4")
    expect(answer).to_contain_text("reached its limit of tokens")
    begun = source(page, answer)
    expect(answer.get_by_label("Copied")).to_have_count(0)
    answer.get_by_role("button", name="Continue", exact=True).click()
    whole = source(page, finished(page))
    assert whole.startswith(begun)
    assert len(whole) > len(begun)
