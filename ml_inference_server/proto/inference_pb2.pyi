from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Overflow(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERFLOW_UNSPECIFIED: _ClassVar[Overflow]
    OVERFLOW_CUT: _ClassVar[Overflow]
    OVERFLOW_CUT_LEFT: _ClassVar[Overflow]
    OVERFLOW_REFUSE: _ClassVar[Overflow]
    OVERFLOW_CHUNK: _ClassVar[Overflow]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_FLOAT32: _ClassVar[Encoding]
    ENCODING_FLOAT16: _ClassVar[Encoding]
    ENCODING_INT8: _ClassVar[Encoding]
    ENCODING_BINARY: _ClassVar[Encoding]
    ENCODING_UBINARY: _ClassVar[Encoding]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BULK: _ClassVar[Priority]
OVERFLOW_UNSPECIFIED: Overflow
OVERFLOW_CUT: Overflow
OVERFLOW_CUT_LEFT: Overflow
OVERFLOW_REFUSE: Overflow
OVERFLOW_CHUNK: Overflow
ENCODING_UNSPECIFIED: Encoding
ENCODING_FLOAT32: Encoding
ENCODING_FLOAT16: Encoding
ENCODING_INT8: Encoding
ENCODING_BINARY: Encoding
ENCODING_UBINARY: Encoding
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BULK: Priority

class Timing(_message.Message):
    __slots__ = ("tokenize_us", "queue_us", "compute_us", "total_us", "shared_texts", "cached_texts")
    TOKENIZE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    SHARED_TEXTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TEXTS_FIELD_NUMBER: _ClassVar[int]
    tokenize_us: int
    queue_us: int
    compute_us: int
    total_us: int
    shared_texts: int
    cached_texts: int
    def __init__(self, tokenize_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., total_us: _Optional[int] = ..., shared_texts: _Optional[int] = ..., cached_texts: _Optional[int] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("texts", "prompt_name", "truncate", "overflow", "input_type", "dimensions", "encoding", "expect_space_id", "model", "priority")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    INPUT_TYPE_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    EXPECT_SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    prompt_name: str
    truncate: bool
    overflow: Overflow
    input_type: str
    dimensions: int
    encoding: Encoding
    expect_space_id: str
    model: str
    priority: Priority
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., prompt_name: _Optional[str] = ..., truncate: _Optional[bool] = ..., overflow: _Optional[_Union[Overflow, str]] = ..., input_type: _Optional[str] = ..., dimensions: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., expect_space_id: _Optional[str] = ..., model: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("embeddings", "count", "dimension", "timing", "truncated", "token_counts", "truncated_rows", "used_token_counts", "space_id", "prompt_name", "encoding", "scales", "warnings")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_ROWS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    embeddings: bytes
    count: int
    dimension: int
    timing: Timing
    truncated: int
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    truncated_rows: _containers.RepeatedScalarFieldContainer[int]
    used_token_counts: _containers.RepeatedScalarFieldContainer[int]
    space_id: str
    prompt_name: str
    encoding: Encoding
    scales: _containers.RepeatedScalarFieldContainer[float]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, embeddings: _Optional[bytes] = ..., count: _Optional[int] = ..., dimension: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., truncated: _Optional[int] = ..., token_counts: _Optional[_Iterable[int]] = ..., truncated_rows: _Optional[_Iterable[int]] = ..., used_token_counts: _Optional[_Iterable[int]] = ..., space_id: _Optional[str] = ..., prompt_name: _Optional[str] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., scales: _Optional[_Iterable[float]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class EmbedStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: EmbedRequest
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[EmbedRequest, _Mapping]] = ...) -> None: ...

class EmbedStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    response: EmbedResponse
    error: StreamError
    def __init__(self, id: _Optional[int] = ..., response: _Optional[_Union[EmbedResponse, _Mapping]] = ..., error: _Optional[_Union[StreamError, _Mapping]] = ...) -> None: ...

class StreamError(_message.Message):
    __slots__ = ("code", "reason", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("query", "passage")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_FIELD_NUMBER: _ClassVar[int]
    query: str
    passage: str
    def __init__(self, query: _Optional[str] = ..., passage: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("pairs", "truncate", "overflow", "model", "priority")
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    pairs: _containers.RepeatedCompositeFieldContainer[Pair]
    truncate: bool
    overflow: Overflow
    model: str
    priority: Priority
    def __init__(self, pairs: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ..., truncate: _Optional[bool] = ..., overflow: _Optional[_Union[Overflow, str]] = ..., model: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scores", "timing", "truncated", "token_counts", "truncated_rows", "used_token_counts", "warnings")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_ROWS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    timing: Timing
    truncated: int
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    truncated_rows: _containers.RepeatedScalarFieldContainer[int]
    used_token_counts: _containers.RepeatedScalarFieldContainer[int]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, scores: _Optional[_Iterable[float]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., truncated: _Optional[int] = ..., token_counts: _Optional[_Iterable[int]] = ..., truncated_rows: _Optional[_Iterable[int]] = ..., used_token_counts: _Optional[_Iterable[int]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class RerankRequest(_message.Message):
    __slots__ = ("query", "documents", "top_k", "truncate", "overflow", "model", "max_document_tokens", "priority")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_DOCUMENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    query: str
    documents: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    truncate: bool
    overflow: Overflow
    model: str
    max_document_tokens: int
    priority: Priority
    def __init__(self, query: _Optional[str] = ..., documents: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., truncate: _Optional[bool] = ..., overflow: _Optional[_Union[Overflow, str]] = ..., model: _Optional[str] = ..., max_document_tokens: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("index", "score")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    index: int
    score: float
    def __init__(self, index: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class RerankResponse(_message.Message):
    __slots__ = ("ranks", "timing", "truncated", "token_counts", "truncated_rows", "used_token_counts", "warnings")
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_ROWS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    timing: Timing
    truncated: int
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    truncated_rows: _containers.RepeatedScalarFieldContainer[int]
    used_token_counts: _containers.RepeatedScalarFieldContainer[int]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., truncated: _Optional[int] = ..., token_counts: _Optional[_Iterable[int]] = ..., truncated_rows: _Optional[_Iterable[int]] = ..., used_token_counts: _Optional[_Iterable[int]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class GetMetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LatencyMs(_message.Message):
    __slots__ = ("avg", "p50", "p95", "p99")
    AVG_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    avg: float
    p50: float
    p95: float
    p99: float
    def __init__(self, avg: _Optional[float] = ..., p50: _Optional[float] = ..., p95: _Optional[float] = ..., p99: _Optional[float] = ...) -> None: ...

class GetMetricsResponse(_message.Message):
    __slots__ = ("window_s", "uptime_s", "requests_per_s", "texts_per_s", "pairs_per_s", "latency_ms", "mean_batch_size", "padding_share", "queue_texts", "queue_tokens", "cpu_percent", "rss_bytes", "gpu_memory_bytes", "requests_total", "errors_total", "requests_by_code")
    class RequestsByCodeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TEXTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PAIRS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    MEAN_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    PADDING_SHARE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TEXTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ERRORS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_BY_CODE_FIELD_NUMBER: _ClassVar[int]
    window_s: float
    uptime_s: float
    requests_per_s: float
    texts_per_s: float
    pairs_per_s: float
    latency_ms: LatencyMs
    mean_batch_size: float
    padding_share: float
    queue_texts: int
    queue_tokens: int
    cpu_percent: float
    rss_bytes: int
    gpu_memory_bytes: int
    requests_total: int
    errors_total: int
    requests_by_code: _containers.ScalarMap[str, int]
    def __init__(self, window_s: _Optional[float] = ..., uptime_s: _Optional[float] = ..., requests_per_s: _Optional[float] = ..., texts_per_s: _Optional[float] = ..., pairs_per_s: _Optional[float] = ..., latency_ms: _Optional[_Union[LatencyMs, _Mapping]] = ..., mean_batch_size: _Optional[float] = ..., padding_share: _Optional[float] = ..., queue_texts: _Optional[int] = ..., queue_tokens: _Optional[int] = ..., cpu_percent: _Optional[float] = ..., rss_bytes: _Optional[int] = ..., gpu_memory_bytes: _Optional[int] = ..., requests_total: _Optional[int] = ..., errors_total: _Optional[int] = ..., requests_by_code: _Optional[_Mapping[str, int]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Requested(_message.Message):
    __slots__ = ("model", "backend", "device", "quantization")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    backend: str
    device: str
    quantization: str
    def __init__(self, model: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class BackendInfo(_message.Message):
    __slots__ = ("backend", "model", "task", "device", "device_name", "dtype", "quantized_layers", "execution_provider", "instruction_set", "threads", "concurrency", "max_tokens", "dimension", "weights_sha256", "weights_file", "source", "parameters", "random_weights", "versions", "parity_mean", "parity_min", "compiled", "padding_free", "model_sha256", "similarity", "normalized")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_PROVIDER_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_SET_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FILE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    RANDOM_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PARITY_MEAN_FIELD_NUMBER: _ClassVar[int]
    PARITY_MIN_FIELD_NUMBER: _ClassVar[int]
    COMPILED_FIELD_NUMBER: _ClassVar[int]
    PADDING_FREE_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    NORMALIZED_FIELD_NUMBER: _ClassVar[int]
    backend: str
    model: str
    task: str
    device: str
    device_name: str
    dtype: str
    quantized_layers: int
    execution_provider: str
    instruction_set: str
    threads: int
    concurrency: int
    max_tokens: int
    dimension: int
    weights_sha256: str
    weights_file: str
    source: str
    parameters: int
    random_weights: bool
    versions: _containers.ScalarMap[str, str]
    parity_mean: float
    parity_min: float
    compiled: bool
    padding_free: bool
    model_sha256: str
    similarity: str
    normalized: bool
    def __init__(self, backend: _Optional[str] = ..., model: _Optional[str] = ..., task: _Optional[str] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., dtype: _Optional[str] = ..., quantized_layers: _Optional[int] = ..., execution_provider: _Optional[str] = ..., instruction_set: _Optional[str] = ..., threads: _Optional[int] = ..., concurrency: _Optional[int] = ..., max_tokens: _Optional[int] = ..., dimension: _Optional[int] = ..., weights_sha256: _Optional[str] = ..., weights_file: _Optional[str] = ..., source: _Optional[str] = ..., parameters: _Optional[int] = ..., random_weights: _Optional[bool] = ..., versions: _Optional[_Mapping[str, str]] = ..., parity_mean: _Optional[float] = ..., parity_min: _Optional[float] = ..., compiled: _Optional[bool] = ..., padding_free: _Optional[bool] = ..., model_sha256: _Optional[str] = ..., similarity: _Optional[str] = ..., normalized: _Optional[bool] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_version", "experiment", "variant", "requested", "resolved", "fallbacks", "title", "settings_json", "max_texts", "max_text_bytes", "max_message_bytes", "instance_id", "pid", "auto_choice", "space_ids", "models", "workers")
    class SpaceIdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    AUTO_CHOICE_FIELD_NUMBER: _ClassVar[int]
    SPACE_IDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    experiment: str
    variant: str
    requested: Requested
    resolved: BackendInfo
    fallbacks: _containers.RepeatedScalarFieldContainer[str]
    title: str
    settings_json: str
    max_texts: int
    max_text_bytes: int
    max_message_bytes: int
    instance_id: str
    pid: int
    auto_choice: str
    space_ids: _containers.ScalarMap[str, str]
    models: _containers.RepeatedScalarFieldContainer[str]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    def __init__(self, server_version: _Optional[str] = ..., experiment: _Optional[str] = ..., variant: _Optional[str] = ..., requested: _Optional[_Union[Requested, _Mapping]] = ..., resolved: _Optional[_Union[BackendInfo, _Mapping]] = ..., fallbacks: _Optional[_Iterable[str]] = ..., title: _Optional[str] = ..., settings_json: _Optional[str] = ..., max_texts: _Optional[int] = ..., max_text_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., instance_id: _Optional[str] = ..., pid: _Optional[int] = ..., auto_choice: _Optional[str] = ..., space_ids: _Optional[_Mapping[str, str]] = ..., models: _Optional[_Iterable[str]] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("index", "pid", "instance_id", "ready", "reason", "restarts", "cpus")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    index: int
    pid: int
    instance_id: str
    ready: bool
    reason: str
    restarts: int
    cpus: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., pid: _Optional[int] = ..., instance_id: _Optional[str] = ..., ready: _Optional[bool] = ..., reason: _Optional[str] = ..., restarts: _Optional[int] = ..., cpus: _Optional[_Iterable[int]] = ...) -> None: ...
