"""The settings: one tree, one place where a default stands, one loader over the layers of `layers.py`.

Precedence: defaults < `experiments/base_config.yaml` < experiment file < its variant < what the program itself wants
(the runner: free ports) < environment variables < `--set key.path=value` < flags.
All of them are merged before anything is checked; an error names the one that brought the value.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ml_inference_server.utils.door_settings import AuthSettings, TlsSettings
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.experiment import ExperimentSettings
from ml_inference_server.utils.layers import (
    EXPERIMENTS_DIR,
    Given,
    Layer,
    deep_merge,
    given_by,
    nested,
    parse_override,
    read_yaml,
)
from ml_inference_server.utils.limit_settings import LimitSettings
from ml_inference_server.utils.section import Section

BASE_CONFIG = EXPERIMENTS_DIR / "base_config.yaml"

Quantization = Literal["none", "fp16", "bf16", "int8"]
RequestedQuantization = Quantization | Literal["auto"]
Port = Annotated[int, Field(ge=0, le=65535)]
_CONTRADICTION = "contradiction"


def _contradiction(message: str, *keys: str) -> PydanticCustomError:
    """Two settings that are sound alone and not together; `keys` are their dotted names."""
    return PydanticCustomError(_CONTRADICTION, "{message}", {"message": message, "keys": keys})


class ModelSettings(Section):
    name: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        min_length=1,
        description="Hugging Face name, a local folder in sentence-transformers layout, or an exported folder.",
    )
    backend: str = Field(
        "pytorch",
        description="pytorch, onnx, openvino, auto (the fastest here), or fake (no model: for tests). An exported "
        "folder brings its own.",
    )
    task: Literal["auto", "embedding", "cross_encoder"] = Field(
        "auto",
        description="What the model does: embedding, or cross_encoder (it scores (query, passage) pairs by itself and "
        "has no embeddings). auto reads it from the model's files.",
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
        "and a batch that crashes or hangs costs that process, which is started again. Each holds the "
        "libraries once, and what of the model cannot be shared.",
    )

    @model_validator(mode="after")
    def _check(self) -> "ModelSettings":
        keys = ("model.quantization", "model.quantized")
        if not self.quantized and self.quantization not in (None, "none"):
            raise _contradiction(
                f"model.quantization is {self.quantization} but model.quantized is false: set quantized: true", *keys
            )
        if self.quantized and self.quantization == "none":
            raise _contradiction(
                "model.quantized is true but model.quantization is none: name fp16, bf16, int8 or auto", *keys
            )
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
    share_equal_texts: bool = Field(
        True, description="Compute equal texts of different requests once while they wait or run; needs `enabled`."
    )
    bulk_share: float = Field(
        0.1,
        ge=0.01,
        le=0.99,
        description="Of the model's work, for bulk texts that wait while interactive ones do; what these leave is "
        "theirs as well.",
    )
    max_queue_requests: int = Field(1024, ge=1, le=1_000_000, description="Accepted requests that may wait or run.")
    max_queue_tokens: int = Field(262_144, ge=256, le=100_000_000, description="Tokens that may wait in the queue.")


class CacheSettings(Section):
    max_mb: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Keep so many megabytes (10^6 bytes) of finished rows, and answer equal texts out of them; 0: "
        "none. Said in every title.",
    )


class ServerSettings(Section):
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 opens it to the network.")
    port: Port = Field(50051, description="gRPC port; 0 takes a free one.")
    workers: int = Field(
        1,
        ge=0,
        le=256,
        description="Processes that serve behind the two ports, each with a model and CPUs of its own; 0: one for each "
        "group of CPUs that share a last-level cache. More than one needs Linux.",
    )
    pin_workers: bool = Field(
        True,
        description="Give each of several workers CPUs that neither another one nor another server with workers has. "
        "False: the system places them, and each counts on its share.",
    )
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
    max_concurrent_streams: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Calls and streams at a time over one gRPC connection; a client keeps back what is more.",
    )
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        le=31_536_000,
        description="Ask gRPC clients to connect anew after so long (a tenth more or less), so that new replicas get "
        "calls; 0: never.",
    )
    max_connection_age_grace_s: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        description="How long calls and streams may go on over a connection of that age; then it is closed.",
    )
    hang_timeout_ms: int = Field(
        60_000,
        ge=100,
        le=86_400_000,
        description="The most that a batch may take before the engine hangs; less once it is known how long they take. "
        "With `model.process_per_stream` its process is started again, else the server ends with exit code 6.",
    )
    model_aliases: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        [], max_length=64, description="Further names under which requests may ask for the model."
    )
    accept_any_model: bool = Field(
        False, description="Answer whatever model a request names, for clients that cannot be told another."
    )
    limits: LimitSettings = Field(default_factory=LimitSettings)
    tls: TlsSettings = Field(default_factory=TlsSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
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
    cache: CacheSettings = Field(default_factory=CacheSettings)
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
        server, metrics = self.server, self.metrics
        if server.port and server.port == metrics.port:
            raise _contradiction(
                f"server.port and metrics.port are both {server.port}: give one of them another",
                *("server.port", "metrics.port"),
            )
        loopback = server.host in ("127.0.0.1", "localhost", "::1")
        if server.enable_test_faults and not loopback:
            raise _contradiction(
                "server.enable_test_faults needs server.host 127.0.0.1: faults are for tests only",
                *("server.enable_test_faults", "server.host"),
            )
        if server.enable_test_faults and self.model.backend != "fake":
            raise _contradiction(
                "server.enable_test_faults works with model.backend fake only",
                *("server.enable_test_faults", "model.backend"),
            )
        if bool(server.tls.cert) != bool(server.tls.key):
            lacking, other = ("key", "cert") if server.tls.cert else ("cert", "key")
            raise _contradiction(
                f"server.tls.{other} needs server.tls.{lacking}: name both files",
                *("server.tls.cert", "server.tls.key"),
            )
        if server.tls.client_ca and not server.tls.cert:
            raise _contradiction(
                "server.tls.client_ca needs server.tls.cert and server.tls.key: name all three files",
                *("server.tls.client_ca", "server.tls.cert"),
            )
        if not server.auth.open_reflection and not server.auth.keys_file:
            raise _contradiction(
                "server.auth.open_reflection is false without server.auth.keys_file: name the file of the keys",
                *("server.auth.open_reflection", "server.auth.keys_file"),
            )
        if server.max_message_bytes < server.max_text_bytes:
            raise _contradiction(
                "server.max_message_bytes is smaller than server.max_text_bytes: no such text could arrive",
                *("server.max_message_bytes", "server.max_text_bytes"),
            )
        return self


def load_settings(
    experiment: Path | None = None,
    *,
    legacy: Path | None = None,
    overrides: Sequence[str | Given] = (),
    variant: str = "",
    programs: Sequence[Given] = (),
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """The effective settings. ConfigError lists every problem with who brings the value, dotted path and remedy.

    `legacy` is a single file that stands alone; otherwise `experiment` overrides the base configuration.
    overrides: in order, `a.b=value` as of --set, or values that need no reading. programs: what the program that asks
    wants in place of the files, and the environment and overrides may change.
    """
    files = [legacy] if legacy is not None else [BASE_CONFIG, *filter(None, [experiment])]
    layers = [Layer(str(path), read_yaml(path)) for path in files]
    if variant:
        layers.append(_variant_layer(_merged(layers), str(files[-1]), variant))
    read = (parse_override(override) if isinstance(override, str) else override for override in overrides)
    for given in [*programs, *given_by(environment), *read]:
        layers.append(Layer(given.source, nested(given.key, given.value)))
    try:
        return Settings.model_validate(_merged(layers))
    except ValidationError as error:
        # What no layer says can only be missed, or be a key that YAML allows and we do not: the last file it is.
        raise ConfigError(_explain_all(error, layers, str(files[-1]))) from error


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = deep_merge(tree, layer.tree)
    return tree


def _variant_layer(tree: Mapping[str, Any], file: str, name: str) -> Layer:
    variants = tree.get("variants") or {}
    if not isinstance(variants, Mapping) or name not in variants:
        known = (", ".join(map(str, variants)) if isinstance(variants, Mapping) else "") or "none"
        raise ConfigError(f"{file}: no variant {name!r}; it has: {known}")
    if not isinstance(variants[name], Mapping):
        raise ConfigError(f"{file}: variants.{name}: expected dotted keys and values, not {variants[name]!r:.60}")
    changes: dict[str, Any] = {"variant": name}
    for dotted, value in variants[name].items():
        changes = deep_merge(changes, nested(str(dotted), value))
    return Layer(f"{file}, variant {name}", changes)


def _explain_all(error: ValidationError, layers: Sequence[Layer], otherwise: str) -> str:
    """Each problem behind the source of its value; neighbours of one source share its name."""
    told: list[str] = []
    before = ""
    for each in error.errors():
        paths = [key.split(".") for key in each.get("ctx", {}).get("keys", ())] or [each["loc"]]
        found = (next((layer.source for layer in reversed(layers) if layer.sets(path)), "") for path in paths)
        source = " and ".join(dict.fromkeys(filter(None, found))) or otherwise
        problem = _explain(each["loc"], each["type"], each["msg"], each["input"])
        told.append(problem if source == before else f"{source}: {problem}")
        before = source
    return "; ".join(told)


def _explain(loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    path = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        section: Any = Settings
        for part in loc[:-1]:
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(str(loc[-1]), list(section.model_fields), 1, 0.5)
        prefix = "".join(f"{part}." for part in loc[:-1])
        remedy = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(section.model_fields)}"
        return f"unknown key {path}; {remedy}"
    if kind == _CONTRADICTION:
        return message
    return f"{path}: {message[0].lower() + message[1:]}, not {value!r:.60}"


def setting_rows() -> list[tuple[str, Any, str]]:
    """(dotted key, default, description) of every leaf, in order: docs/settings.md lists them all."""
    return list(_leaves(Settings, ""))


def _leaves(section: type[Section], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.get_default(call_default_factory=True), field.description or ""
