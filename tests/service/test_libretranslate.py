"""LibreTranslate's own client over a real socket, and what others send."""

from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from libretranslatepy import LibreTranslateAPI
from starlette.testclient import TestClient

from service.app import create_app
from service.languages import detect, name_of
from service.settings import Settings
from tests.service.fakes import FakeEngine, build, write_model

ENGLISH = "the dog runs along the beach and it rains"
GERMAN = "Der Hund läuft am Strand entlang und es regnet"


@pytest.fixture
def api(address: str) -> LibreTranslateAPI:
    return LibreTranslateAPI(address)


@pytest.fixture
def bilingual(tmp_path: Path) -> Any:
    """A client to a service that translates in both directions."""
    for source, target in (("en", "de"), ("de", "en")):
        write_model(tmp_path, f"{source}-{target}", "translate", languages=(source, target))
    with TestClient(create_app(Settings(models=(tmp_path,)), build)) as client:
        yield client


def test_the_client_translates(api: LibreTranslateAPI) -> None:
    assert api.translate("good dog", "en", "de") == "good dog"
    assert api.translate(ENGLISH, "auto", "de") == ENGLISH


def test_the_client_lists_and_detects(api: LibreTranslateAPI) -> None:
    assert api.languages() == [
        {"code": "en", "name": "English", "targets": ["de"]},
        {"code": "de", "name": "German", "targets": []},
    ]
    (english,) = api.detect(ENGLISH)
    (german,) = api.detect(GERMAN)
    assert (english["language"], german["language"]) == ("en", "de")
    assert 50 < english["confidence"] <= 100


@pytest.mark.parametrize(
    ("q", "source", "target", "status"),
    [("", "en", "de", 422), ("good", "en", "fr", 422), ("good", "fr", "de", 422), ("good " * 500, "en", "de", 422)],
)
def test_the_client_hears_of_errors(api: LibreTranslateAPI, q: str, source: str, target: str, status: int) -> None:
    with pytest.raises(HTTPError) as caught:
        api.translate(q, source, target)
    assert caught.value.code == status
    caught.value.close()


def test_a_detected_language_is_told_and_used(bilingual: TestClient) -> None:
    for text, source, target in ((ENGLISH, "en", "de"), (GERMAN, "de", "en")):
        body = {"q": text, "source": "auto", "target": target, "format": "text", "alternatives": 3, "api_key": "x"}
        answer = bilingual.post("/translate", json=body).json()
        assert answer["detectedLanguage"]["language"] == source
        assert answer["alternatives"] == []
        assert answer["energy"]["allocated_j"] == 2.0
    record = next(iter(bilingual.app.state.service.account.records.values()))  # type: ignore[attr-defined]
    assert record.request.model == "en-de"


def test_lists_are_translated_in_their_order(client: TestClient, engine: FakeEngine) -> None:
    body = {"q": ["good dog", "bad city"], "source": "en", "target": "de"}
    answer = client.post("/translate", json=body)
    assert answer.json()["translatedText"] == ["good dog", "bad city"]
    assert "detectedLanguage" not in answer.json() and "alternatives" not in answer.json()
    assert answer.headers["x-energy-joules"] == "2.000000"
    auto = client.post("/translate", json={**body, "source": "auto"}).json()
    assert [each["language"] for each in auto["detectedLanguage"]] == ["en", "en"]


def test_what_is_in_the_target_language_stays_as_it_is(client: TestClient, engine: FakeEngine) -> None:
    for q, source, said in (
        (GERMAN, "auto", GERMAN),
        ([GERMAN, ""], "auto", [GERMAN, ""]),
        ("good dog", "de", "good dog"),
    ):
        answer = client.post("/translate", json={"q": q, "source": source, "target": "de"}).json()
        assert (answer["translatedText"], answer["energy"]) == (said, None)
    assert not engine.items
    # A word is as much English as German.
    client.post("/translate", json={"q": "Ball", "source": "auto", "target": "de"})
    assert len(engine.items) == 1
    assert client.post("/translate", json={"q": "good", "source": "fr", "target": "fr"}).status_code == 422


def test_what_is_empty_in_a_list_stays_so(client: TestClient) -> None:
    answer = client.post(
        "/translate", json={"q": ["", "good dog", " ", "bad"], "source": "auto", "target": "de"}
    ).json()
    assert answer["translatedText"] == ["", "good dog", "", "bad"]
    assert len(answer["detectedLanguage"]) == 4


def test_a_form_in_parts_is_refused_by_name(client: TestClient) -> None:
    response = client.post("/translate", files={"q": "good"}, data={"source": "en", "target": "de"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")
    assert "application/x-www-form-urlencoded" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/translate", {"source": "en", "target": "de"}, "q"),
        ("/translate", {"q": "good", "target": "de"}, "source"),
        ("/translate", {"q": "good", "source": "en"}, "target"),
        ("/translate", {"q": "good", "source": "en", "target": "fr"}, "target"),
        ("/translate", {"q": [], "source": "en", "target": "de"}, "q"),
        ("/translate", {"q": ["good", 3], "source": "en", "target": "de"}, "q"),
        ("/translate", {"q": ["good"] * 33, "source": "en", "target": "de"}, "q"),
        ("/translate", {"q": "good " * 500, "source": "en", "target": "de"}, "q"),
        ("/translate", {"q": "<b>good</b>", "source": "en", "target": "de", "format": "html"}, "format"),
        ("/detect", {}, "q"),
        ("/detect", {"q": ""}, "q"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_what_is_wrong_is_named(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


@pytest.mark.parametrize("path", ["/translate", "/detect"])
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 422),
        (b"good", "text/plain", 400),
        (b"\xff=\xff", "application/x-www-form-urlencoded", 400),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_malformed_body_is_a_clear_error(
    client: TestClient, path: str, content: bytes, kind: str, status: int
) -> None:
    response = client.post(path, content=content, headers={"content-type": kind})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_user_interface_finds_its_settings(client: TestClient, tmp_path: Path) -> None:
    settings = client.get("/frontend/settings").json()
    assert settings["language"]["source"] == {"code": "en", "name": "English"}
    assert settings["language"]["target"] == {"code": "de", "name": "German"}
    write_model(tmp_path, "judge", "sentiment")
    with TestClient(create_app(Settings(models=(tmp_path,)), build)) as mute:
        assert mute.get("/frontend/settings").json()["language"] is None
        assert mute.get("/languages").json() == []
        assert (
            mute.post("/detect", json={"q": "Il pleut et le chien court le long de la plage"}).json()[0]["language"]
            == "fr"
        )
        assert mute.post("/translate", json={"q": "good", "source": "auto", "target": "de"}).status_code == 404


def test_languages_are_detected_among_those_asked_for() -> None:
    assert detect(GERMAN, {"en", "fr"}) != detect(GERMAN, {"en", "de"})
    assert detect(GERMAN, {"xx"}) is None
    unsure = detect("ok", {"en", "de"})
    assert unsure is not None and unsure.probability < 0.5


def test_a_code_without_a_name_is_its_own() -> None:
    assert [name_of(code) for code in ("fr", "deu", "qq-x")] == ["French", "German", "qq-x"]
