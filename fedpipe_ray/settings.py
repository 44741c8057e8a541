"""The keys of a run file, as frozen dataclasses. A default is the setting that measured best in benchmarks/LOG.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from .fleet_settings import FleetSettings, Profile
from .section import Section, require
from .server_settings import Aggregator, Optimizer

__all__ = [
    "Data", "Evaluate", "FleetSettings", "Local", "Model", "Partition", "Profile", "Run", "Section", "ServerSettings",
    "Track", "Wire", "require",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    """Which pretrained model, and how it reaches an edge.

    name: `builtin:tiny-llama`, `builtin:deep-llama`, a Hugging Face id, a local folder, or `package:NAME/FOLDER`, a
    folder in an installed Python package. revision: of a model of the hub. load: `node` = every edge loads `name`
    itself (a path on its node, or the hub); `driver` = the driver loads it and ships weights and tokenizer through the
    object store; `auto` = driver for builtin models, node for others. dtype: of the frozen weights; `auto` = float32 on
    CPU, the checkpoint's own on GPU. device: of torch, such as `cpu` or `cuda`; `auto` = the GPU an edge was given.
    trust_remote_code: whether code from the model's repository may run.
    """

    name: str = "builtin:tiny-llama"
    revision: str | None = None
    load: Literal["auto", "driver", "node"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Partition(Section):
    """How one shared source is divided among the edges.

    by: `edge` = not divided, every edge has a source of its own; `iid`; `dirichlet` (label skew, alpha over `column`
    or the label); `shards` (sorted by `column` or label, `shards` pieces an edge); `column` (a natural split: the value
    of `column` names or groups the edge); `size` (sizes from Dirichlet(alpha)); or `module:function`.
    """

    by: str = "edge"
    alpha: float = 0.5
    shards: int = 2
    column: str | None = None

    def __post_init__(self) -> None:
        known = ("edge", "iid", "dirichlet", "shards", "column", "size")
        require(
            self.by in known or ":" in self.by,
            f"partition.by: {self.by!r} is not one of {', '.join(known)}, or module:function",
        )
        require(self.alpha > 0, f"partition.alpha: {self.alpha} must be above 0")
        require(self.shards >= 1, f"partition.shards: {self.shards} must be at least 1")
        require(
            self.by != "column" or self.column is not None,
            "partition.by: column needs partition.column, a column's name",
        )


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Private text of an edge (or the server's public text), and how a row becomes a training example.

    source: `builtin:docstrings`, a path, folder or glob of JSONL, CSV or Parquet files, a URL that pyarrow knows
    (s3://, gs://), or `hf:NAME[/CONFIG][:SPLIT]`; `{edge}` in it is replaced by the edge's name. format: of the files;
    `auto` goes by their endings. task: language modelling, or classes. prompt, response: templates with `{column}`
    fields; the causal loss counts response tokens only. messages: a column of chat messages, rendered by the
    tokenizer's chat template. text: template of the input of a classifier; label: the column with its class; labels:
    the class names in order (found in the data if empty). max_length: tokens of a row, beyond which it is cut.
    validation, test: a share of the rows, chosen by a hash of the prompt, or a path of their own. limit: at most so
    many rows are read.
    """

    source: str = "builtin:docstrings"
    format: Literal["auto", "jsonl", "csv", "parquet"] = "auto"
    task: Literal["causal", "classification"] = "causal"
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None
    label: str | None = None
    labels: list[str] = field(default_factory=list)
    max_length: int = 256
    validation: float | str = 0.05
    test: float | str = 0.1
    limit: int | None = None
    partition: Partition = field(default_factory=Partition)

    @property
    def builtin(self) -> bool:
        return self.source.startswith("builtin:")

    def __post_init__(self) -> None:
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        require(
            all(0 <= share < 1 for share in shares) and sum(shares) < 1,
            "data.validation, data.test: shares in [0, 1), together below 1",
        )
        require(self.max_length >= 8, f"data.max_length: {self.max_length} tokens are too few; at least 8")
        require(self.limit is None or self.limit > 0, f"data.limit: {self.limit} must be above 0")
        if self.task == "classification":
            require(
                self.text is not None and self.label is not None,
                "data.task: classification needs data.text (a template such as '{title} {body}') "
                "and data.label (a column)",
            )
            require(
                len(self.labels) != 1 and len(set(self.labels)) == len(self.labels),
                f"data.labels: {self.labels} must be two or more different names, or none to find them in the data",
            )
        elif not self.builtin:
            pair = self.prompt is not None and self.response is not None
            require(
                pair != (self.messages is not None),
                "data: a causal task needs prompt and response (templates such as '{question}'), "
                "or messages (a column), not both",
            )


@dataclass(frozen=True, kw_only=True)
class Local(Section):
    """Training on an edge in one round: `steps` optimizer steps, or `epochs` over its rows; 20 steps if both are null.

    batch: rows an optimizer step, split into `accumulate` parts. lr follows `schedule` over all rounds: warmup_steps
    up, then constant, linear or cosine down to lr_floor x lr. optimizer: AdamW, or plain SGD without momentum; clip: of
    the gradient's L2 norm; weight_decay: of AdamW; checkpointing: recompute activations instead of keeping them.
    precision: autocast; `auto` = bfloat16 on GPUs with it.
    threads: of torch, on every fleet; another count gives other bits.
    """

    steps: int | None = None
    epochs: float | None = None
    batch: int = 16
    accumulate: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    lr_floor: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        require(
            self.steps is None or self.epochs is None,
            f"local: steps: {self.steps} and epochs: {self.epochs} both say how long a round is; set one to null",
        )
        for name in ("steps", "epochs", "batch", "accumulate", "lr", "clip", "threads"):
            value = getattr(self, name)
            require(value is None or value > 0, f"local.{name}: {value} must be above 0")
        require(
            self.accumulate <= self.batch,
            f"local.accumulate: {self.accumulate} parts of a batch of {self.batch} rows; at most {self.batch}",
        )
        require(
            self.warmup_steps >= 0 and self.weight_decay >= 0,
            "local.warmup_steps, local.weight_decay: must not be negative",
        )
        require(0 <= self.lr_floor <= 1, f"local.lr_floor: {self.lr_floor} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Section):
    """data: the server's own public rows, for methods that align or distil on them.

    norm_bound: an update whose change has a larger L2 norm, over all its tensors, is rejected; norm_clip: its change is
    scaled down to this norm. aggregator: how updates become one; optimizer: what makes the next state of that (null: it
    is the next state).
    """

    data: Data | None = None
    norm_bound: float | None = None
    norm_clip: float | None = None
    aggregator: Aggregator = field(default_factory=Aggregator)
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        bound, clip = self.norm_bound, self.norm_clip
        require(bound is None or bound > 0, f"server.norm_bound: {bound} must be above 0")
        require(clip is None or clip > 0, f"server.norm_clip: {clip} must be above 0")
        require(
            bound is None or clip is None or clip < bound,
            f"server.norm_clip: {clip} does nothing beside server.norm_bound: {bound}, which rejects what is above; "
            "give a smaller one",
        )


@dataclass(frozen=True, kw_only=True)
class Wire(Section):
    """dtype: of tensors as sent, both ways; the server keeps float32.

    codec: what updates are encoded by on top of that, `{name: topk, share: 0.01}`; names and settings are those of
    codecs.py, null is none. error_feedback: an edge sends what its codec left out with its next update.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    codec: dict[str, Any] | None = None
    error_feedback: bool = False

    def __post_init__(self) -> None:
        require(self.codec is None or bool(self.codec.get("name")), "wire.codec: needs a name, such as topk")
        require(self.codec is not None or not self.error_feedback, "wire.error_feedback: needs wire.codec")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Section):
    """When and on what the edges evaluate: validation rows between rounds, test rows for base and tuned model.

    every: rounds between evaluations (0: never); rows: at most so many an edge; generate: so many test rows an edge are
    also answered in free text (ROUGE-L, exact match). keep: which round's adapter is exported. patience: stop after so
    many evaluations without a better validation loss; target: stop when it is reached. batch: rows at a time;
    max_new_tokens: of an answer; answer: what of it is compared, all text or the number that GSM8K's answers end in.
    """

    every: int = 1
    batch: int = 32
    rows: int | None = None
    generate: int = 0
    max_new_tokens: int = 64
    answer: Literal["text", "gsm8k"] = "text"
    keep: Literal["best", "last"] = "last"
    patience: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        require(self.every >= 0, f"evaluate.every: {self.every} must not be negative")
        require(self.generate >= 0, f"evaluate.generate: {self.generate} must not be negative")
        for name in ("batch", "rows", "max_new_tokens", "patience"):
            value = getattr(self, name)
            require(value is None or value > 0, f"evaluate.{name}: {value} must be above 0")
        needs = self.keep == "best" or self.patience is not None or self.target is not None
        require(self.every > 0 or not needs, "evaluate: keep: best, patience and target need evaluate.every above 0")


@dataclass(frozen=True, kw_only=True)
class Track(Section):
    """What the terminal shows: a live table, a plain line a round, or nothing; `auto` asks the terminal. And where else
    the figures of a run go (docs/tracking.md).

    tensorboard: event files in the run folder; null = where tensorboardX is installed. mlflow: the URI of a tracking
    store, such as sqlite:///mlflow.db or a server's URL; null = none. wandb: `offline` = Weights & Biases files in the
    run folder, `online` = they are sent as well; null = none. project: MLflow's experiment, W&B's project.
    ray_metrics: on Ray, metrics that its agents export for Prometheus (docs/monitoring.md).
    """

    display: Literal["auto", "live", "plain", "none"] = "auto"
    tensorboard: bool | None = None
    mlflow: str | None = None
    wandb: Literal["offline", "online"] | None = None
    project: str = "fedpipe"
    ray_metrics: bool = True

    def __post_init__(self) -> None:
        uri = self.mlflow
        require(
            uri is None or "databricks" in uri or ("://" in uri and not uri.startswith("file:")),
            f"track.mlflow: {uri!r} is no tracking URI; give a database, such as sqlite:///mlflow.db, or a server, "
            "such as http://localhost:5000",
        )
        require(
            uri is None or urlsplit(uri).password is None,
            "track.mlflow: it must hold no password, for it is written to config.yaml; give that in the environment, "
            "as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for PostgreSQL",
        )
        require(bool(self.project), "track.project: needs a name")


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """A whole run file.

    seed: of all that is drawn; rounds: of the federation; method: its name and settings; out: the run folder (default:
    runs/<name of the file>-<date and time>).
    """

    seed: int = 0
    rounds: int = 6
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "lora"})
    local: Local = field(default_factory=Local)
    server: ServerSettings = field(default_factory=ServerSettings)
    wire: Wire = field(default_factory=Wire)
    evaluate: Evaluate = field(default_factory=Evaluate)
    track: Track = field(default_factory=Track)
    out: str | None = None

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds: {self.rounds} must be at least 1")
        require(self.seed >= 0, f"seed: {self.seed} must not be negative")
        require(bool(self.method.get("name")), "method: needs a name; `fedpipe methods` lists them")
