"""Who may ask what.

On the control socket: root, the user that we run as, and members of the socket's group. By TCP, anybody who may
connect may read; what changes something needs the token. A web page that somebody looks at must do neither: its
browser says where the page comes from (Origin), and by which name it was led to us (Host), which a page whose
name was pointed at our address cannot forge.
"""

import contextlib
import hmac
import ipaddress
import os
import pwd
import re
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.errors import VmfleeceError

_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python has no name for it
_MOST_GROUPS_BYTES = 1024  # the most that Python asks the kernel for
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?")


class Forbidden(VmfleeceError):
    """Whoever asks may not. `status` is HTTP's."""

    code = "forbidden"

    def __init__(self, message: str, *, hint: str, code: str | None = None, status: int = 403) -> None:
        super().__init__(message, hint=hint, code=code)
        self.status = status


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a unix socket, as it was when it connected."""

    process: int
    user: int
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"process {self.process} of user {self.user}"


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who is at the other end. Raises OSError."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", credentials)
    groups: set[int] = set()
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS_BYTES)
        groups = {number for (number,) in struct.iter_unpack("I", raw)}
    except OSError:  # more groups than fit: what the user database says of the user
        with contextlib.suppress(KeyError):
            groups = set(os.getgrouplist(pwd.getpwuid(user).pw_name, group))
    return Peer(process, user, frozenset({group, *groups}))


def check_peer(peer: Peer, *, group: int) -> None:
    """Whether a process may ask on the control socket, whose group this is. Raises Forbidden."""
    if peer.user not in (0, os.geteuid()) and group not in peer.groups:
        raise Forbidden(
            f"{peer} may not use the control socket",
            hint="ask as root, as the user that vmfleece runs as, or as a member of the socket's group",
        )


def check_host(host: str, names: Collection[str]) -> None:
    """Whether a browser was led here by a name of ours. Raises Forbidden.

    An address is fine, since a page that was led astray bears its own name.
    """
    if found := _HOST.fullmatch(host):
        name = found["name"].lower().rstrip(".")
        if name in names or name == "localhost":
            return
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return
    raise Forbidden(
        f"the request is for {host!r}, which is no name of this service",
        hint="use its address, or add the name to daemon.hosts",
        code="host-unknown",
        status=421,
    )


def check_origin(origin: str | None, host: str) -> None:
    """Whether it is no web page of somebody else's that asks. Raises Forbidden."""
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise Forbidden(
            f"a page of {origin!r} asks, which is not this service",
            hint="nothing: pages of others may not use it",
            code="origin-foreign",
        )


def check_token(authorization: str | None, token: str | None) -> None:
    """Whether something may be changed by TCP. Raises Forbidden."""
    if token is None:
        raise Forbidden(
            "nothing can be changed here: no token is configured",
            hint="use the control socket, or set daemon.token_file",
            code="read-only",
        )
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise Forbidden(
            "what changes something needs the token",
            hint="send Authorization: Bearer TOKEN, with what is in daemon.token_file",
            code="unauthorized",
            status=401,
        )
