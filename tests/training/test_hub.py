"""Data sets of the Hub, from a server of our own that speaks as the Hub does."""

import hashlib
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest

from training.data import read_set
from training.errors import TrainingError
from training.recipe import SetRecipe


def parquet(*texts):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"review": text} for text in texts]), buffer)
    return buffer.getvalue()


FILES = {
    "us/one": {
        "default/train/0000.parquet": parquet("first"),
        "default/train/0001.parquet": parquet("second"),
        "default/test/0000.parquet": parquet("third"),
    },
    "us/two": {"de/train/0000.parquet": parquet("eins"), "en/train/0000.parquet": parquet("one")},
}


class Hub(BaseHTTPRequestHandler):
    """Lists and serves ``FILES`` under the revision of converted sets."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        for name, files in FILES.items():
            tree, base = (
                f"/api/datasets/{name}/tree/refs/convert/parquet",
                f"/datasets/{name}/resolve/refs/convert/parquet/",
            )
            path = unquote(self.path).partition("?")[0].rstrip("/")
            if path == tree:
                listed = [
                    {"type": "file", "path": path, "size": len(body), "oid": "0"} for path, body in files.items()
                ]
                return self.answer(json.dumps(listed).encode(), "application/json")
            if path.startswith(base) and path.removeprefix(base) in files:
                return self.answer(files[path.removeprefix(base)], "application/octet-stream")
        self.send_error(404)
        return None

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's client, pointed at our server and a cache of its own."""
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield
        server.shutdown()


def texts(path, split="train", **more):
    part = SetRecipe(path=path, split=split, columns={"text": "review"}, **more)
    return [row["text"] for row in read_set(None, part, (("text",),))]


def test_a_set_of_the_hub_is_its_parquet_files(hub):
    assert texts("hub:us/one") == ["first", "second"]
    assert texts("hub:us/one", "test") == ["third"]
    assert texts("hub:us/two/en") == ["one"]


def test_what_the_hub_does_not_have_is_said(hub):
    with pytest.raises(TrainingError, match=r"hub:us/two: name one of its configurations, de, en: hub:us/two/CONF"):
        texts("hub:us/two")
    with pytest.raises(TrainingError, match=r"hub:us/one: no split 'validation'; it has test, train"):
        texts("hub:us/one", "validation")
    with pytest.raises(TrainingError, match=r"hub:us/none: cannot be had from the Hub: .*404"):
        texts("hub:us/none")


def test_without_a_network_the_way_round_is_said(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        TrainingError, match=r"cannot be had from the Hub: .*put the set's Parquet files into the data"
    ):
        texts("hub:us/one")
