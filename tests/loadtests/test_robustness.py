"""The client that pushes the service, against a server that answers anything."""

import asyncio
from typing import cast

from loadtests.robustness import HOST, Connection, post

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Answering(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(ANSWER)


def test_who_left_asks_again_and_is_answered() -> None:
    async def leave_and_ask() -> list[tuple[int, bytes]]:
        server = await asyncio.get_running_loop().create_server(Answering, HOST, 0)
        connection, answers = Connection(server.sockets[0].getsockname()[1]), []
        for _ in range(3):
            await connection.send(post("sentiment", {"input": "left"}))
            connection.close()
            answers.append(await connection.ask(post("sentiment", {"input": "asked"})))
        connection.close()
        server.close()
        await asyncio.sleep(0.05)  # both ends of what was closed are told
        return answers

    assert asyncio.run(leave_and_ask()) == [(200, b"{}")] * 3
