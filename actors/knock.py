"""Whether a Ray cluster would let us in, asked before Ray is: it says why not at once, and Ray after 20 s does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe_ray.errors import UserError

KNOCK_SECONDS = 5.0
TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
OPEN, LOCKED, SILENT = "open", "locked", "silent"  # what a head answers: come in; who are you; nothing we understand
TOKEN_PLACES = "RAY_AUTH_TOKEN, a file named by RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


def knock(address: str) -> None:
    """Raises UserError with the remedy if HOST:PORT is no Ray cluster that takes this process's settings.

    Reads RAY_AUTH_MODE (token or disabled; another mode is left to Ray), the token, and RAY_USE_TLS. Mixed settings are
    refused both ways: with a token against a cluster that asks for none, whoever stands at that address would read it.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return  # `auto`: Ray knows where
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise UserError(f"fleet.address: no Ray cluster at {address}: {error}") from error
    mode = os.environ.get("RAY_AUTH_MODE", "disabled").lower()
    if "://" in address or mode not in ("token", "disabled"):
        return
    token = own_token() if mode == "token" else None
    fault = _fault(mode, token, answer(f"{host}:{port}", None), f"{host}:{port}")
    if fault:
        raise UserError(f"fleet.address: {address} {fault}")


def _fault(mode: str, token: str | None, met: str, place: str) -> str | None:
    """What is wrong between our settings and a head that answered `met` to a call without token; None if nothing is."""
    if met == SILENT:
        return f"does not speak Ray's protocol {_tls_remedy()}"
    if met == OPEN and mode == "token":
        return (
            "has token authentication off, so whoever reaches it can run code on it and read what runs there; start "
            "all its nodes with RAY_AUTH_MODE=token, or accept that by setting RAY_AUTH_MODE=disabled here"
        )
    if met == OPEN:
        return None
    if mode == "disabled":
        return (
            "asks for a token, and RAY_AUTH_MODE is disabled here; unset it and give the cluster's token in "
            f"{TOKEN_PLACES}"
        )
    if token is None:
        return (
            f"needs a token, and this process has none; give the cluster's in {TOKEN_PLACES} (`ray get-auth-token` on "
            "its head prints it), or set RAY_AUTH_MODE=disabled if the cluster has authentication off"
        )
    if answer(place, token) == LOCKED:
        return f"refuses this process's token; give the cluster's in {TOKEN_PLACES}"
    return None


def _tls_remedy() -> str:
    if uses_tls():
        return (
            "with our certificates: RAY_USE_TLS must be 1 there too, and RAY_TLS_CA_CERT here the authority that "
            "signed its RAY_TLS_SERVER_CERT"
        )
    return (
        "in the clear; if it uses TLS, set RAY_USE_TLS=1 and " + ", ".join(TLS_FILES) + " here; else give the port of "
        "`ray start --head` (6379 unless told otherwise)"
    )


def own_token() -> str | None:
    """The token Ray would send, from the places where it looks, in its order; None if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return (Path(path) if path else Path.home() / ".ray" / "auth_token").read_text().strip() or None
    except OSError:
        return None


def uses_tls() -> bool:
    """Whether Ray's processes speak TLS among themselves."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def answer(place: str, token: str | None) -> str:
    """OPEN, LOCKED or SILENT: how the head at HOST:PORT takes a harmless call, the cluster's id, with or without token.

    Raises UserError if TLS is asked for and a file of it is missing.
    """
    grpc = _quiet_grpc()
    options: Sequence[tuple[str, int]] = [("grpc.enable_http_proxy", 0)]
    if uses_tls():
        channel = grpc.secure_channel(place, grpc.ssl_channel_credentials(*_tls_files()), options)
    else:
        channel = grpc.insecure_channel(place, options)
    with channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        metadata = [("authorization", f"Bearer {token}")] if token else None
        try:
            call(b"", timeout=KNOCK_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return LOCKED
            return SILENT if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) else OPEN
    return OPEN


def _quiet_grpc() -> Any:
    """The package `grpc`, which else writes a failed handshake to the terminal; Ray's processes do not inherit that."""
    before = os.environ.get("GRPC_VERBOSITY")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    grpc.insecure_channel("127.0.0.1:1").close()  # the level is read when the first channel is made
    if before is None:
        del os.environ["GRPC_VERBOSITY"]
    return grpc


def _tls_files() -> tuple[bytes, bytes, bytes]:
    """The authority's certificate, our key, our certificate."""
    names = (TLS_FILES[2], TLS_FILES[1], TLS_FILES[0])
    try:
        authority, key, certificate = (Path(os.environ.get(name, "")).read_bytes() for name in names)
    except OSError as error:
        pairs = ", ".join(f"{name}={os.environ.get(name) or 'unset'}" for name in TLS_FILES)
        raise UserError(f"RAY_USE_TLS is set and a file of it cannot be read ({error}): {pairs}") from error
    return authority, key, certificate
