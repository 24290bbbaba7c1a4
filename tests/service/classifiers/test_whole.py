"""The real engine and account: a classifier is made and asked on a tiny model, and every joule is on a bill or not."""

import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.tiny import SENTENCES, write_tiny

EXAMPLES = [
    {"text": text, "label": "energy" if "joules" in text or "Energy" in text else "other"} for text in SENTENCES
]


def settled(client: TestClient, response: Any) -> dict[str, Any]:
    """The final bill of a request."""
    assert response.status_code == 200, response.text
    end = time.monotonic() + 10
    while True:
        bill: dict[str, Any] = client.get(f"/v1/energy/requests/{response.json()['id']}").json()
        if bill["energy"]["settled"] or time.monotonic() > end:
            return bill
        time.sleep(0.01)


def test_making_and_asking_are_billed_and_the_books_balance(tmp_path: Path) -> None:
    write_tiny(tmp_path / "models" / "reads", "classify", name="reads")
    settings = Settings(models=(tmp_path / "models",), state=tmp_path / "state", meter="estimate")
    with TestClient(create_app(settings)) as client:
        answers = [
            client.post(path, json=body)
            for path, body in (
                ("/v1/classifiers", {"name": "mine", "examples": EXAMPLES}),
                ("/v1/classify", {"classifier": "mine", "input": list(SENTENCES)}),
            )
        ]
        bills = [settled(client, answer) for answer in answers]
        assert all(bill["energy"]["settled"] and bill["energy"]["active_j"] > 0 for bill in bills)
        totals = client.app.state.service.account.totals()
        by_task = {share.task for share in totals.attributed}
        assert by_task == {"make_classifier", "classify"}
        for meter in totals.meters:
            spent = [share.energy_uj for share in totals.attributed if share.device == meter.device]
            rest = [share.energy_uj for share in totals.unattributed if share.device == meter.device]
            assert (sum(spent) + sum(rest), meter.residual_uj) == (meter.settled_uj, 0)
    # Another process, which knows nothing but the folders.
    with TestClient(create_app(settings)) as client:
        assert client.get("/v1/classifiers/mine").json()["current"]
        results = client.post("/v1/classify", json={"classifier": "mine", "input": list(SENTENCES)}).json()["results"]
        assert results == answers[1].json()["results"]


@pytest.mark.parametrize("kind", ["span", "decoder"])
def test_a_model_without_vectors_is_refused(tmp_path: Path, kind: Any) -> None:
    write_tiny(tmp_path / "models" / "other", kind, name="other")
    settings = Settings(models=(tmp_path / "models",), state=tmp_path / "state", meter="none")
    with TestClient(create_app(settings)) as client:
        body = {"name": "mine", "examples": EXAMPLES}
        assert client.post("/v1/classifiers", json=body).json()["error"]["code"] == "model_not_found"
        response = client.post("/v1/classifiers", json={**body, "model": "other"})
        assert (response.status_code, response.json()["error"]["param"]) == (422, "model")
