"""The chat page in a real browser, with a server that plays answers and faults."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the page's tests need playwright")

from browser import TIMEOUT_MS, started_browser
from playwright.sync_api import Browser, Locator, Page, expect
from scripted_server import CONTEXT, MODEL, Script, ScriptedServer

pytestmark = pytest.mark.browser

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, server: ScriptedServer) -> Iterator[Open]:
    """Opens the page in a profile of its own; no test leaves an error in the console."""
    contexts, problems = [], []

    def open_page(path: str = "/", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(server.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser itself reports responses with a bad status, and lost connections.
    assert [text for text in problems if not text.startswith("Failed to load resource")] == []


def send(page: Page, text: str) -> None:
    composer(page).fill(text)
    composer(page).press("Enter")


def composer(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant")


def finished(page: Page, n: int = 1) -> Locator:
    """Waits for the nth answer to be complete."""
    answer = answers(page).nth(n - 1)
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer


def ask(page: Page, text: str, n: int = 1) -> Locator:
    """Sends a message, and waits for the nth answer."""
    send(page, text)
    return finished(page, n)


def spoken(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"]]


# ---------------------------------------------------------------------------------- an answer


def test_an_answer_is_displayed_while_it_streams(open_page: Open, server: ScriptedServer) -> None:
    server.scripts.append(Script(pieces=("Some", " words", " of it"), hangs=True))
    page = open_page()
    send(page, "Hello?")
    expect(answers(page)).to_contain_text("Some words of it")
    expect(answers(page)).to_have_attribute("aria-busy", "true")
    expect(page.get_by_label("Stop the answer")).to_be_visible()
    (body,) = server.asked
    assert body["model"] == MODEL
    assert spoken(body) == ["Hello?"]
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_stop_ends_the_answer_at_the_server_and_keeps_what_arrived(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    for n, stop in enumerate(("the button", "Escape"), start=1):
        server.scripts.append(Script(pieces=(f"Part {n}",), hangs=True))
        send(page, "Go on without end")
        expect(answers(page).nth(n - 1)).to_contain_text(f"Part {n}")
        if stop == "Escape":
            page.keyboard.press("Escape")
        else:
            page.get_by_label("Stop the answer").click()
        expect(finished(page, n)).to_contain_text(f"Part {n}")
        expect(answers(page).nth(n - 1)).to_contain_text("Stopped.")
        server.wait_until_left(n)


def test_an_answer_is_continued_where_it_was_stopped(
    open_page: Open, server: ScriptedServer
) -> None:
    server.scripts.append(Script(pieces=("One, ", "two, "), finish="length"))
    page = open_page()
    answer = ask(page, "Count")
    expect(answer).to_contain_text("reached its limit of tokens")
    server.scripts.append(Script(pieces=("three.",)))
    answer.get_by_role("button", name="Continue", exact=True).click()
    expect(answer).to_contain_text("One, two, three.")
    expect(answer.locator(".notice")).to_be_hidden()
    expect(answer.locator(".stats")).to_contain_text("3 tokens")
    first, second = server.asked
    assert second["messages"] == [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "One, two, "},
    ]
    assert second["continue_final_message"] is True
    assert second["add_generation_prompt"] is False
    assert second["seed"] == first["seed"]


def test_regenerating_replaces_the_answer_with_a_new_seed(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    server.scripts += [Script(pieces=("first",)), Script(pieces=("second",))]
    ask(page, "Say something").get_by_label("Regenerate the answer").click()
    expect(answers(page)).to_contain_text("second")
    expect(answers(page)).to_have_count(1)
    before, after = server.asked
    assert spoken(before) == spoken(after) == ["Say something"]
    assert before["seed"] != after["seed"]


def test_a_locked_seed_is_sent_again_and_the_answers_are_compared(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    page.get_by_label("Settings", exact=True).click()
    page.get_by_label("Seed", exact=True).fill("42")
    page.get_by_label("Seed", exact=True).press("Tab")
    expect(page.get_by_label("Keep this seed")).to_have_attribute("aria-pressed", "true")
    server.scripts += [Script(), Script(), Script(pieces=("Another",))]
    ask(page, "Hello").get_by_label("Regenerate the answer").click()
    expect(answers(page)).to_contain_text("same answer")
    answers(page).get_by_label("Regenerate the answer").click()
    expect(answers(page)).to_contain_text("different answer")
    assert [body["seed"] for body in server.asked] == [42, 42, 42]


def test_the_seed_of_an_answer_can_be_kept(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    answer = ask(page, "Hello")
    drawn = server.asked[0]["seed"]
    answer.get_by_role("button", name=f"seed {drawn}").click()
    ask(page, "Again", 2)
    assert server.asked[1]["seed"] == drawn
    page.get_by_label("Draw a new seed").click()
    ask(page, "And again", 3)
    assert server.asked[2]["seed"] != drawn


def test_an_edited_message_is_sent_again_without_what_followed(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    ask(page, "First question")
    ask(page, "Second question", 2)
    question = page.locator(".message.user").first
    question.hover()
    question.get_by_label("Edit the message").click()
    field = page.get_by_label("Edit the message", exact=True)
    expect(field).to_be_focused()
    field.fill("Better question")
    field.press("Enter")
    expect(answers(page)).to_have_count(1)
    finished(page)
    assert spoken(server.asked[-1]) == ["Better question"]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".message")).to_have_count(4)
    expect(page.locator(".message.user").first).to_contain_text("First question")


def test_escape_leaves_a_message_as_it_was(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    ask(page, "A question")
    question = page.locator(".message.user")
    question.get_by_label("Edit the message").click()
    page.get_by_label("Edit the message", exact=True).fill("Nothing")
    page.keyboard.press("Escape")
    expect(question).to_contain_text("A question")
    assert len(server.asked) == 1


def test_an_edited_answer_is_what_the_model_continues(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    answer = ask(page, "Greet me")
    answer.get_by_label("Edit the answer").click()
    page.get_by_role("textbox", name="Edit the answer").fill("Dear reader,")
    page.get_by_role("button", name="Save").click()
    expect(answers(page)).to_contain_text("Edited.")
    server.scripts.append(Script(pieces=(" good morning.",)))
    answers(page).get_by_role("button", name="Continue", exact=True).click()
    expect(answers(page)).to_contain_text("Dear reader, good morning.")
    assert spoken(server.asked[-1]) == ["Greet me", "Dear reader,"]


def test_a_deleted_message_comes_back_by_undo(open_page: Open) -> None:
    page = open_page()
    ask(page, "Question").get_by_label("Delete the answer").click()
    expect(page.locator(".message")).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_contain_text("Hello there.")


def test_the_copy_button_copies_the_markdown_source_of_the_answer(
    open_page: Open, server: ScriptedServer
) -> None:
    source = "Some **bold** text\n\n```python\nprint(1)\n```"
    server.scripts.append(Script(pieces=(source,)))
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    answer = ask(page, "Write code")
    answer.get_by_label("Copy the answer").click()
    expect(answer.get_by_label("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == source
    answer.get_by_label("Copy the code").click()
    expect(answer.get_by_label("Copied")).to_have_count(2)
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)"


# ---------------------------------------------------------------------------------- hotloop's own


def test_speed_drafts_and_cached_tokens_are_told(open_page: Open, server: ScriptedServer) -> None:
    server.scripts.append(
        Script(
            pieces=("An **ans", "wer** in", " `co", "de`."),
            drafted=frozenset({1, 2}),
            cached_tokens=3,
            delay_s=0.1,
        )
    )
    page = open_page()
    answer = ask(page, "Hello")
    stats = answer.locator(".stats")
    expect(stats).to_contain_text(re.compile(r"decode [\d.,]+ tok/s"))
    expect(stats).to_contain_text(re.compile(r"TTFT [\d.]+ m?s"))
    expect(stats).to_contain_text("4 tokens")
    expect(stats).to_contain_text("50 % drafted")
    expect(stats).to_contain_text("3/5 cached")
    assert server.asked[0]["hotloop"] == {"details": True}
    # Drafted text is marked where it is displayed, inside and outside of markup.
    marked = answer.locator(".prose .drafted")
    assert marked.all_text_contents() == ["wer", " in ", "co"]
    expect(answer.locator(".prose").last).to_have_text("An answer in code.")
    shaded = "node => getComputedStyle(node).backgroundColor"
    transparent = "rgba(0, 0, 0, 0)"
    assert marked.first.evaluate(shaded) != transparent
    page.get_by_label("Settings", exact=True).click()
    page.get_by_label("Shade text that was drafted").uncheck()
    assert marked.first.evaluate(shaded) == transparent


def test_the_context_in_use_is_metered(open_page: Open) -> None:
    page = open_page()
    expect(page.get_by_role("meter")).to_be_hidden()
    ask(page, "Hello")
    meter = page.get_by_role("meter", name="Context in use")
    expect(meter).to_have_attribute("aria-valuenow", "8")  # five of the prompt, three new ones
    expect(meter).to_have_attribute("aria-valuemax", str(CONTEXT))


def test_reasoning_is_folded_once_the_answer_begins(
    open_page: Open, server: ScriptedServer
) -> None:
    server.scripts.append(Script(thoughts=("Let me ", "think."), pieces=(), hangs=True))
    page = open_page()
    send(page, "Why?")
    thought = page.locator("details.thought")
    expect(thought).to_have_attribute("open", "")
    expect(thought).to_contain_text("Let me think.")
    page.keyboard.press("Escape")
    server.scripts.append(Script(thoughts=("Let me ", "think."), pieces=("Because.",)))
    finished(page).get_by_label("Regenerate").click()
    expect(answers(page)).to_contain_text("Because.")
    expect(thought).not_to_have_attribute("open", "")
    thought.locator("summary").click()
    expect(thought.locator(".prose")).to_be_visible()


def test_options_and_the_system_message_are_sent(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    ask(page, "Without options")
    assert {"temperature", "top_p", "max_tokens"}.isdisjoint(server.asked[0])
    page.get_by_label("Settings", exact=True).click()
    for label, value in {
        "System message": "Be brief.",
        "Temperature": "0.7",
        "Top-p": "0.9",
        "Maximum tokens": "64",
    }.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Close the settings").click()
    ask(page, "With options", 2)
    body = server.asked[1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 64)


# ---------------------------------------------------------------------------------- faults


def test_a_401_asks_for_a_key_that_stays_in_the_tab(
    open_page: Open, server: ScriptedServer
) -> None:
    server.key = "secret"
    page = open_page()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("did not accept this key")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("heading", name=MODEL)).to_be_visible()
    expect(ask(page, "Hello")).to_contain_text("Hello there.")
    assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_question_refused_with_401_is_answered_once_there_is_a_key(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    expect(page.get_by_role("heading", name=MODEL)).to_be_visible()
    server.key = "secret"
    send(page, "Hello")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("Hello there.")
    assert len(server.asked) == 1


def test_a_restart_in_mid_answer_loses_nothing(open_page: Open, server: ScriptedServer) -> None:
    server.scripts.append(Script(pieces=("Half of", " the answer"), hangs=True))
    page = open_page()
    send(page, "Tell me")
    expect(answers(page)).to_contain_text("Half of the answer")
    server.stop()
    answer = finished(page)
    expect(answer.get_by_role("alert")).to_contain_text("The connection was lost in mid-answer.")
    expect(answer).to_contain_text("Half of the answer")
    answer.get_by_role("button", name="Continue", exact=True).click()
    expect(answer.get_by_role("alert")).to_contain_text("The server cannot be reached")
    expect(page.get_by_role("status").first).to_contain_text("cannot be reached")
    server.start()
    expect(page.get_by_role("status").first).to_be_empty()
    server.scripts.append(Script(pieces=(", and the rest.",)))
    answer.get_by_role("button", name="Continue", exact=True).click()
    expect(answer).to_contain_text("Half of the answer, and the rest.")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Script(status=429, headers={"Retry-After": "7"}), "Try again in 7 s."),
        (Script(status=503, error="The model is being loaded."), "The model is being loaded."),
        (
            Script(status=400, error="This model's maximum context length is 2048 tokens."),
            "maximum context length is 2048 tokens",
        ),
        (Script(pieces=(), drops=True), "The connection was lost"),
    ],
    ids=["busy", "loading", "too long", "dropped"],
)
def test_a_refusal_says_why_and_can_be_tried_again(
    open_page: Open, server: ScriptedServer, script: Script, said: str
) -> None:
    server.scripts.append(script)
    page = open_page()
    answer = ask(page, "Hello")
    expect(answer.get_by_role("alert")).to_contain_text(said)
    answer.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_contain_text("Hello there.")
    expect(answers(page).get_by_role("alert")).to_have_count(0)


def test_an_error_in_mid_stream_keeps_what_had_arrived(
    open_page: Open, server: ScriptedServer
) -> None:
    server.scripts.append(Script(pieces=("So far",), error="The engine has failed."))
    page = open_page()
    answer = ask(page, "Hello")
    expect(answer).to_contain_text("So far")
    expect(answer.get_by_role("alert")).to_contain_text("The engine has failed.")
    expect(answer.get_by_role("button", name="Continue", exact=True)).to_be_visible()


# ---------------------------------------------------------------------------------- chats


def test_chats_survive_a_reload(open_page: Open, server: ScriptedServer) -> None:
    server.scripts.append(Script(pieces=("**Kept** answer",), drafted=frozenset({0})))
    page = open_page()
    ask(page, "A question to keep")
    page.reload()
    expect(answers(page).locator("strong")).to_have_text("Kept")
    expect(answers(page).locator(".stats")).to_contain_text("drafted")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="A question to keep", exact=True).click()
    expect(answers(page)).to_contain_text("Kept answer")


def test_a_message_sent_before_the_chats_are_read_is_not_lost(browser: Browser) -> None:
    slow = """{
      const open = IDBFactory.prototype.open;
      IDBFactory.prototype.open = function (...names) {
        const real = open.apply(this, names);
        return {
          get result() { return real.result; },
          set onupgradeneeded(call) { real.onupgradeneeded = call; },
          set onsuccess(call) { real.onsuccess = () => setTimeout(call, 500); },
        };
      };
    }"""
    with ScriptedServer() as server:
        page = browser.new_page()
        page.add_init_script(slow)
        page.goto(server.url)
        send(page, "Early")
        finished(page)
        page.reload()
        expect(answers(page)).to_contain_text("Hello there.")
        page.close()


def test_an_answer_goes_on_while_another_chat_is_displayed(
    open_page: Open, server: ScriptedServer
) -> None:
    page = open_page()
    server.scripts.append(Script(pieces=tuple("abcdefgh"), delay_s=0.1))
    send(page, "Long answer")
    page.get_by_role("button", name="New chat").click()
    expect(ask(page, "Short answer")).to_contain_text("Hello there.")
    page.get_by_role("button", name="Long answer", exact=True).click()
    expect(finished(page)).to_contain_text("abcdefgh")
    assert server.n_left == 0


def test_a_page_closed_in_mid_answer_keeps_what_arrived(
    open_page: Open, server: ScriptedServer
) -> None:
    server.scripts.append(Script(pieces=("Up to here",), hangs=True))
    page = open_page()
    send(page, "Hello")
    expect(answers(page)).to_contain_text("Up to here")
    page.reload()
    expect(answers(page)).to_contain_text("Up to here")
    expect(answers(page)).to_contain_text("What had arrived is kept.")


def test_a_chat_is_renamed_and_deleted_with_undo(open_page: Open) -> None:
    page = open_page()
    ask(page, "Old name")
    listed = page.get_by_label("Chats").get_by_role("listitem")
    listed.hover()
    listed.get_by_label("Rename").click()
    page.get_by_label("Name of the chat").fill("New name")
    page.keyboard.press("Enter")
    expect(listed).to_contain_text("New name")
    listed.hover()
    listed.get_by_label("Delete").click()
    expect(listed).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(listed).to_contain_text("New name")
    page.reload()
    expect(listed).to_contain_text("New name")


def test_a_chat_deleted_in_mid_answer_stays_deleted(
    open_page: Open, server: ScriptedServer
) -> None:
    server.scripts.append(Script(pieces=("Some text",), hangs=True))
    page = open_page()
    send(page, "Unwanted")
    expect(answers(page)).to_contain_text("Some text")
    listed = page.get_by_label("Chats").get_by_role("listitem")
    listed.hover()
    listed.get_by_label("Delete").click()
    server.wait_until_left(1)
    page.reload()
    expect(page.get_by_role("heading", name=MODEL)).to_be_visible()
    expect(listed).to_have_count(0)


def test_exported_chats_are_imported_elsewhere(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    ask(page, "Take me along")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    exported = tmp_path / "chats.json"
    download.value.save_as(exported)
    other = open_page()
    other.locator("#import-file").set_input_files(exported)
    expect(other.get_by_text("Imported 1 chat.")).to_be_visible()
    other.get_by_role("button", name="Take me along", exact=True).click()
    expect(answers(other)).to_contain_text("Hello there.")
    other.locator("#import-file").set_input_files(exported)
    expect(other.get_by_text("1 were here already")).to_be_visible()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "The file is not JSON."),
        ("[]", "not an export of chats"),
        ('{"format": "hotloop-chats", "version": 9, "chats": []}', "has version 9"),
        ('{"format": "hotloop-chats", "version": 1, "chats": [{"messages": [{}]}]}', "Message 1"),
    ],
)
def test_a_file_that_is_no_export_is_refused(
    open_page: Open, tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    page = open_page()
    page.locator("#import-file").set_input_files(file)
    expect(page.get_by_text(said)).to_be_visible()


# ---------------------------------------------------------------------------------- looks


def test_dark_and_light_follow_the_system_and_the_button(open_page: Open) -> None:
    def brightness(page: Page) -> float:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    assert brightness(open_page(color_scheme="light")) > 200
    page = open_page(color_scheme="dark")
    assert brightness(page) < 50
    theme = page.get_by_label("Theme")
    theme.click()
    expect(theme).to_have_attribute("aria-label", "Theme: light")
    assert brightness(page) > 200
    page.reload()
    assert brightness(page) > 200


def test_400_pixels_are_wide_enough(open_page: Open, server: ScriptedServer) -> None:
    wide = (
        "word " * 80 + "\n\n```\n" + "x" * 300 + "\n```\n\n" + "|a" * 30 + "|\n" + "|-" * 30 + "|"
    )
    server.scripts.append(Script(pieces=(wide + "\n\n" + "y" * 300,)))
    page = open_page(viewport={"width": 400, "height": 800})
    ask(page, "Write something wide " + "z" * 300)
    for selector in ("html", "#scroller"):
        overflow = "node => node.scrollWidth - node.clientWidth"
        assert page.locator(selector).evaluate(overflow) <= 0
    for button in ("List of chats", "Theme", "Settings", "Send"):
        expect(page.get_by_label(re.compile(f"^{button}")).first).to_be_in_viewport(ratio=1)
    sidebar = page.get_by_label("Chats", exact=True)
    expect(sidebar).to_be_hidden()
    page.get_by_label("List of chats", exact=True).click()
    expect(sidebar).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="New chat").click()
    expect(sidebar).to_be_hidden()
    expect(page.locator(".message")).to_have_count(0)


def test_the_keyboard_is_enough(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    expect(composer(page)).to_be_focused()
    page.keyboard.type("First line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    assert server.asked == []
    page.keyboard.press("Enter")
    finished(page)
    assert spoken(server.asked[0]) == ["First line\nsecond line"]
    expect(composer(page)).to_be_focused()
    expect(composer(page)).to_have_value("")
    unnamed = [
        button.evaluate("node => node.outerHTML")
        for button in page.locator("button").all()
        if not (button.get_attribute("aria-label") or button.text_content())
    ]
    assert unnamed == []


def test_a_reader_who_scrolled_up_is_left_there(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    server.scripts.append(Script(pieces=tuple(f"Line {i}\n\n" for i in range(100))))
    ask(page, "Many lines")
    scroller = page.locator("#scroller")
    at_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight < 60"
    assert scroller.evaluate(at_end)
    server.scripts.append(Script(pieces=tuple(f"Line {i}\n\n" for i in range(100)), hangs=True))
    send(page, "More")
    expect(answers(page).nth(1)).to_contain_text("Line 99")
    assert scroller.evaluate(at_end)
    scroller.evaluate("node => { node.scrollTop = 0 }")
    expect(page.get_by_label("Go to the newest text")).to_be_visible()
    page.keyboard.press("Escape")
    finished(page, 2)
    assert scroller.evaluate("node => node.scrollTop") == 0
    page.get_by_label("Go to the newest text").click()
    assert scroller.evaluate(at_end)


# ---------------------------------------------------------------------------------- Markdown

HOSTILE = """<script>document.title = "taken"</script> <img src=x onerror="alert(1)">
[click](javascript:alert(1)) [data](data:text/html,x) ![image](https://example.com/x.png)
[a "quoted" link](https://example.com/?a=1&b=<b>)

| <b>cell</b> |
|---|
| `</code><script>` |

```html" onmouseover="alert(1)
<script>alert(1)</script>
```
"""


def test_hostile_text_is_text(open_page: Open, server: ScriptedServer) -> None:
    server.scripts.append(Script(pieces=tuple(HOSTILE)))
    page = open_page()
    answer = ask(page, "<b>bold</b> & <script>")
    expect(page.locator(".message.user .bubble")).to_have_text("<b>bold</b> & <script>")
    prose = answer.locator(".prose").last
    assert prose.locator("script, img, b, iframe, [onmouseover]").count() == 0
    assert "taken" not in page.title()
    urls = prose.locator("a").evaluate_all("nodes => nodes.map(node => node.href)")
    assert urls == ["https://example.com/x.png", "https://example.com/?a=1&b="]
    assert "[click](javascript:alert(1))" in prose.inner_text()


MARKDOWN = {
    "**bold** and *italic* and ***both*** and ~~gone~~": (
        "<p><strong>bold</strong> and <em>italic</em> and <em><strong>both</strong></em> and "
        "<del>gone</del></p>"
    ),
    "snake_case_name and 2 * 3 * 4 and **open": "<p>snake_case_name and 2 * 3 * 4 and **open</p>",
    "**bold *and italic***": "<p><strong>bold <em>and italic</em></strong></p>",
    "`a *b*` and ``c ` d``": "<p><code>a *b*</code> and <code>c ` d</code></p>",
    r"\*not italic\* \q": r"<p>*not italic* \q</p>",
    "two\nlines": "<p>two<br>lines</p>",
    "# One #\n### Three": "<h3>One</h3><h5>Three</h5>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "- a\n- b\n  - c\n    - d\n- e": (
        "<ul><li>a</li><li><p>b</p><ul><li><p>c</p><ul><li>d</li></ul></li></ul></li><li>e</li></ul>"
    ),
    "3. x\n4. y": '<ol start="3"><li>x</li><li>y</li></ol>',
    "1. a\n\n2. b": "<ol><li>a</li><li>b</li></ol>",
    "1. a\n   ```\n   code\n   ```\n2. b": "<ol><li><p>a</p>CODE(code)</li><li>b</li></ol>",
    "> quoted *text*\n> more": "<blockquote><p>quoted <em>text</em><br>more</p></blockquote>",
    "~~~ py\nx = 1\n\ny = 2\n~~~\nafter": "CODE(x = 1\n\ny = 2)<p>after</p>",
    "```\nnot closed": "CODE(not closed)",
    "born in\n1986. A year": "<p>born in<br>1986. A year</p>",
    "|a|b|\n|-|:-:|\n|1|`x|y`|": (
        'TABLE(<thead><tr><th scope="col">a</th><th class="center" scope="col">b</th></tr></thead>'
        '<tbody><tr><td>1</td><td class="center"><code>x|y</code></td></tr></tbody>)'
    ),
    "[name](https://example.com/a_b_(c)) end": "<p>LINK(https://example.com/a_b_(c),name) end</p>",
    "(see https://example.com/x_y.)": "<p>(see LINK(https://example.com/x_y,https://example.com/x_y).)</p>",
    "[no](ftp://example.com)": "<p>[no](ftp://example.com)</p>",
}

GROWING = {
    "so **bol": "<p>so <strong>bol</strong></p>",
    "so **bold `co": "<p>so <strong>bold <code>co</code></strong></p>",
    "so **bold*": "<p>so <strong>bold*</strong></p>",
    "- a **b\n- c `d": "<ul><li>a **b</li><li>c <code>d</code></li></ul>",
    "**a\n\nb **": "<p>**a</p><p>b **</p>",
    "2**3 and `": "<p>2**3 and `</p>",
}

RENDER = """async ([source, grows]) => {
  const { renderMarkdown } = await import("/modules/markdown.js");
  const node = document.createElement("div");
  renderMarkdown(node, source, [], grows);
  for (const code of node.querySelectorAll(".code"))
    code.replaceWith(`CODE(${code.querySelector("pre").textContent})`);
  for (const table of node.querySelectorAll(".table"))
    table.replaceWith("TABLE(", ...table.querySelector("table").childNodes, ")");
  for (const link of node.querySelectorAll("a"))
    link.replaceWith(`LINK(${link.href},${link.textContent})`);
  return node.innerHTML;
}"""


def test_markdown_is_rendered(open_page: Open) -> None:
    page = open_page("/blank")
    assert {source: page.evaluate(RENDER, [source, False]) for source in MARKDOWN} == MARKDOWN


def test_markup_that_is_not_closed_yet_is_displayed_as_if_it_were(open_page: Open) -> None:
    page = open_page("/blank")
    assert {source: page.evaluate(RENDER, [source, True]) for source in GROWING} == GROWING


GROWN = """async (source) => {
  const { renderMarkdown } = await import("/modules/markdown.js");
  const marks = [];
  for (let i = 0; i < source.length; i += 7) marks.push([i, i + 3]);
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  for (let n = 1; n <= source.length; n++) {
    const seen = marks.filter(([start]) => start < n).map(([a, b]) => [a, Math.min(b, n)]);
    renderMarkdown(grown, source.slice(0, n), seen, true);
  }
  renderMarkdown(grown, source, marks, false);
  renderMarkdown(whole, source, marks);
  const drafted = [...whole.querySelectorAll(".drafted")].map((node) => node.textContent).join("");
  return [grown.innerHTML, whole.innerHTML, drafted];
}"""


def test_text_that_grew_is_rendered_as_if_it_came_at_once(open_page: Open) -> None:
    page = open_page("/blank")
    for source in ["\n\n".join(MARKDOWN), HOSTILE]:
        grown, whole, drafted = page.evaluate(GROWN, source)
        assert grown == whole
        marked = iter("".join(source[i : i + 3] for i in range(0, len(source), 7)))
        assert all(c in marked for c in drafted)  # a subsequence: markup is not displayed


def test_markdown_of_any_kind_is_rendered_in_time(open_page: Open) -> None:
    page = open_page("/blank")
    for piece in ["*", "**a", "_", "`", "[", "[a](", "> ", "- ", "|", "~~x", "\\", "#", "1. ", " "]:
        assert isinstance(page.evaluate(RENDER, [piece * 3000, True]), str)
        assert isinstance(page.evaluate(RENDER, [f"{piece}\n" * 1000, False]), str)


PARSE = """async (pieces) => {
  const { EventParser } = await import("/modules/sse.js");
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(piece));
}"""


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_are_parsed_however_they_are_cut(open_page: Open, size: int) -> None:
    stream = (
        ": comment\n\ndata: one\n\ndata:two\r\n\r\nevent: x\rdata: three\rdata:  four\r\r"
        "data\n\nid: 7\ndata: [DONE]\n\ndata: not ended\n"
    )
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    parsed = open_page("/blank").evaluate(PARSE, pieces)
    assert parsed == ["one", "two", "three\n four", "", "[DONE]"]


def test_characters_divided_between_packets_arrive_whole(open_page: Open) -> None:
    page = open_page("/blank")
    read = """async (bytes) => {
      const { readEvents } = await import("/modules/sse.js");
      const stream = new ReadableStream({
        start(controller) {
          for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
          controller.close();
        },
      });
      const events = [];
      for await (const event of readEvents(stream)) events.push(event);
      return events;
    }"""
    text = "\u00e4\u4e16\U0001f680"
    assert page.evaluate(read, list(f"data: {text}\n\n".encode())) == [text]
