"""Classifiers outlive their process whole, are replaced whole, and are seen by others who serve the same folder."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from models.heads import Head
from service.classifiers.store import Classifier, Classifiers, LabelledText
from service.errors import ClassifierNotFound, ClassifierUnavailable

ROOT = Path(__file__).parents[3]


def classifier(name: str = "tickets", sharpness: float = 2.0, words: int = 1) -> Classifier:
    head = Head(np.array([[0.1, -0.1], [1 / 3, 2.0]]), np.array([0.5, 0.25]), sharpness)
    examples = [LabelledText("good " * words, "yes"), LabelledText("bad", "no")]
    return Classifier(name, "tiny", "1", "tiny:abc", ["no", "yes"], examples, head, 0.75, 1_700_000_000.5)


def test_what_is_read_is_what_was_put(tmp_path: Path) -> None:
    Classifiers(tmp_path / "new").put(classifier())
    found = Classifiers(tmp_path / "new").find("tickets")
    for name in ("name", "model", "revision", "fingerprint", "accuracy", "created_s"):
        assert getattr(found, name) == getattr(classifier(), name)
    assert (list(found.labels), list(found.examples)) == (["no", "yes"], list(classifier().examples))
    features = np.array([[0.5, 0.25]])
    np.testing.assert_array_equal(found.head.probabilities(features), classifier().head.probabilities(features))


def test_one_is_replaced_listed_and_deleted(tmp_path: Path) -> None:
    ours = Classifiers(tmp_path)
    assert ours.find_all() == []
    ours.put(classifier("b"))
    ours.put(classifier("a"))
    ours.put(classifier("b", sharpness=3.0))
    assert [(each.name, each.head.sharpness) for each in ours.find_all()] == [("a", 2.0), ("b", 3.0)]
    ours.delete("a")
    for name in ("a", "nobody", "../b", "B", "", "b.json/.."):
        with pytest.raises(ClassifierNotFound):
            ours.find(name)
        with pytest.raises(ClassifierNotFound):
            ours.delete(name)
    assert [each.name for each in ours.find_all()] == ["b"]


def test_what_another_process_has_changed_is_seen(tmp_path: Path) -> None:
    ours, theirs = Classifiers(tmp_path), Classifiers(tmp_path)
    ours.put(classifier())
    assert theirs.find("tickets").head.sharpness == 2.0
    ours.put(classifier(sharpness=3.0))
    assert theirs.find("tickets").head.sharpness == 3.0
    theirs.delete("tickets")
    with pytest.raises(ClassifierNotFound):
        ours.find("tickets")


def test_one_that_was_replaced_or_deleted_meanwhile_is_not_renewed(tmp_path: Path) -> None:
    ours = Classifiers(tmp_path)
    ours.put(classifier())
    old = ours.find("tickets")
    ours.renew(old, classifier(sharpness=3.0))
    assert ours.find("tickets").head.sharpness == 3.0
    ours.renew(old, classifier(sharpness=4.0))
    assert ours.find("tickets").head.sharpness == 3.0
    old = ours.find("tickets")
    ours.delete("tickets")
    ours.renew(old, classifier(sharpness=5.0))
    assert not list(tmp_path.iterdir())


def test_looking_for_one_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Classifiers(tmp_path)
    ours.put(classifier())
    syncs, found, synced = threading.Event(), threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        syncs.set()
        assert found.wait(10)
        synced(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    with ThreadPoolExecutor(1) as threads:
        putting = threads.submit(ours.put, classifier(sharpness=3.0))
        assert syncs.wait(10)
        assert ours.find("tickets").head.sharpness == 2.0
        found.set()
        putting.result()
    assert ours.find("tickets").head.sharpness == 3.0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 1}', b'{"format_version": 2}'])
def test_a_damaged_one_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    ours = Classifiers(tmp_path)
    ours.put(classifier("good"))
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ClassifierUnavailable, match="version 2" if b"2" in content else "damaged"):
        ours.find("bad")
    assert [each.name for each in ours.find_all()] == ["good"]
    assert "bad.json" in caplog.text
    ours.put(classifier("bad"))
    assert len(ours.find_all()) == 2


def test_a_folder_that_cannot_be_made_is_said_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClassifierUnavailable, match="cannot be used: ") as caught:
        Classifiers(tmp_path / "file" / "folder").put(classifier())
    assert str(tmp_path) not in str(caught.value)


def test_two_makers_of_one_name_leave_one_whole(tmp_path: Path) -> None:
    ours, both = Classifiers(tmp_path), threading.Barrier(2)

    def put(sharpness: float) -> None:
        both.wait()
        for _ in range(20):
            ours.put(classifier(sharpness=sharpness))

    threads = [threading.Thread(target=put, args=(sharpness,)) for sharpness in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Classifiers(tmp_path).find("tickets").head.sharpness in (1.0, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["tickets.json"]


KILLED = """
import sys
from pathlib import Path
from service.classifiers.store import Classifiers
from tests.service.classifiers.test_store import classifier

ours = Classifiers(Path(sys.argv[1]))
for round in range(1, 10**6):
    # Large, so that writing takes a while.
    ours.put(classifier(sharpness=float(round), words=200_000))
    print(round, flush=True)
"""


def test_a_killed_process_leaves_a_whole_classifier(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    (found,) = Classifiers(tmp_path).find_all()
    assert found.head.sharpness >= 3
    assert len(found.examples[0].text) == 1_000_000
