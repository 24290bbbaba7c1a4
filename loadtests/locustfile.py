"""What Locust runs: users of both loops, the shape of the load, and the events that keep the record.

Locust imports this file by its path: ``locust -f loadtests/locustfile.py --plan FILE``, which `wattle loadtest` calls.
"""

import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import FastHttpUser, LoadTestShape, events, task
from locust.env import Environment
from locust.runners import Runner

from loadtests.dialects import DIALECTS, StreamReader, read_reply
from loadtests.inputs import Inputs, Query
from loadtests.plan import read_plan
from loadtests.recorder import ProgressLine, Recorder, describe_failure
from loadtests.samples import Sample
from loadtests.target import BadTarget
from loadtests.webui import extend_web_ui

MANY = 100_000
"""Connections that one user of the open loop may hold: a slow server must not slow its own load."""
IDLE_S = 0.1
"""How often a user who has nothing more to do looks up."""
THINK_SIGMA = 0.8
"""Spread of the logarithm of thinking times."""


class Caller(FastHttpUser):
    """Asks, and records what it was told."""

    abstract = True
    insecure = False
    max_redirects = 0  # the load goes where it was sent, nowhere else
    recorder: Recorder
    inputs: Inputs

    def ask(self, query: Query, due_s: float) -> None:
        """One request, due at a time of the monotonic clock."""
        recorder, plan = self.recorder, self.recorder.plan
        dialect = DIALECTS[plan.dialect](plan.model)
        sample = Sample(due_s - recorder.began_s, query.task, len(query.texts), query.stream, 0.0)
        sample.error = "unfinished when the run ended"
        kind = "stream" if query.stream else "list" if sample.texts > 1 else "single"
        try:
            with self.client.post(
                plan.path or dialect.path(query),
                name=query.task,
                json=dialect.body(query),
                headers={"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {},
                stream=query.stream,
                catch_response=True,
            ) as response:
                sample.status = response.status_code or None
                sample.error = _read(response, query, sample, due_s)
                sample.latency_ms = (time.monotonic() - due_s) * 1000
                response.request_meta["response_time"] = sample.latency_ms
                response.request_meta["request_type"] = kind
                if sample.error:
                    response.failure(sample.error)
                else:
                    response.success()
        finally:
            sample.latency_ms = sample.latency_ms or (time.monotonic() - due_s) * 1000
            recorder.add(sample)


class Visitor(Caller):
    """A user of the closed loop: asks, waits for the answer, thinks."""

    @task
    def visit(self) -> None:
        """One request."""
        if self.recorder.loading:
            self.ask(self.inputs.next(), time.monotonic())
        else:
            # Locust is about to stop this user, and would cut short what it begins now.
            gevent.sleep(IDLE_S)

    def wait_time(self) -> float:
        """Thinking: log-normal with the scenario's mean."""
        mean_s = self.recorder.scenario.think_s
        return mean_s * random.lognormvariate(-(THINK_SIGMA**2) / 2, THINK_SIGMA) if mean_s else 0.0


class Crowd(Caller):
    """All users of the open loop: each arrival is sent when it is due, however many are still waiting."""

    concurrency = MANY

    def on_start(self) -> None:
        """Set the clock of the arrivals."""
        self._under_way = Group()
        self._due_s = time.monotonic()

    @task
    def arrive(self) -> None:
        """Wait for the next arrival and send it. Poisson, thinned where the rate is below its peak."""
        recorder, scenario = self.recorder, self.recorder.scenario
        if not recorder.loading:
            gevent.sleep(IDLE_S)
            return
        self._due_s += random.expovariate(scenario.peak)
        ends_s = recorder.began_s + scenario.duration_s
        gevent.sleep(max(0.0, min(self._due_s, ends_s) - time.monotonic()))
        thinned = random.random() * scenario.peak >= scenario.level(self._due_s - recorder.began_s)
        if self._due_s < ends_s and not thinned:
            self._under_way.spawn(self.ask, self.inputs.next(), self._due_s)

    def on_stop(self) -> None:
        """Let what is under way end."""
        self._under_way.join(timeout=self.recorder.plan.timeout_s)
        self._under_way.kill()


class Shape(LoadTestShape):
    """The scenario's load over time; Locust asks every second."""

    abstract = True  # given to Locust by hand, with its scenario

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many of them may start per second; None ends the run."""
        scenario = self._recorder.scenario
        if self._recorder.elapsed_s >= scenario.duration_s or self._recorder.died_at_s is not None:
            return None
        users = 1 if scenario.rate is not None else max(1, round(scenario.level(self._recorder.elapsed_s)))
        return users, float(users)


@events.init_command_line_parser.add_listener
def _add_arguments(parser: Any) -> None:
    parser.add_argument("--plan", required=True, include_in_web_ui=False, help="JSON file that wattle loadtest wrote")


@events.init.add_listener
def _wire(environment: Environment, runner: Runner, **_: Any) -> None:
    options: Namespace | None = environment.parsed_options
    assert options is not None
    plan = read_plan(Path(options.plan))
    dialect = DIALECTS[plan.dialect]
    recorder = Recorder(plan, gevent.sleep)
    Caller.recorder = recorder
    Caller.inputs = Inputs(recorder.scenario, plan.seed, lists=dialect.lists, streams=dialect.streams and plan.streams)
    Caller.network_timeout = Caller.connection_timeout = plan.timeout_s
    random.seed(plan.seed)
    environment.user_classes = [Visitor if recorder.scenario.rate is None else Crowd]
    shape = Shape(recorder)
    shape.runner = runner
    environment.shape_class = shape
    line = ProgressLine()

    def begin(**_: Any) -> None:
        try:
            recorder.begin(environment.host)
        except BadTarget as error:
            # Without an account that is open, users send nothing until they are stopped.
            print(f"wattle: {error}", file=sys.stderr, flush=True)
            gevent.spawn(runner.quit if options.headless else runner.stop)
            return
        # The shape ends the run within a second; the load ends when it is due.
        gevent.spawn_later(recorder.scenario.duration_s, recorder.stop_load)
        gevent.spawn(watch)

    def watch() -> None:
        while recorder.running:
            recorder.watch()
            if options.headless:
                line.show(recorder.progress_line(runner.user_count))
            gevent.sleep(1)

    def finish(**_: Any) -> None:
        if recorder.running:
            recorder.finish(line.show)
            line.end()

    environment.events.test_start.add_listener(begin)
    environment.events.test_stopping.add_listener(lambda **_: recorder.stop_load())
    environment.events.test_stop.add_listener(finish)
    if environment.web_ui:
        extend_web_ui(environment.web_ui, recorder)


def _read(response: Any, query: Query, sample: Sample, due_s: float) -> str | None:
    """Take what the answer says into ``sample``; returns why it counts as failed, or None."""
    headers = {name.lower(): value for name, value in (response.headers or {}).items()}
    sample.request_id = headers.get("x-request-id")
    if response.status_code == 0:
        return f"no answer: {type(response.error).__name__}"
    if response.status_code != 200:
        return describe_failure(response.status_code, response.content or b"")
    if query.stream:
        return _read_stream(response, sample, headers, due_s)
    try:
        sample.take(read_reply(response.json(), headers))
    except ValueError:
        return "200, but the body is not JSON"
    return None


def _read_stream(response: Any, sample: Sample, headers: dict[str, str], due_s: float) -> str | None:
    reader = StreamReader()
    body = response._response  # geventhttpclient's, which gives lines as they come
    try:
        while line := body.readline(b"\n"):
            reader.feed(line)
            if reader.wrote and sample.ttft_ms is None:
                sample.ttft_ms = (time.monotonic() - due_s) * 1000
    except (OSError, ValueError) as error:
        return f"the stream broke off: {type(error).__name__}"
    sample.take(reader.reply(headers))
    if reader.error:
        return f"in the stream: {reader.error[:80]}"
    return None if reader.ended else "the stream ended before its end was told"
