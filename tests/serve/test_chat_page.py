"""The chat page as a response: one document, with a policy that allows nothing else."""

import base64
import hashlib
import re

import html5lib
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from hotloop.serve.page import FOLDER, MODULES, chat_page, page


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=[Route("/", chat_page)]))


def test_the_page_is_one_document_that_names_no_other(client: TestClient) -> None:
    text = client.get("/").text
    document = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    links = {
        value
        for node in document.iter()
        for name, value in node.attrib.items()
        if name in ("src", "href", "action", "srcset", "poster")
    }
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert re.findall(r"url\(|@import", text) == []
    assert re.findall(r"^(?:import|export)\b.*", text, re.MULTILINE) == []


def test_the_policy_allows_the_pages_own_script_and_style_only(client: TestClient) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy


def test_nothing_in_the_page_needs_what_the_policy_forbids() -> None:
    document = (FOLDER / "page.html").read_text("utf-8")
    assert re.findall(r"\s(?:on\w+|style)=", document) == []
    for name in MODULES:
        source = (FOLDER / f"{name}.js").read_text("utf-8")
        unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert re.findall(unsafe, source) == [], name


def test_each_module_is_joined_after_those_that_it_imports() -> None:
    assert sorted(MODULES) == sorted(path.stem for path in FOLDER.glob("*.js"))
    for place, name in enumerate(MODULES):
        source = (FOLDER / f"{name}.js").read_text("utf-8")
        imported = re.findall(r'^import \{[^}]*\} from "\./(\w+)\.js";$', source, re.MULTILINE)
        assert len(imported) == len(re.findall(r"^import\b", source, re.MULTILINE))
        assert set(imported) <= set(MODULES[:place]), name


def test_a_browser_that_has_the_page_is_not_sent_it_again(client: TestClient) -> None:
    again = client.get("/", headers={"If-None-Match": page().tag})
    assert again.status_code == 304
    assert again.content == b""
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200
    assert client.head("/").content == b""
