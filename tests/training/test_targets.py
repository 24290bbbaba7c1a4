"""A teacher writes what the student reads: by itself, after an interruption, from a folder, a run and an endpoint."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn

import wattle
from service.app import create_app
from service.settings import Settings as ServiceSettings
from tests.tiny import write_tiny
from tests.training import recipes
from tests.training.conftest import write_set
from training.commands import run_distil_data
from training.endpoint import TRIES, Endpoint, endpoint_teacher
from training.errors import TrainingError
from training.recipe import TeacherRecipe
from training.settings import Settings
from training.targets import Teacher, Written, served_teacher, write_targets
from training.train import train

SET = {"path": "by/teacher", "licence": "CC0", "where": "written by a teacher"}
INPUTS = [f"number {n}" for n in range(10)]


def student(task="translate", **teacher):
    teacher = {"from": "upper", "inputs": ["asked"], "parallel": 2, **teacher}
    return getattr(recipes, task)(data=[{**SET, "teacher": teacher}])


def upper(texts):
    return Written([text.upper() for text in texts], 0.5 * len(texts), "estimated")


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path, "asked", [{"source": text, "text": text, "document": text} for text in [*INPUTS, INPUTS[0]]])
    return tmp_path


def rows_of(folder):
    with gzip.open(folder / "by/teacher/train.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def write(recipe, folder, teacher=None, **more):
    return write_targets(teacher or Teacher("upper", "1", upper, texts=3), recipe, recipe.data[0], folder, **more)


def test_every_input_is_answered_once_and_what_it_cost_is_added_up(folder):
    found = write(student(setting={"beams": 4}), folder)
    assert sorted(row["source"] for row in rows_of(folder)) == INPUTS
    assert all(row["target"] == row["source"].upper() for row in rows_of(folder))
    said = json.loads((folder / "by/teacher/train.json").read_text())
    assert said == {
        "teacher": "upper",
        "revision": "1",
        "inputs": ["asked"],
        "setting": {"beams": 4},
        "rows": 10,
        "left_out": 0,
        "joules": 5.0,
        "quality": "estimated",
        "elapsed_s": found.elapsed_s,
    }
    assert sorted(path.name for path in (folder / "by/teacher").iterdir()) == ["train.json", "train.jsonl.gz"]


def test_what_is_there_is_left_alone_and_what_is_other_is_refused(folder):
    write(student(), folder)
    unasked = Teacher("upper", "1", lambda texts: pytest.fail("asked again"))
    assert write(student(), folder, unasked).rows == 10
    with pytest.raises(TrainingError, match=r"there already, and not .*'beams': 2"):
        write(student(setting={"beams": 2}), folder)


def test_an_interrupted_teacher_goes_on_and_keeps_its_bill(folder):
    asked = []

    def fails_late(texts):
        if len(asked) == 2:
            raise TrainingError("gone")
        asked.extend([texts])
        return upper(texts)

    with pytest.raises(TrainingError, match="gone"):
        write(student(parallel=1), folder, Teacher("upper", "1", fails_late, texts=3))
    partial = folder / "by/teacher/train.partial"
    with partial.open("a") as file:
        file.write('{"outputs": {"number')  # the process died while it wrote
    rest = []

    def remembers(texts):
        rest.extend(texts)
        return upper(texts)

    found = write(student(parallel=1), folder, Teacher("upper", "1", remembers, texts=3))
    assert sorted([*rest, *(text for texts in asked for text in texts)]) == INPUTS
    assert (found.rows, found.joules, partial.exists()) == (10, 5.0, False)


def test_a_set_begun_by_another_teacher_is_not_gone_on_with(folder):
    def fails(texts):
        raise TrainingError("gone")

    with pytest.raises(TrainingError, match="gone"):
        write(student(), folder, Teacher("upper", "1", fails))
    with pytest.raises(TrainingError, match=r"train\.partial: begun as .*'upper'.* delete it to begin anew"):
        write(student(), folder, Teacher("lower", "1", upper))


def test_a_limit_takes_a_sample_and_empty_or_cut_outputs_are_left_out(folder):
    cut = Teacher("cut", "1", lambda texts: Written([None, " ", *map(str.upper, texts[2:])], None, "unavailable"))
    found = write(student(), folder, cut, limit=6)
    assert (found.rows, found.left_out, found.joules, found.quality) == (4, 2, None, "unavailable")
    assert [row["source"] for row in rows_of(folder)] != INPUTS[2:6]


def test_answers_are_not_written(folder, trunk_package):
    with pytest.raises(TrainingError, match="a teacher writes targets for translate, summarize, sentiment, generate"):
        write(student("answer"), folder)


def test_a_folder_that_cannot_be_written_is_said(folder):
    (folder / "by").write_text("a file")
    with pytest.raises(TrainingError, match="cannot be written"):
        write(student(), folder)


def test_a_served_teacher_is_asked_as_any_user_asks():
    bodies = []

    def ask(path, body):
        bodies.append((path, body))
        results = [{"text": "a", "finish_reason": "stop"}, {"text": "b", "finish_reason": "length"}, {"label": "c"}]
        return {"results": results, "energy": {"active_j": 2.0, "quality": "measured"}}

    wanted = TeacherRecipe(source="t", inputs=("x",), setting={"beams": 4})
    teacher = served_teacher(ask, "translate", "t", "7", wanted)
    assert teacher.write(["1", "2", "3"]) == Written(["a", None, "c"], 2.0, "measured")
    assert bodies == [("translate", {"model": "t", "truncate": True, "beams": 4, "input": ["1", "2", "3"]})]


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_a_model_writes_what_its_student_then_learns(tmp_path, data, kind):
    teacher = str(tmp_path / "teacher")
    if kind == "folder":
        write_tiny(tmp_path / "teacher", "encoder-decoder")
    else:
        teacher = "tiny-translate"
        train(recipes.translate(), data, tmp_path / "runs")
    path = str(tmp_path / "written")
    part = {**SET, "path": path, "teacher": {"from": teacher, "inputs": ["translation/numbers"]}}
    recipe = recipes.translate(name="student", data=[part])
    settings = Settings(data=data, runs=tmp_path / "runs", limit=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.commands.load_recipe", lambda name: recipe)
        # What a server lets wait is no matter of a teacher's.
        patch.setenv("WATTLE_MAX_CONCURRENT_REQUESTS", "1")
        run_distil_data("student", wattle._asking, settings)
    said = json.loads((tmp_path / "written/train.json").read_text())
    assert said["teacher"] == ("tiny-encoder-decoder" if kind == "folder" else "tiny-translate")
    assert said["rows"] + said["left_out"] == 5
    assert said["joules"] > 0
    if said["rows"]:
        trained = train(recipe, data, tmp_path / "runs")
        assert trained.rows == {path: said["rows"]}
        (stage,) = trained.lineage
        assert (stage.kind, stage.teacher) == ("distil", Path(teacher).name)
        assert stage.teacher_joules == pytest.approx(said["joules"], abs=0.05)


class Fake(ThreadingHTTPServer):
    """An endpoint that answers from a list of ``(status, headers, body)`` and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, self.headers.get("authorization"), body))
        status, headers, answer = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def fake():
    servers = []

    def make(*answers):
        servers.append(Fake(answers))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def says(text, reason="stop"):
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def asks(server, **more):
    return TeacherRecipe(source="big", inputs=("x",), url=server.url, **more)


def test_an_endpoint_is_asked_with_the_prompt_and_the_key(fake):
    server = fake((200, {"x-energy-joules": "1.5", "x-energy-quality": "measured"}, says("Hallo")))
    wanted = asks(server, prompt="German: {input}!", setting={"temperature": 0.5})
    with endpoint_teacher(wanted, "secret") as teacher:
        assert teacher.write(["Hello {input}"]) == Written(["Hallo"], 1.5, "measured")
    body = {"temperature": 0.5, "model": "big", "messages": [{"role": "user", "content": "German: Hello {input}!"}]}
    assert server.asked == [("/v1/chat/completions", "Bearer secret", body)]


def test_an_endpoint_that_is_busy_is_waited_for_as_it_asks(fake):
    busy = [(429, {"retry-after": "7"}, {}), (503, {"retry-after-ms": "250"}, {}), (500, {"retry-after": "soon"}, {})]
    server, waits = fake(*busy, (200, {}, says("x", "length"))), []
    with Endpoint(asks(server), None, waits.append) as endpoint:
        assert endpoint.write(["a"]) == Written([None], None, "unavailable")
    assert waits == [7.0, 0.25, 4.0]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([(401, {}, {"error": {"message": "no such key"}})], "refuses: status 401: .*no such key"),
        ([(500, {}, {})] * TRIES, rf"still fails after {TRIES} tries \(status 500.* is kept: run it again"),
        ([(200, {}, {"hello": 1})], "answers no chat completion"),
    ],
)
def test_an_endpoint_that_refuses_or_never_recovers_is_said(fake, answers, said):
    waits = []
    with (
        Endpoint(asks(fake(*answers)), None, waits.append) as endpoint,
        pytest.raises(TrainingError, match=said),
    ):
        endpoint.write(["a"])
    assert len(waits) == len(answers) - 1


def test_an_endpoint_that_is_not_there_is_said():
    gone = TeacherRecipe(source="big", inputs=("x",), url="http://127.0.0.1:9/v1")
    with Endpoint(gone, None, lambda _: None) as endpoint, pytest.raises(TrainingError, match=r"tries \(ConnectError"):
        endpoint.write(["a"])


def test_our_own_server_is_such_an_endpoint(tmp_path, folder):
    write_tiny(tmp_path / "models" / "tiny", "encoder-decoder", name="tiny")
    app = create_app(ServiceSettings(models=str(tmp_path / "models"), state=tmp_path / "state", meter="estimate"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        recipe = student(**{"from": "tiny"}, url=f"http://127.0.0.1:{port}/v1")
        with endpoint_teacher(recipe.data[0].teacher, None) as teacher:
            found = write(recipe, folder, teacher)
    finally:
        server.should_exit = True
        thread.join()
    assert found.rows + found.left_out == 10
    assert found.joules > 0
    assert found.quality == "estimated"
