"""ZeroMQ sockets between our processes; the only module of this package that imports zmq.

Every process makes its own context after the fork. Addresses are `ipc://` files in a private directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import zmq

from engine.wire.codec import WireError, decode, encode
from engine.wire.messages import Message

# A child that dies wants its last words delivered, but not to hang on a parent that is gone.
_LINGER_MS = 1000
_RECONNECT_MS = 10  # the other side may bind its file a moment after we connect
# Frames are small (ids travel on rings); anything larger is not ours. libzmq drops the peer.
_MAX_FRAME_BYTES = 1 << 20


def _events(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.EVENTS))


def _bind_private(socket: zmq.Socket[bytes], address: str) -> None:
    """Bind so that only processes of our own user get in.

    The socket file is 0600: libzmq creates it in the calling thread, as the umask says. And whoever connects
    is asked for its user by SO_PEERCRED, in case the file's mode was changed behind our back.
    """
    socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
    previous = os.umask(0o177)
    try:
        socket.bind(address)
    finally:
        os.umask(previous)


class Channel:
    """One socket that sends or receives whole messages."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,  # zmq.PUSH, zmq.PULL or zmq.DEALER
        address: str,
        *,
        bind: bool = False,
        identity: str = "",  # how a ControlHub tells its peers apart
    ) -> None:
        self._socket = context.socket(kind)
        if identity:
            self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by admission, and dropping would lose a request
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # so that `connected` means a peer is there
        self.address = address
        if bind:
            _bind_private(self._socket, address)
        else:
            self._socket.connect(address)

    def fileno(self) -> int:
        """For select and event loops. Edge-triggered: after it fires, `receive` until it ends."""
        return int(self._socket.getsockopt(zmq.FD))

    @property
    def connected(self) -> bool:
        """For a sending socket: whether its peer has been reached."""
        return bool(_events(self._socket) & zmq.POLLOUT)

    def wait_connected(self, timeout_s: float) -> bool:
        return bool(self._socket.poll(int(timeout_s * 1e3), zmq.POLLOUT))

    def send(self, message: Message) -> bool:
        """Never blocks; False when the peer is not there (not yet, or not any more)."""
        try:
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[Message]:
        """Everything that has arrived. Raises WireError on a frame that is not a message."""
        while _events(self._socket) & zmq.POLLIN:
            yield decode(self._socket.recv(zmq.DONTWAIT))

    def close(self) -> None:
        self._socket.close()


class ControlHub:
    """The parent's side of the control channel: one socket, children told apart by identity."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        _bind_private(self._socket, address)

    def fileno(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, identity: str, message: Message) -> None:
        """A message to a child that is not connected is dropped."""
        self._socket.send_multipart([identity.encode(), encode(message)], zmq.DONTWAIT)

    def receive(self) -> Iterator[tuple[str, Message | None]]:
        """Everything that has arrived, and from whom; None for what is no message."""
        while _events(self._socket) & zmq.POLLIN:
            identity, *frames = self._socket.recv_multipart(zmq.DONTWAIT)
            try:
                message = decode(b"".join(frames))
            except WireError:
                message = None
            yield identity.decode(errors="replace"), message

    def close(self) -> None:
        self._socket.close()
