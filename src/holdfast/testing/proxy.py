"""A TCP proxy that cuts: it passes bytes on until told otherwise, then closes, resets, swallows or holds them."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Literal, NamedTuple

Direction = Literal["requests", "answers"]
How = Literal["close", "reset", "hole", "hold"]

_CHUNK_BYTES = 64 * 1024


class Cut(NamedTuple):
    """What happens once, after so many bytes more in a direction, counted over all connections.

    ``close``: both sides are closed. ``reset``: the client gets a reset. ``hole``: the connection stays, and nothing
    passes on it any more. ``hold``: what follows is kept, the client gets a reset, and :meth:`Proxy.release` delivers
    it to the server later (a request that was still in flight).
    """

    direction: Direction
    after_bytes: int
    how: How


class _Pair:
    """One client's connection and its connection to the server."""

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.client_reader, self.client = client
        self.server_reader, self.server = server
        self.mute = False
        """Nothing passes any more."""
        self.held = b""
        self.answered = asyncio.Event()
        """The server has said something after it went mute."""

    def reset_client(self) -> None:
        """Close the client's side with a reset."""
        sock: socket.socket = self.client.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()


class Proxy:
    """Stands between a client and a server on loopback: ``async with Proxy(port) as proxy: … proxy.port …``.

    Args:
        server_port: Where the server listens.
        server_host: On which machine.
        delay_seconds: How long every chunk waits, in each direction.
    """

    def __init__(self, server_port: int, *, server_host: str = "127.0.0.1", delay_seconds: float = 0.0) -> None:
        self.server_port = server_port
        self.server_host = server_host
        self.delay_seconds = delay_seconds
        self.passed: dict[Direction, int] = {"requests": 0, "answers": 0}
        """How many bytes went through."""
        self.chunks: dict[Direction, int] = {"requests": 0, "answers": 0}
        """In how many pieces."""
        self.connections = 0
        """How many were made."""
        self.refusing = False
        """New connections are closed at once."""
        self.silent = False
        """Nothing passes, on connections that are made meanwhile neither; one that lost something stays a hole."""
        self.was_cut = asyncio.Event()
        self.port = 0
        self._cut: Cut | None = None
        self._cut_at = 0
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for pair in list(self._pairs):
            pair.client.transport.abort()
            pair.server.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listener.wait_closed()

    def cut(self, direction: Direction, after_bytes: int, how: How) -> None:
        """Arm a cut; an earlier one that has not happened is forgotten."""
        self._cut = Cut(direction, after_bytes, how)
        self._cut_at = self.passed[direction] + after_bytes
        self.was_cut.clear()

    def spare(self) -> None:
        """Disarm the cut."""
        self._cut = None

    async def release(self, *, patience_seconds: float = 10.0) -> None:
        """Deliver what was held to the server, and wait for the beginning of its answer, which nobody gets.

        Raises:
            TimeoutError: There was none: what was held is only the beginning of a request, say.
        """
        for pair in [pair for pair in self._pairs if pair.held]:
            rest, pair.held = pair.held, b""
            try:
                pair.server.write(rest)
                async with asyncio.timeout(patience_seconds):
                    await pair.server.drain()
                    await pair.answered.wait()
            finally:
                pair.server.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            writer.transport.abort()
            return
        try:
            server = await asyncio.open_connection(self.server_host, self.server_port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair((reader, writer), server)
        self._pairs.add(pair)
        pumps = [
            asyncio.ensure_future(self._pump(pair, "requests", reader, server[1])),
            asyncio.ensure_future(self._pump(pair, "answers", server[0], writer)),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if pair.mute:
                await asyncio.wait(pumps)
        finally:
            for task in pumps:
                task.cancel()
            self._pairs.discard(pair)
            writer.transport.abort()
            server[1].transport.abort()
            self._tasks.difference_update(pumps)

    async def _pump(
        self, pair: _Pair, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            while chunk := await source.read(_CHUNK_BYTES):
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                pair.mute = pair.mute or self.silent
                if pair.mute:
                    if direction == "answers":
                        pair.answered.set()
                    continue
                cut = self._cut
                room = self._cut_at - self.passed[direction]
                if cut is not None and cut.direction == direction and len(chunk) > room:
                    await self._send(direction, chunk[:room], sink)
                    self._cut = None
                    self._do(cut.how, pair, chunk[room:])
                    self.was_cut.set()
                    if cut.how in ("hole", "hold"):
                        continue
                    return
                await self._send(direction, chunk, sink)
        except OSError:
            pass  # either side went away: the pair ends

    async def _send(self, direction: Direction, chunk: bytes, sink: asyncio.StreamWriter) -> None:
        if chunk:
            self.passed[direction] += len(chunk)
            self.chunks[direction] += 1
            sink.write(chunk)
            await sink.drain()

    def _do(self, how: How, pair: _Pair, rest: bytes) -> None:
        match how:
            case "close":
                pair.client.close()
                pair.server.transport.abort()
            case "reset":
                pair.reset_client()
            case "hole":
                pair.mute = True
            case "hold":
                pair.mute, pair.held = True, rest
                pair.reset_client()
