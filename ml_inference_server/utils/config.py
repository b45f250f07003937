"""The settings: one tree, one loader, one place where a default stands.

Precedence: defaults < `experiments/base_config.yaml` < experiment file < its variant < `--set key.path=value`.
"""

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.experiment import ExperimentSettings, Section

EXPERIMENTS_DIR = Path(__file__).resolve().parent.parent / "experiments"
BASE_CONFIG = EXPERIMENTS_DIR / "base_config.yaml"

Quantization = Literal["none", "fp16", "bf16", "int8"]
RequestedQuantization = Quantization | Literal["auto"]
Port = Annotated[int, Field(ge=0, le=65535)]


class ModelSettings(Section):
    name: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        min_length=1,
        description="Hugging Face name, or a local folder in sentence-transformers layout.",
    )
    backend: str = Field(
        "pytorch", description="pytorch, onnx, openvino, auto (the fastest here), or fake (no model: for tests)."
    )
    task: Literal["embedding", "cross_encoder"] = Field(
        "embedding",
        description="cross_encoder: the model scores (query, passage) pairs by itself and has no embeddings.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the model runs; auto takes the first of cuda, mps, cpu that is there."
    )
    quantized: bool = Field(False, description="True runs the precision named by `quantization`.")
    quantization: RequestedQuantization | None = Field(
        None,
        description="Which precision when `quantized`: fp16, bf16, int8, or auto (the fastest here that stays within "
        "`min_parity`, FP32 included). Unset: int8 on cpu, fp16 elsewhere.",
    )
    allow_fallback: bool = Field(
        False, description="Run on what is there when device or precision is not; shown in every title. False: refuse."
    )
    random_weights: bool = Field(
        False, description="Seeded random numbers instead of the weights, for speed work only; said in every result."
    )
    min_parity: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Least mean cosine to FP32 at load; unset: 0.97 for int8, 0.99 for a cross-encoder in fp16 or "
        "bf16, 0.9999 for the rest.",
    )
    compile: bool = Field(
        False,
        description="Compile the model for this processor and run it without padding; backend pytorch on cpu, needs a "
        "C++ compiler. The first start takes about a minute longer.",
    )
    max_tokens: int | None = Field(
        None, ge=8, le=131072, description="Cut texts here; unset: the model's own limit. Never above that limit."
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads for one batch; 0: the CPUs divided by `streams`.")
    streams: int = Field(0, ge=0, le=64, description="Batches in flight; 0: one per CPU up to 2 on cpu, 1 elsewhere.")
    process_per_stream: bool = Field(
        False,
        description="Run each stream in a process of its own: Python's lock does not come between model and requests, "
        "and a batch that crashes or hangs costs that process, which is started anew. Each holds the model once.",
    )

    @model_validator(mode="after")
    def _check(self) -> "ModelSettings":
        if not self.quantized and self.quantization not in (None, "none"):
            raise ValueError(f"quantization is {self.quantization} but quantized is false: set quantized: true")
        if self.quantized and self.quantization == "none":
            raise ValueError("quantized is true but quantization is none: name fp16, bf16, int8 or auto")
        return self

    @property
    def precision(self) -> Quantization:
        """The concrete precision, for settings that `resolve` has made concrete. ValueError for auto."""
        if self.quantization == "auto":
            raise ValueError("quantization is auto: it has to be chosen before anything is loaded")
        return self.quantization or "none"

    def requested_quantization(self, device: str) -> RequestedQuantization:
        """The precision that these settings ask for on `device`."""
        if not self.quantized:
            return "none"
        return self.quantization or ("int8" if device == "cpu" else "fp16")


class BatchingSettings(Section):
    enabled: bool = Field(True, description="False runs each request by itself, in arrival order.")
    max_batch_size: int = Field(32, ge=1, le=4096, description="Texts in one batch, at most.")
    max_batch_tokens: int = Field(
        0, ge=0, le=4_194_304, description="Padded tokens in one batch, at most; 0: 2048 on cpu, 16384 elsewhere."
    )
    timeout_ms: float = Field(
        0.0, ge=0, le=10_000, description="How long the oldest text may wait for company while a worker idles."
    )
    length_grouping: bool = Field(True, description="Fill batches with texts of like length instead of the next ones.")
    batch_overhead_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="What starting a batch costs, in tokens of work; 0: 64 on cpu, 4096 elsewhere.",
    )
    max_queue_requests: int = Field(1024, ge=1, le=1_000_000, description="Accepted requests that may wait or run.")
    max_queue_tokens: int = Field(262_144, ge=256, le=100_000_000, description="Tokens that may wait in the queue.")


class ServerSettings(Section):
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 opens it to the network.")
    port: Port = Field(50051, description="gRPC port; 0 takes a free one.")
    max_texts: int = Field(1024, ge=1, le=65536, description="Texts, pairs or documents in one request.")
    max_text_bytes: int = Field(1_048_576, ge=16, le=67_108_864, description="UTF-8 bytes of one text.")
    max_message_bytes: int = Field(
        16_777_216, ge=65_536, le=1_073_741_824, description="gRPC message size, both directions."
    )
    default_timeout_ms: int = Field(
        60_000,
        ge=1,
        le=86_400_000,
        description="Deadline of a call that brings none, and the longest that one may ask.",
    )
    drain_timeout_ms: int = Field(
        30_000, ge=0, le=3_600_000, description="How long accepted work may run after SIGTERM."
    )
    drain_delay_ms: int = Field(
        0, ge=0, le=600_000, description="How long to go on accepting after SIGTERM while health says NOT_SERVING."
    )
    hang_timeout_ms: int = Field(
        60_000,
        ge=100,
        le=86_400_000,
        description="A batch that runs longer turns health to NOT_SERVING; with `model.process_per_stream` its process "
        "is ended and started anew.",
    )
    enable_test_faults: bool = Field(False, description="Let the fake backend obey fault words; loopback only.")


class MetricsSettings(Section):
    host: str = Field("127.0.0.1", min_length=1, description="Address of the dashboard and metrics.")
    port: Port = Field(8080, description="HTTP port of the dashboard and metrics; 0 takes a free one.")
    window_s: int = Field(30, ge=1, le=3600, description="Seconds that the live figures look back.")
    enabled: bool = Field(True, description="False records nothing: only for measuring what recording costs.")
    hosts: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")]] = Field(
        [], max_length=64, description="Further names (of a proxy, say) under which browsers may come to the dashboard."
    )
    cors_origins: list[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9._\[\]:-]{1,253}$")]] = Field(
        [], max_length=64, description="Origins whose pages may read the figures, such as https://status.example."
    )
    otlp_endpoint: str = Field(
        "", description="Where spans of requests and batches are sent, such as http://localhost:4318; empty: nowhere."
    )


class Settings(Section):
    """Everything that an experiment can say."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Names the result files.")
    description: str = Field("", description="One line for people.")
    model: ModelSettings = Field(default_factory=ModelSettings)
    batching: BatchingSettings = Field(default_factory=BatchingSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    experiment: ExperimentSettings = Field(default_factory=ExperimentSettings)
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Named sets of dotted overrides; an experiment with variants runs once for each of them.",
    )
    variant: str = Field("", description="Which variant is in force; set by --variant, never in a file.")

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.server.port and self.server.port == self.metrics.port:
            raise ValueError(f"server.port and metrics.port are both {self.server.port}: give one of them another")
        loopback = self.server.host in ("127.0.0.1", "localhost", "::1")
        if self.server.enable_test_faults and not loopback:
            raise ValueError("server.enable_test_faults needs server.host 127.0.0.1: faults are for tests only")
        if self.server.enable_test_faults and self.model.backend != "fake":
            raise ValueError("server.enable_test_faults works with model.backend fake only")
        if self.server.max_message_bytes < self.server.max_text_bytes:
            raise ValueError(
                "server.max_message_bytes is smaller than server.max_text_bytes: no such text could arrive"
            )
        return self


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            continue  # construct_mapping refuses it with its line
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`. ConfigError names the file, and the line where YAML knows it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, sorted(p.name for p in EXPERIMENTS_DIR.glob("*.yaml")), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, found {type(content).__name__}")
    return content


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it key by key; lists are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    *parents, leaf = dotted.split(".")
    tree = {leaf: value}
    for part in reversed(parents):
        tree = {part: tree}
    return tree


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as {a: {b: value}}; the value is read as YAML, so 8, true, [1, 2] mean what they say."""
    key, equals, raw = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"--set {text}: expected key.path=value, for instance batching.max_batch_size=16")
    try:
        return _nested(key.strip(), yaml.load(raw, Loader=_UniqueKeyLoader))  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--set {text:.200}: the value is not valid YAML") from error


def load_settings(
    experiment: Path | None = None,
    *,
    legacy: Path | None = None,
    overrides: Sequence[str] = (),
    variant: str = "",
) -> Settings:
    """The effective settings. ConfigError lists every problem with its file, dotted path and remedy.

    `legacy` is a single file that stands alone; otherwise `experiment` overrides the base configuration.
    """
    if legacy is not None:
        layers = [(str(legacy), read_yaml(legacy))]
    else:
        layers = [(str(BASE_CONFIG), read_yaml(BASE_CONFIG))]
        if experiment is not None:
            layers.append((str(experiment), read_yaml(experiment)))
    tree: dict[str, Any] = {}
    for source, content in layers:
        tree = deep_merge(tree, content)
        _validate(tree, source)
    if variant:
        variants = tree.get("variants") or {}
        if variant not in variants:
            known = ", ".join(variants) or "none"
            raise ConfigError(f"{layers[-1][0]}: no variant {variant!r}; it has: {known}")
        for dotted, value in variants[variant].items():
            tree = deep_merge(tree, _nested(str(dotted), value))
        tree["variant"] = variant
        _validate(tree, f"{layers[-1][0]}, variant {variant}")
    for text in overrides:
        tree = deep_merge(tree, parse_override(text))
        _validate(tree, f"--set {text}")
    return _validate(tree, layers[-1][0])


def _validate(tree: dict[str, Any], source: str) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(tree, e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def _explain(tree: dict[str, Any], loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    path = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        section: Any = Settings
        for part in loc[:-1]:
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(str(loc[-1]), list(section.model_fields), 1, 0.5)
        prefix = "".join(f"{part}." for part in loc[:-1])
        remedy = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(section.model_fields)}"
        return f"unknown key {path}; {remedy}"
    message = message.removeprefix("Value error, ")
    if not loc or kind == "value_error":
        return f"{path + ': ' if path else ''}{message}"
    return f"{path}: {message[0].lower() + message[1:]}, not {value!r:.60}"


def setting_rows() -> list[tuple[str, Any, str]]:
    """(dotted key, default, description) of every leaf, in order: what the tests hold the README's table to."""
    return list(_leaves(Settings, ""))


def _leaves(section: type[Section], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.get_default(call_default_factory=True), field.description or ""
