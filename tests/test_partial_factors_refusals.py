"""What the rules that train a part of the factors refuse, and who offers which variant of LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
from factor_rounds import RULES
from refusals import assert_refused

from fedpipe_ray.errors import UserError
from fedpipe_ray.methods import METHODS, make_method, method_class
from fedpipe_ray.methods.base import LoraMethod


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("ffa_lora, rank: 4, ranks: {a: 5}", "method.ranks.a: 5 must lie between 1 and method.rank: 4"),
        ("rolora, rank: 4, ranks: {a: 0}", "method.ranks.a: 0 must lie between 1 and method.rank: 4"),
        *((f"{name}, ranks: {{z: 1}}", "method.ranks: 1 for edge z, which is not in the fleet; there are a, b, c")
          for name in ("ffa_lora", "rolora")),
        *((f"{name}, targets: [q_proj, embed_tokens]", "method.targets: model.embed_tokens is no linear layer, and "
           "products of linear layers alone are joined; leave it out, or use method.name: lora") for name in RULES),
        ("fed_sb, batches: 0", "method.batches: 0 must be at least 1"),
        ("slora, density: 0", "method.density: 0.0 must lie in (0, 1]"),
        ("slora, sparse_rounds: 0", "method.sparse_rounds: 0 must be at least 1"),
        ("slora, sparse_lr: 0", "method.sparse_lr: 0.0 must be above 0"),
        ("slora, sparse_rounds: 2", "rounds: 2 leave none for LoRA after method.sparse_rounds: 2"),
        ("full, variant: dora", "unknown key method.variant"),
        ("fedpipe, variant: rslora", "unknown key method.variant"),
        ("zeropad, variant: lora", "method.variant: 'lora' is not valid: input should be 'plain' or 'rslora'"),
    ],
)  # fmt: skip
def test_bad_settings(method: str, says: str, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "check", run_file, f"method={{name: {method}}}", says=says)


def test_dora_is_had_or_refused_with_the_reason() -> None:
    """Of every method that puts LoRA on a model."""
    having = {"central", "fedprox", "fedsa_lora", "local", "lora", "scaffold"}
    for name in (name for name in METHODS if issubclass(method_class(name), LoraMethod)):
        if name in having:
            assert make_method({"name": name, "variant": "dora"})
            continue
        norms = "those of a pruned weight" if name == "jcpba" else "linear in neither factor"
        says = f"method.variant: {name} has no dora: .*{norms}.*; leave it out, or use .*: {', '.join(sorted(having))}$"
        with pytest.raises(UserError, match=says):
            make_method({"name": name, "variant": "dora"})


@pytest.mark.parametrize(
    ("method", "override", "says"),
    [
        ("ffa_lora, rank: 4, ranks: {a: 1}", "fleet={mode: buffered, buffer: 2, ray: false, edges: {a: {}, b: {}}}",
         "method.ranks: fleet.mode: buffered needs equal ranks"),
        ("fedsa_lora", "evaluate.keep=best", "evaluate.keep: best: fedsa_lora keeps a model on each edge"),
        ("fed_sb", "server.norm_bound=3", "server.norm_bound: 3 bounds changes ... remove it"),
        ("fed_sb", "server.norm_clip=3", "server.norm_clip: 3 bounds changes ... remove it"),
        ("fed_sb", "rounds=1", "rounds: 1 trains nothing; fed_sb's first round finds A and B, give at least 2"),
    ],
)  # fmt: skip
def test_impossible_pairs(
    method: str, override: str, says: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "check", run_file, f"method={{name: {method}}}", override, says=says)
