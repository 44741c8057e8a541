"""Runs with a server optimizer: resumed, step by step for each method that takes one, and what is refused."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import assert_refused
from runs import assert_like, assert_same, here, manifest, opened_run, records

from fedpipe_ray.buffered import federate_buffered
from fedpipe_ray.loop import Start, federate
from fedpipe_ray.methods import METHODS, method_class
from fedpipe_ray.methods.base import as_sent
from fedpipe_ray.record import RunFolder
from fedpipe_ray.server_checks import UNFIT

ADAM = "server.optimizer={name: fedadam, lr: 0.02}"


def test_a_resumed_run_has_the_same_bits(run_file: Path, tmp_path: Path) -> None:
    """State, moments and adapter; edges are sent as many bytes as without an optimizer; the moments do matter."""
    whole, folder, plain = tmp_path / "whole", tmp_path / "run", tmp_path / "plain"
    arguments = ("local.schedule=constant", "local.steps=1", "evaluate.every=0")
    assert here("run", run_file, *arguments, ADAM, "rounds=5", "--out", whole) == 0
    assert here("run", run_file, *arguments, ADAM, "rounds=3", "--out", folder) == 0
    assert here("run", run_file, *arguments, "rounds=1", "--out", plain) == 0
    saved = RunFolder.open(folder).load_checkpoint().start
    assert {name[:2] for name in saved.moments} == {"m/", "v/"}
    assert len(saved.moments) == 2 * len(saved.state.tensors)
    assert all(bool((saved.moments[f"m/{name}"] != 0).any()) for name in saved.state.tensors)
    assert here("resume", folder, "rounds=5") == 0
    assert_like(folder, whole)
    one, other = (RunFolder.open(place).load_checkpoint().start for place in (whole, folder))
    assert_same(dict(one.moments), dict(other.moments))
    assert records(whole)[0]["bytes_down"] == records(plain)[0]["bytes_down"]
    assert manifest(whole)["round"] == 5


@pytest.mark.parametrize(
    ("method", "stays"),
    [
        ("{name: ffa_lora, rank: 4, ranks: {b: 1}}", ""),
        ("{name: zeropad, rank: 4, ranks: {b: 1}}", ""),
        ("{name: hetlora, rank: 4, ranks: {b: 1}}", ""),
        ("{name: scaffold, rank: 4}", "control."),
        ("{name: rolora, rank: 4}", ""),
        ("{name: fed_sb, rank: 4}", ".weight"),
        ("{name: slora, rank: 4, sparse_rounds: 1}", ""),
        ("{name: fedkseed, seeds: 64, tau: 8, pro: true}", "history"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_each_round_is_a_step_from_what_the_method_makes_of_it(
    method: str, stays: str, wire: str, run_file: Path
) -> None:
    """m = m / 2 + d and x + m / 2, of each tensor that the round changed; of others nothing but what the method did.

    d = y - x with x as edges were sent it, but of methods that add to their own. stays: of some name that never steps.
    """
    edges = "fleet={ray: false, edges: {a: {}, b: {}}}"
    arguments = (f"method={method}", "local={steps: 1, batch: 2}", edges, f"wire.dtype={wire}")
    fleet, how, plain, state = opened_run(run_file, *arguments)
    server = opened_run(run_file, *arguments, "server.optimizer={name: fedavgm, lr: 0.5, beta1: 0.5}")[2]
    m, moments, still, aside = dict[str, torch.Tensor](), {}, set[str](), [*getattr(how, "aside", ()), "seed"]
    for number in range(3):
        starts = Start(state, number), Start(state, number, moments=moments)
        both = zip((plain, server), starts, strict=True)
        (made,), (done,) = (
            list(federate(how, fleet, one, rounds=number + 1, seed=0, evaluate_every=0, start=start))
            for one, start in both
        )
        sent = as_sent(state, plain)
        for name, y in made.state.tensors.items():
            x, found = state.tensors.get(name), done.state.tensors[name]
            same = x is None or torch.equal(x, y) or torch.equal(sent[name], y)
            if same or any(fnmatchcase(name, one) for one in aside):
                still.add(name)
                assert torch.equal(found, y), name
                continue
            d = y - (x if getattr(how, "adds", False) else sent[name])
            m[name] = m[name] * 0.5 + d if name in m else d
            torch.testing.assert_close(found, x + 0.5 * m[name], rtol=0, atol=1e-7)
            assert not torch.equal(found, y)
        state, moments = done.state, done.moments
    assert {f"m/{name}" for name in m if name in state.tensors} == set(moments)
    assert not stays or any(stays in name for name in still - m.keys())
    assert m.keys() & state.tensors.keys()


@pytest.mark.parametrize(
    ("method", "loop"),
    [("lora", federate), ("lora", partial(federate_buffered, buffer=2)), ("jcpba", federate), ("scaffold", federate)],
)
def test_a_half_wire_moves_nothing_that_nobody_moved(method: str, loop: Any, run_file: Path) -> None:
    """At a rate of 1e-12. jcpba prunes, so that of some entries no edge has any."""
    settings = (f"method.name={method}", "local={steps: 1, batch: 2, lr: 1e-12, schedule: constant}")
    how = ("server.optimizer={name: fedadam}", "wire.dtype=bfloat16")
    fleet, rule, server, state = opened_run(run_file, *settings, *how)
    *_, last = loop(rule, fleet, server, rounds=3, seed=0, evaluate_every=0)
    for name, x in state.tensors.items():
        if not name.startswith("control."):
            torch.testing.assert_close(last.state.tensors[name], x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["{name: full}", "{name: jcpba, score: taylor}"])
def test_other_methods_learn_with_it(method: str, run_file: Path) -> None:
    """Every tensor of theirs has moments, but jcpba's scores, which are no weights."""
    fleet, how, server, state = opened_run(
        run_file, f"method={method}", "server.optimizer={name: fedadam, lr: 0.003}", "local.steps=2"
    )
    *_, last = federate(how, fleet, server, rounds=2, seed=0, evaluate_every=1)
    assert {key.partition("/")[2] for key in last.moments} == set(state.tensors) - {"scores"}
    assert last.quality["loss"] < 2.93


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("server.optimizer={name: fedadam, lr: 0}",), "server.optimizer.lr: 0.0 must be above 0"),
        (("server.optimizer={name: fedadam, tau: 0}",), "server.optimizer.tau: 0.0 must be above 0"),
        (("server.optimizer={name: fedadam, beta1: 1}",), "server.optimizer.beta1: 1.0 must lie in [0, 1)"),
        (("server.optimizer={name: fedyogi, beta2: -0.1}",), "server.optimizer.beta2: -0.1 must lie in [0, 1)"),
        (("server.optimizer={name: fedadamw, weight_decay: -1}",), "weight_decay: -1.0 must not be negative"),
        (("server.optimizer={name: fedadam, weight_decay: 1}",), "server.optimizer.weight_decay: fedadam has none; its "
         "keys are lr, beta1, beta2, tau"),
        (("server.optimizer={name: fedavgm, tau: 1}",), "optimizer.tau: fedavgm has none; its keys are lr, beta1"),
        (("server.optimizer={name: fedsgd}",), "server.optimizer.name: 'fedsgd' is not valid: ... 'fedadamw'"),
        (("server.optimizer={name: fedadam, rate: 1}",), "unknown key server.optimizer.rate; known keys: beta1"),
        (("server.optimizer={lr: 1}",), "server.optimizer.name: ... required"),
        *[
            (("server.optimizer={name: fedadam}", f"method={{name: {name}}}"),
             f"server.optimizer: fedadam does not fit {name}: {why} ... methods that it fits: ... full, ... jcpba, ... "
             "lora, ... or leave it out")
            for name, why in (("fedpipe", "SVD gives"), ("flora", "every round trains a fresh adapter"),
                              ("fedadapter", "the winner of a trial"), ("lora_fair", "B is corrected for the very A"))
        ],
    ],
)  # fmt: skip
def test_refused(
    overrides: tuple[str, ...], says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "run", run_file, *overrides, says=says, out=tmp_path / "out")


def test_every_method_takes_an_optimizer_or_has_a_reason() -> None:
    assert {name for name in METHODS if not getattr(method_class(name), "pseudo_gradient", False)} == UNFIT.keys()
