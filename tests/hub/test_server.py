"""What uvicorn alone would not do."""

import base64
import os
import socket
import struct
from urllib.parse import urlsplit

from agent.hub.server import bind
from protocol.messages import CONNECT_PATH, SUBPROTOCOL_MSGPACK
from tests.hub.support import HubProcess


def test_the_reason_reaches_a_peer_that_sends_everything_before_it_reads(hub: HubProcess) -> None:
    parts = urlsplit(hub.url)
    head = (
        f"GET {CONNECT_PATH} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL_MSGPACK}\r\nAuthorization: Bearer {hub.key}\r\n\r\n"
    )
    # More than the kernel's buffers hold: a peer that is cut off here would fail in its sending.
    size = 32 * 1024 * 1024
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20) as peer:
        peer.sendall(head.encode())
        assert b" 101 " in peer.recv(4096)
        # A masked binary frame; a mask of zeros leaves the bytes as they are.
        peer.sendall(struct.pack("!BBQI", 0x82, 0xFF, size, 0) + b"x" * size)
        frame = peer.recv(4096)
        assert frame[0] == 0x88
        assert struct.unpack("!H", frame[2:4]) == (1009,)
        assert b"exceeds limit of 262144 bytes" in frame


def test_an_answer_is_sent_at_once() -> None:
    # Where the protocol is not named, asyncio leaves the socket as it is: the body of each answer then waits 40 ms
    # for the acknowledgement of its head.
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
