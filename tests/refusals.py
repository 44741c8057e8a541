"""How a test asks the command line to refuse something."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import here


def assert_refused(
    capsys: pytest.CaptureFixture[str], *arguments: object, says: str = "", out: Path | None = None
) -> str:
    """What the command line says when it refuses; with `out`, that folder must not exist afterwards.

    says: parts of the message, divided by ` ... `, in that order.
    """
    capsys.readouterr()
    code = here(*arguments, *(["--out", out] if out else []))
    printed, message = capsys.readouterr()
    assert code == 2, printed + message
    assert "Traceback" not in printed + message
    assert message.startswith("fedpipe: ")
    at = 0
    for part in says.split(" ... "):
        assert part in message[at:], f"{part!r} is not, or not there, in {message!r}"
        at = message.index(part, at) + len(part)
    assert out is None or not out.exists()
    return message
