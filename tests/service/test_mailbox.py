"""What threads have computed comes to the loop, however it ended, and many with one waking."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from service.mailbox import Mailbox


def after(*works: Callable[[], Any]) -> None:
    """Do ``works`` on another thread, and wait for it: the loop sees nothing of them until then."""
    thread = threading.Thread(target=lambda: [work() for work in works])
    thread.start()
    thread.join()


def test_every_end_arrives() -> None:
    async def work() -> None:
        mailbox = Mailbox()
        futures = [Future[int]() for _ in range(3)]
        waiting = [mailbox.wait(future) for future in futures]
        after(lambda: futures[1].set_exception(ValueError("bad")), lambda: futures[0].set_result(1), futures[2].cancel)
        assert await waiting[0] == 1
        with pytest.raises(ValueError, match="bad"):
            await waiting[1]
        with pytest.raises(asyncio.CancelledError):
            await waiting[2]

    asyncio.run(work())


def test_what_is_there_already_arrives_too() -> None:
    async def work() -> int:
        future = Future[int]()
        future.set_result(7)
        return await Mailbox().wait(future)

    assert asyncio.run(work()) == 7


def test_many_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> list[str]:
        loop, mailbox, calls = asyncio.get_running_loop(), Mailbox(), list[str]()
        wake = loop.call_soon_threadsafe

        def counted(callback: Any, *arguments: Any) -> Any:
            calls.append(callback.__name__)
            return wake(callback, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        for _ in range(2):
            futures = [Future[int]() for _ in range(5)]
            waiting = [mailbox.wait(future) for future in futures]
            after(*(lambda future=future: future.set_result(0) for future in futures))  # type: ignore[misc]
            await asyncio.gather(*waiting)
        return calls

    assert len(asyncio.run(work())) == 2


def test_who_waits_no_longer_holds_nobody_up() -> None:
    async def work() -> int:
        mailbox, left, kept = Mailbox(), Future[int](), Future[int]()
        leaving, staying = mailbox.wait(left), mailbox.wait(kept)
        leaving.cancel()
        after(lambda: left.set_result(1), lambda: kept.set_result(2))
        return await staying

    assert asyncio.run(work()) == 2
