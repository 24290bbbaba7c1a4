"""The page on classifiers tells the truth: its session runs, and what it shows is what comes."""

import json
from pathlib import Path

from service.tasks.classify import EXAMPLES_PER_LABEL, MAX_EXAMPLES, MAX_LABELS
from tests.test_knowledge_page import ROOT, session


def test_the_session_gives_what_it_shows(tmp_path: Path) -> None:
    came = session("classifiers.md", "sentiment-en", tmp_path)
    listed, shown, deleted = map(json.loads, came[-1].splitlines())
    assert listed["classifiers"] == [{name: shown[name] for name in listed["classifiers"][0]}]
    assert (len(shown["examples"]), deleted) == (12, {"deleted": "tickets"})


def test_the_limits_are_those_of_the_service() -> None:
    page = " ".join((ROOT / "docs" / "classifiers.md").read_text(encoding="utf-8").split())
    limits = (
        f"needs {EXAMPLES_PER_LABEL} examples or more; there may be {MAX_EXAMPLES} examples and {MAX_LABELS} labels"
    )
    assert limits in page
