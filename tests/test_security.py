"""Who is let in: tokens and TLS against real heads of our own; and that no pickled file is ever read."""

from __future__ import annotations

import ast
import datetime
import ipaddress
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from private_heads import head, plain_environment
from runs import ROOT, assert_same, command, here, tensors

from actors import connect
from fedpipe_ray.errors import UserError

TOKEN, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
PLACES = "RAY_AUTH_TOKEN, a file named by RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


def run_at(address: str, run_file: Path, home: Path, out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`fedpipe run` on the cluster at `address`, with nothing of Ray's set but `settings`; it asks for its nodes."""
    fleet = ("fleet.ray=true", "fleet.autoscale=true", f"fleet.address={address}")
    arguments = command("run", run_file, *fleet, "--out", out)
    return subprocess.run(
        arguments, cwd=ROOT, env=plain_environment(home, **settings), capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process as a client with none of Ray's settings and a home of its own."""
    for name in ("MODE", "TOKEN", "TOKEN_PATH"):
        monkeypatch.delenv(f"RAY_AUTH_{name}", raising=False)
    for name in ("RAY_USE_TLS", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def refusal(bare: pytest.MonkeyPatch, address: str, **settings: str) -> str:
    """Why we may not come in, told within the time in which Ray would still be trying; settings hold for this alone."""
    with bare.context() as here:
        for name, value in settings.items():
            here.setenv(name, value)
        mode = os.environ.get("RAY_AUTH_MODE")
        connect.set_environment(address)
        began = time.monotonic()
        try:
            with pytest.raises(UserError) as raised:
                connect.knock(address)
        finally:
            if mode is None:
                del os.environ["RAY_AUTH_MODE"]
        assert time.monotonic() - began < 20
    assert str(raised.value).startswith(f"fleet.address: {address} ")
    return str(raised.value)


# -- tokens


@pytest.mark.services
def test_a_token_is_needed_and_the_right_one(
    run_file: Path, ray_folder: Path, tmp_path: Path, bare: pytest.MonkeyPatch
) -> None:
    """RAY_AUTH_MODE is unset in the client unless said otherwise; the head has token authentication on."""
    kept = tmp_path / "token"
    kept.write_text(f"{TOKEN}\n")
    with head(ray_folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as address:
        says = f"needs a token, and this process has none; give the cluster's in {PLACES}"
        assert says in refusal(bare, address)
        assert says in refusal(bare, address, RAY_AUTH_TOKEN_PATH="/nowhere")
        says = f"refuses this process's token; give the cluster's in {PLACES}"
        assert says in refusal(bare, address, RAY_AUTH_TOKEN=OTHER)
        says = "asks for a token, and RAY_AUTH_MODE is disabled here; unset it"
        assert says in refusal(bare, address, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=TOKEN)
        done = run_at(address, run_file, tmp_path, tmp_path / "no", RAY_AUTH_TOKEN=OTHER)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"fedpipe: fleet.address: {address} refuses this process's token; give")
        assert not (tmp_path / "no").exists()
        done = run_at(address, run_file, tmp_path, tmp_path / "yes", RAY_AUTH_TOKEN_PATH=str(kept))
        assert done.returncode == 0, done.stderr
    assert len(tensors(tmp_path / "yes")) > 0


@pytest.mark.services
def test_a_cluster_without_tokens_is_not_joined_by_default(ray_folder: Path, bare: pytest.MonkeyPatch) -> None:
    with head(ray_folder, RAY_AUTH_MODE="disabled") as address:
        says = "has token authentication off, so whoever reaches it can run code on it and read what runs there; start "
        assert says in refusal(bare, address)
        assert says in refusal(bare, address, RAY_AUTH_TOKEN=TOKEN)
        bare.setenv("RAY_AUTH_MODE", "disabled")
        connect.knock(address)


@pytest.mark.parametrize(
    ("address", "before", "after"),
    [
        ("10.0.0.1:6379", {}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None}),
        ("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "disabled"}),
        ("auto", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, {"RAY_AUTH_MODE": None}),  # as the cluster has it
    ],
)
def test_the_mode_is_explicit(
    address: str, before: dict[str, str], after: dict[str, str | None], bare: pytest.MonkeyPatch
) -> None:
    bare.setenv("RAY_AUTH_MODE", "")  # so that it is as it was when the test ends
    bare.delenv("RAY_AUTH_MODE")
    for name, value in before.items():
        bare.setenv(name, value)
    assert connect.set_environment(address) == address
    assert {name: os.environ.get(name) for name in after} == after


def test_a_private_cluster_has_a_token_of_its_own(bare: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            bare.setenv(name, "")
            bare.delenv(name)
        assert connect.set_environment("local") is None
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        found.append(os.environ["RAY_AUTH_TOKEN"])
    assert len(set(found)) == 2
    assert all(len(token) == 64 for token in found)


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for one in kept:
            one.close()


def test_a_port_that_is_not_rays(mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=rf"fleet.address: {mute} does not speak Ray's protocol in the clear; if"):
        connect.knock(mute)


def test_tls_without_its_files(mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_CA_CERT", "/nowhere/ca.pem")
    with pytest.raises(UserError, match=r"RAY_USE_TLS is set and .*RAY_TLS_CA_CERT=/nowhere/ca.pem"):
        connect.knock(mute)


# -- TLS


def authority(folder: Path) -> dict[str, str]:
    """A private authority and one certificate of it for 127.0.0.1, as Ray's settings."""
    folder.mkdir()
    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of {folder.name}")])
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    here = x509.SubjectAlternativeName([
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost"),
    ])  # fmt: skip
    ca = _builder(name, name, root).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    node = _builder(own, name, key).add_extension(here, critical=False)
    files = {
        "RAY_TLS_CA_CERT": ca.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        "RAY_TLS_SERVER_CERT": node.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        "RAY_TLS_SERVER_KEY": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for name_, content in files.items():
        (folder / name_).write_bytes(content)
    return {"RAY_USE_TLS": "1", **{name_: str(folder / name_) for name_ in files}}


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now - datetime.timedelta(hours=1),
        now + datetime.timedelta(days=1),
    )  # fmt: skip


@pytest.mark.services
def test_a_federation_over_tls(run_file: Path, ray_folder: Path, tmp_path: Path, bare: pytest.MonkeyPatch) -> None:
    """The same adapter as in one process; a client that lacks the authority's certificates does not get in."""
    ours, foreign = authority(tmp_path / "ours"), authority(tmp_path / "foreign")
    token = {"RAY_AUTH_TOKEN": TOKEN}
    with head(ray_folder, RAY_AUTH_MODE="token", **ours, **token) as address:
        says = "does not speak Ray's protocol in the clear; if it uses TLS, set RAY_USE_TLS=1 and RAY_TLS_SERVER_CERT"
        assert says in refusal(bare, address, **token)
        says = "does not speak Ray's protocol with our certificates: RAY_USE_TLS must be 1 there too, and RAY_TLS_CA"
        assert says in refusal(bare, address, **foreign, **token)
        assert "needs a token, and this process has none" in refusal(bare, address, **ours)
        done = run_at(address, run_file, tmp_path, tmp_path / "tls", **ours, **token)
        assert done.returncode == 0, done.stderr
    assert here("run", run_file, "--out", tmp_path / "alone") == 0
    assert_same(tensors(tmp_path / "tls"), tensors(tmp_path / "alone"))


# -- files

READERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe_reads(source: str) -> list[str]:
    """Calls, by line, that could run code from a file: pickle's readers, torch.load, numpy with allow_pickle."""
    found, tree = [], ast.parse(source)
    names: dict[str, str] = {}  # local name -> dotted origin
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({(a.asname or a.name.partition(".")[0]): (a.asname and a.name) or a.name for a in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head_, _, rest = ast.unparse(node.func).partition(".")
        called = f"{names.get(head_, head_)}.{rest}".rstrip(".")
        module, last = called.rpartition(".")[0], called.rpartition(".")[2]
        reader = module.partition(".")[0] in READERS and last in {"load", "loads", "Unpickler", "open"}
        torch_ = called in {"torch.load", "torch.jit.load", "torch.serialization.load", "torch.hub.load"}
        allowed = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        pandas = last == "read_pickle"
        if reader or torch_ or allowed or pandas:
            found.append(f"{node.lineno}: {ast.unparse(node.func)}")
    return found


def test_no_pickled_file_is_read() -> None:
    """Ray's own transport pickles between processes of one trust domain; nothing of ours reads a pickle from a file."""
    files = [
        file for package in ("fedpipe_ray", "actors", "tuning", "clusters") for file in ROOT.glob(f"{package}/**/*.py")
    ]
    assert len(files) > 40
    assert {str(file.relative_to(ROOT)): reads for file in files if (reads := unsafe_reads(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p)", "from torch import load\nload(p)", "import pickle as p\ndef f():\n  p.loads(b)",
        "from pickle import load as l\nl(f)", "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import pandas\npandas.read_pickle(p)", "import joblib\njoblib.load(p)", "import pickle\npickle.Unpickler(f)",
    ],
)  # fmt: skip
def test_the_check_can_fail(source: str) -> None:
    assert len(unsafe_reads(source)) == 1
    assert unsafe_reads("import torch, json, safetensors.torch\njson.load(f)\nsafetensors.torch.load(b)\nload(x)") == []
