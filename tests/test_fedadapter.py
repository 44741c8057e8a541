"""`fedadapter`: the adapter by hand, growing that changes nothing, who wins a trial, the export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import here, load
from test_export import TOKENS, architecture, logits, model_folder
from toys import llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_ray import bottleneck, lora
from fedpipe_ray.bottleneck import Bottleneck, Bottlenecks, BottleneckSpec, BottleneckWeights, load_adapter
from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.fedadapter import FedAdapter, groups_of, note, typical_seconds, winner
from fedpipe_ray.model import Base, empty_model
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.record import RunFolder
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import first_view, server_site
from fedpipe_ray.settings import Model, Profile
from fedpipe_ray.site import attempt

METHOD = "method={name: fedadapter, trial_every: 2}"
KINDS = ["llama", "gpt2", "bert", "distilbert"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def base_of(kind: str, tmp_path: Path, model_dir: Path) -> tuple[Base, str]:
    """A tiny model of two layers and width 32, and its task."""
    task = "causal" if kind in ("llama", "gpt2") else "classification"
    folder = model_folder(kind, tmp_path, model_dir)
    return Base.load(Model(name=str(folder), device="cpu"), task, ["x", "y", "z"] if task != "causal" else [], 0), task


def noisy(base: Base, spec: BottleneckSpec) -> dict[str, torch.Tensor]:
    """Adapters that do something."""
    model = bottleneck.attach(base, spec)
    draw = generator()
    return {name: torch.randn(p.shape, generator=draw) / 5 for name, p in lora.parameters(model).items()}


# -- the adapter


def test_one_adapter_by_hand() -> None:
    """W_down h + b = 1 + 0.5; SiLU(1.5) = 1.5 / (1 + e^-1.5) = 1.2263617; h + (2, -1) 1.2263617 + (0, 1)."""
    part = Bottleneck(2, 1)
    lora.load(part, {
        "down.weight": torch.tensor([[1.0, 0.0]]), "down.bias": torch.tensor([0.5]),
        "up.weight": torch.tensor([[2.0], [-1.0]]), "up.bias": torch.tensor([0.0, 1.0]),
    })  # fmt: skip
    assert part(torch.tensor([1.0, 2.0])).tolist() == pytest.approx([3.4527234, 1.7736383], abs=1e-6)


def test_it_stands_on_the_projections_before_the_residual_sum() -> None:
    """b_up alone: attention of layer 1 gives its output plus 1, its MLP plus 2, and layer 0 nothing."""
    model = llama()
    outputs: dict[str, list[torch.Tensor]] = {}
    parts = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    for name in parts:
        part = model.get_submodule(name)
        part.register_forward_hook(
            lambda m, i, o, name=name: outputs.setdefault(name, []).append(o[0] if isinstance(o, tuple) else o)
        )
    logits(model.requires_grad_(False))
    adapted = Bottlenecks(model, BottleneckSpec(1, 4))
    names = [f"model.layers.1.{place}.bottleneck." for place in ("self_attn.o_proj", "mlp.down_proj")]
    tensors = {name: torch.zeros_like(p) for name, p in lora.parameters(adapted).items()}
    lora.load(adapted, {**tensors, f"{names[0]}up.bias": torch.ones(32)})
    logits(adapted)
    lora.load(adapted, {**tensors, f"{names[1]}up.bias": 2 * torch.ones(32)})
    logits(adapted)
    plain, attention, mlp = zip(*(outputs[name] for name in parts), strict=True)
    assert all(torch.equal(plain[i], attention[i]) for i in (0, 1))
    torch.testing.assert_close(attention[2], plain[2] + 1)
    torch.testing.assert_close(mlp[3], plain[3] + 2)
    assert torch.equal(mlp[2], plain[2])


@pytest.mark.parametrize("kind", KINDS)
def test_growing_changes_nothing_and_off_is_off(kind: str, tmp_path: Path, model_dir: Path) -> None:
    """A fresh adapter is the base exactly; deeper and wider compute what came before; then the base is as it was."""
    base, task = base_of(kind, tmp_path, model_dir)
    before, shapes, plain = logits(base.model), architecture(base.model), list(base.model.state_dict())
    names = bottleneck.places(base.model, 1)
    assert len(names) == 2 and all(".1." in name for name in names)  # noqa: PT018 (the top one of two layers)
    heads = {name: t for name, t in lora.read(bottleneck.attach(base, BottleneckSpec(1, 3, task))).items()
             if ".bottleneck." not in name}  # fmt: skip
    assert bool(heads) == (task == "classification")
    small = {**bottleneck.fresh(base.model, names, 3, generator()), **heads}
    shape = BottleneckSpec(1, 3, task)
    assert torch.equal(logits(BottleneckWeights(shape, small).on(base)), before)

    small = noisy(base, shape)
    trained = sum(tensor.numel() for name, tensor in small.items() if ".bottleneck." in name)
    assert trained == 2 * (2 * 3 * 32 + 3 + 32)  # 2 m d + m + d an adapter, as Houlsby et al. count
    expected = logits(BottleneckWeights(shape, small).on(base))
    assert float((expected - before).abs().max()) > 0.01
    deep = bottleneck.deepened(small, base.model, 2, generator())
    wide = bottleneck.widened(small, 5, generator())
    for grown, spec in ((deep, BottleneckSpec(2, 3, task)), (wide, BottleneckSpec(1, 5, task))):
        assert bottleneck.spec_of(grown, task) == spec
        assert any(bool(tensor.any()) for name, tensor in grown.items() if name not in small or wide is grown)
        model = BottleneckWeights(spec, grown).on(base)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    lora.detach(base)
    assert torch.equal(logits(base.model), before)
    assert architecture(base.model) == shapes
    assert list(base.model.state_dict()) == plain


def test_new_units_learn() -> None:
    """The columns of W_up that start at zero get a gradient, since their rows of W_down do not start at zero."""
    model = llama()
    small = bottleneck.fresh(model, bottleneck.places(model, 1), 2, generator())
    adapted = Bottlenecks(model.requires_grad_(False), BottleneckSpec(1, 4))
    lora.load(adapted, bottleneck.widened(small, 4, generator()))
    adapted(input_ids=TOKENS).logits.square().sum().backward()
    for name, p in lora.parameters(adapted).items():
        if name.endswith("up.weight"):
            assert bool((p.grad[:, 2:].abs() > 0).all())
    assert all(p.grad is None for name, p in model.named_parameters() if ".bottleneck." not in name)


# -- the method


def test_the_best_gain_per_second_wins() -> None:
    """now: 0.2 in 10 s = .020; deeper: 0.3 in 20 s = .015, though it gained more; wider: 0.1 + 0.3 in 8 + 8 s = .025.

    The second edge of `wider` came a round later: its own first loss and time count.
    """
    numbers: dict[str, float] = {}
    for arm, edge, seconds, loss in (
        ("now", "a", 0, 2.0), ("deeper", "b", 0, 2.2), ("wider", "c", 0, 3.0),
        ("now", "a", 10, 1.8), ("deeper", "b", 20, 1.9), ("wider", "c", 8, 2.9), ("wider", "d/e", 8, 1.0),
        ("wider", "d/e", 16, 0.7), ("now", "a", 12, math.nan),
    ):  # fmt: skip
        numbers[f"{arm}/seconds"] = seconds
        note(numbers, arm, edge, loss)
    assert (numbers["now/first/a"], numbers["now/last/a"], numbers["now/last_at/a"]) == (2.0, 1.8, 10)
    assert winner(numbers, ["now", "deeper", "wider"]) == "wider"
    numbers["wider/last/c"] = 3.2  # -0.2 + 0.3 in 16 s = .00625
    assert winner(numbers, ["now", "deeper", "wider"]) == "now"
    numbers["now/last/a"] = 1.85  # .015 too: the first of equal ones
    numbers["deeper/first/b"] = 2.0
    numbers["deeper/last/b"] = 1.7
    assert winner({**numbers, "now/last_at/a": 10.0, "now/last/a": 2.0}, ["now", "deeper", "wider"]) == "deeper"
    assert winner({}, ["now", "deeper", "wider"]) == "now"
    assert winner({"deeper/first/a": 2.0, "deeper/first_at/a": 0.0, "deeper/last/a": 2.0, "deeper/last_at/a": 0.0},
                  ["now", "deeper"]) == "now"  # fmt: skip


def test_a_group_is_timed_on_the_profiles_of_all() -> None:
    """1e9 FLOPs take 1 s and 2 s, 1000 bytes each way at 8 kbit/s 2 s: (3 + 4) / 2."""
    slow = {"uplink_bps": 8e3, "downlink_bps": 8e3, "latency_seconds": 0.0}
    edges = {"a": Profile(compute_flops=1e9, **slow), "b": Profile(compute_flops=0.5e9, **slow)}
    cost = Cost(flops=1e9, bytes_up=1000, bytes_down=1000, virtual_seconds=99.0)
    assert typical_seconds(cost, edges) == pytest.approx(3.5)


def test_groups_are_of_like_speed_and_change() -> None:
    speeds = {"a": 1.0, "b": 6.0, "c": 3.0, "d": 5.0, "e": 2.0, "f": 4.0}
    edges = {name: Profile(compute_flops=1e9 * speed) for name, speed in speeds.items()}
    arms = ["now", "deeper", "wider"]
    first = groups_of(edges, arms, 0)
    assert first == {"b": "now", "d": "deeper", "f": "wider", "c": "now", "e": "deeper", "a": "wider"}
    assert groups_of(edges, arms, 1) == {edge: arms[(arms.index(arm) + 1) % 3] for edge, arm in first.items()}
    alone = [groups_of({"a": edges["a"]}, arms, trial)["a"] for trial in range(4)]
    assert alone == ["now", "deeper", "wider", "now"]


def test_a_trial_from_start_to_winner(run_file: Path) -> None:
    """Groups are averaged apart; `deeper` gains most, so its mean goes on as `now`, and all grow from it."""
    run = load(run_file, METHOD)
    method, server = make_method(run.method), server_site(run, make_method(run.method), [])
    state = method.start(server, rng_for(0, 0, "start"))
    assert {name.partition("/")[0] for name in state.tensors} == {"now", "deeper", "wider"}
    orders = method.plan(state, run.fleet.edges, server, 0, rng_for(0, 0, "plan"))
    arms = {edge: next(iter(order.tensors)).partition("/")[0] for edge, order in orders.items()}
    assert arms == {"a": "now", "b": "deeper", "c": "wider"}

    def reports(round: int, deeper: float) -> list[Report | Lost]:
        losses = {"a": 2.0 - 0.1 * round, "b": deeper, "c": 2.0}
        found: list[Report | Lost] = []
        for index, (edge, order) in enumerate(orders.items()):
            message = Message({n: t + index + 1 for n, t in order.tensors.items()}, {"loss": losses[edge]})
            found.append(Report(edge, round, 16, 0.0, Cost(flops=1e9, virtual_seconds=1.0), fetch=lambda m=message: m))
        return found

    bad = Report("b", 0, 16, 0.0, Cost(), fetch=lambda: Message({"deeper/x": torch.ones(1)}, {"loss": 1.0}))
    empty = Report("b", 0, 16, 0.0, Cost(), fetch=lambda: Message())
    after = method.aggregate(state, [bad, empty, *reports(0, 2.0)], server, 0, rng_for(0, 0, "aggregate"))
    assert bad.rejected is not None
    assert empty.rejected is not None
    for index, arm in enumerate(("now", "deeper", "wider")):
        own = [name for name in state.tensors if name.startswith(f"{arm}/")]
        assert all(torch.allclose(after.tensors[name], state.tensors[name] + index + 1) for name in own)
    assert (after.numbers["rounds"], after.numbers["clock"]) == (1, 1.0)
    part = method.aggregate(state, [Lost("a", "gone"), *reports(0, 2.0)[1:]], server, 0, rng_for(0, 0, "aggregate"))
    assert all(torch.equal(part.tensors[n], t) for n, t in state.tensors.items() if n.startswith("now/"))

    new = method.aggregate(after, reports(1, 1.5), server, 1, rng_for(0, 1, "aggregate"))
    assert (new.numbers["trial"], new.numbers["rounds"]) == (1, 0)
    for name, tensor in state.tensors.items():
        arm, _, own = name.partition("/")
        if arm == "deeper":
            assert torch.allclose(new.tensors[f"now/{own}"], tensor + 2)
    assert {name.partition("/")[0] for name in new.tensors} == {"now", "wider"}  # both layers are adapted
    (view,) = method.weights(new, server).values()
    assert isinstance(view, BottleneckWeights)
    assert view.spec == BottleneckSpec(2, 8)
    assert bottleneck.spec_of({n: t for n, t in new.tensors.items() if n.startswith("wider/")}, "").width == 16


def test_limits_and_the_interval_on_the_clock(run_file: Path) -> None:
    run = load(run_file, "method={name: fedadapter, depth: 2, width: 8, max_width: 12, interval_seconds: 5}")
    method = make_method(run.method)
    assert isinstance(method, FedAdapter)
    state = method.start(server_site(run, method, []), rng_for(0, 0, "start"))
    assert {len(t) for n, t in state.tensors.items() if n.startswith("wider/") and n.endswith("down.bias")} == {12}
    assert not [name for name in state.tensors if name.startswith("deeper/")]
    assert [method.over({"rounds": r, "clock": c}) for r, c in ((1, 9), (2, 4.9), (9, 4), (2, 5))] == [
        False, False, False, True,
    ]  # fmt: skip
    assert [FedAdapter(trial_every=3).over({"rounds": r, "clock": 1e9}) for r in (2, 3)] == [False, True]


def test_what_a_round_costs_and_leaves_alone(run_file: Path) -> None:
    """Top layer of two, width 8: layer 0 and q, k, v, o are passed (2 FLOPs), MLP and head frozen (4), the rest 6."""
    run = load(run_file, METHOD)
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    site, server = fleet.sites["a"], server_site(run, method, [])
    state = method.start(server, rng_for(0, 0, "start"))
    order = method.plan(state, run.fleet.edges, server, 0, rng_for(0, 0, "plan"))["a"]
    before = {name: p.detach().clone() for name, p in site.base.model.named_parameters()}
    report, update = attempt(site, order, 0)
    assert isinstance(report, Report)
    assert update is not None
    passed, frozen, trained = 2 * 4 * 1024 + 3 * 2048, 3 * 2048 + 18 * 32, 2 * 2 * 8 * 32
    assert report.cost.flops == (2 * passed + 4 * frozen + 6 * trained) * report.cost.tokens
    assert update.payload_bytes == 4 * 2 * (2 * 8 * 32 + 8 + 32)
    assert update.numbers["loss"] == pytest.approx(site.measure(site.base.model, "validation")["loss"], abs=0.5)
    lora.detach(site.base)
    assert all(torch.equal(p, before[name]) for name, p in site.base.model.named_parameters())
    assert update.numbers["loss"] == site.measure(site.base.model, "validation")["loss"]  # of what it was sent


def test_an_edge_without_validation_rows_tells_its_training_loss(run_file: Path) -> None:
    run = load(run_file, METHOD, "data.validation=0.0")
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    server = server_site(run, method, [])
    orders = method.plan(
        method.start(server, rng_for(0, 0, "start")), run.fleet.edges, server, 0, rng_for(0, 0, "plan")
    )
    report, update = attempt(fleet.sites["a"], orders["a"], 0)
    assert isinstance(report, Report)
    assert update is not None
    assert update.numbers["loss"] == report.train_loss


def test_a_run_grows_and_learns(run_file: Path) -> None:
    run = load(run_file, METHOD, "rounds=6")
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    server = server_site(run, method, [])
    rounds = list(federate(method, fleet, server, rounds=6, seed=0))
    assert [done.state.numbers["trial"] for done in rounds] == [0, 1, 1, 2, 2, 3]
    losses = [done.quality["loss"] for done in rounds]
    assert losses[-1] < losses[0]
    sizes = [sum(t.numel() for n, t in done.state.tensors.items() if n.startswith("now/")) for done in rounds]
    assert sizes == sorted(sizes)


# -- outside


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_export_is_loaded_on_a_plain_model(
    kind: str, run_file: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "run", model_folder(kind, tmp_path, model_dir)
    data = [] if kind != "bert" else [
        f'data={{source: "{load(run_file).data.source}", task: classification, text: "{{question}}", label: kind, '
        "labels: [z, x, y], max_length: 16, validation: 0.2, test: 0.2}"
    ]  # fmt: skip
    assert here("run", run_file, METHOD, f"model.name={base}", *data, "--out", folder) == 0
    shown = capsys.readouterr().out
    assert f'fedpipe_ray.bottleneck.load_adapter(base, "{folder}/adapter")' in " ".join(shown.split())
    assert "--merge" not in shown
    run = RunFolder.open(folder).run()
    state, point = RunFolder.open(folder).final_state(run)
    site = server_site(run, make_method(run.method), point.classes)
    expected = logits(first_view(site, state).on(site.base))
    if kind == "bert":
        plain: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    else:
        plain = AutoModelForCausalLM.from_pretrained(base)
    assert float((logits(plain) - expected).abs().max()) > 0.01
    torch.testing.assert_close(logits(load_adapter(plain, folder / "adapter")), expected, rtol=0, atol=1e-6)

    assert here("export", folder, "--out", tmp_path / "again") == 0
    for name in ("bottlenecks.json", "bottlenecks.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    capsys.readouterr()
    assert here("export", folder, "--out", tmp_path / "merged", "--merge") == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    if kind == "llama":
        tuned = json.loads((folder / "summary.json").read_text())["tuned"]["global"]["loss"]
        assert here("evaluate", folder) == 0
        assert f"-> {tuned:.3f}" in capsys.readouterr().out


def test_what_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, said in (
        ("depth: 3", "method.depth: 3 is more than the model's 2 layers"), ("width: 0", "method.width: 0 must be"),
        ("trial_every: 1", "method.trial_every: 1 rounds show no gain"),
        ("max_width: 4", "method.max_width: 4 is below"),
        ("interval_seconds: 0", "method.interval_seconds: 0"),
    ):  # fmt: skip
        assert here("check", run_file, f"method={{name: fedadapter, {setting}}}") == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="no place for bottlenecks in Linear"):
        bottleneck.layers(torch.nn.Linear(2, 2))
    assert len(bottleneck.layers(empty_model(load(run_file).model, "causal", []))) == 2
