"""Few pieces of work in a round of the loop, in the order in which they came."""

import asyncio
from collections import Counter

from service.desk import PIECES, Desk


def test_no_more_pieces_than_fit_are_done_in_one_round() -> None:
    async def work() -> list[tuple[int, int]]:
        desk, done, rounds = Desk(), list[tuple[int, int]](), 0

        async def piece(number: int) -> None:
            await desk.turn()
            done.append((number, rounds))

        pieces = [asyncio.create_task(piece(number)) for number in range(4 * PIECES)]
        while len(done) < len(pieces):
            await asyncio.sleep(0)
            rounds += 1
        return done

    done = asyncio.run(work())
    assert [number for number, _ in done] == list(range(4 * PIECES))
    assert max(Counter(at for _, at in done).values()) <= PIECES


def test_who_finds_it_free_does_not_wait() -> None:
    async def work() -> None:
        turn = Desk().turn()
        try:
            turn.send(None)
        except StopIteration:
            return
        raise AssertionError("it waited")

    asyncio.run(work())


def test_who_leaves_the_queue_holds_nobody_up() -> None:
    async def work() -> None:
        desk = Desk()
        for _ in range(PIECES):
            await desk.turn()
        leaving, staying = (asyncio.create_task(desk.turn()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        async with asyncio.timeout(5):
            await staying

    asyncio.run(work())
