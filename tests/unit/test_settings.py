"""The settings tree, its loader and the shipped files."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ml_inference_server.utils.config import BASE_CONFIG, ModelSettings, Settings, load_settings, setting_rows
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.layers import (
    EXPERIMENTS_DIR,
    Given,
    command_to_repeat,
    deep_merge,
    parse_override,
    read_yaml,
)
from ml_inference_server.utils.yaml_text import parse_yaml

LEGACY = EXPERIMENTS_DIR.parent / "config.yaml"
EXPERIMENTS = sorted(path for path in EXPERIMENTS_DIR.glob("*.yaml") if path != BASE_CONFIG)


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, as `setting_rows` names them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "variants":
            flat |= {f"{key}.{leaf}": inner for leaf, inner in leaves(value).items()}
        else:
            flat[key] = value
    return flat


# What is shipped


def test_base_config_says_what_the_defaults_are() -> None:
    assert load_settings() == Settings()
    defaults = {key: value for key, value, _ in setting_rows()}
    assert leaves(read_yaml(BASE_CONFIG)).items() <= defaults.items()


def test_legacy_file_spells_out_every_key_with_its_default() -> None:
    flat = leaves(read_yaml(LEGACY))
    flat["variant"] = ""  # never in a file
    assert flat == {key: value for key, value, _ in setting_rows()}
    assert load_settings(legacy=LEGACY) == Settings()


def test_the_experiments_of_the_specification_are_there() -> None:
    asked = {"minilm_baseline": "none", "minilm_quantized": "fp16", "minilm_onnx": "none"}
    for name, quantization in asked.items():
        model = load_settings(EXPERIMENTS_DIR / f"{name}.yaml").model
        assert model.name == "sentence-transformers/all-MiniLM-L6-v2"
        assert (model.device, model.requested_quantization(model.device)) == ("mps", quantization)
        assert model.backend == ("onnx" if name == "minilm_onnx" else "pytorch")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_and_runs_anywhere(path: Path) -> None:
    settings = load_settings(path)
    assert settings.name == path.stem, "the results are named after the experiment"
    assert settings.description
    assert settings.model.allow_fallback or settings.model.device in ("auto", "cpu")
    for variant in settings.variants:
        assert load_settings(path, variant=variant).variant == variant


def test_dynamic_batching_variants_differ_in_nothing_else() -> None:
    path = EXPERIMENTS_DIR / "minilm_dynamic_batching.yaml"
    off, on = (load_settings(path, variant=name) for name in ("batching_off", "batching_on"))
    assert (off.batching.enabled, on.batching.enabled) == (False, True)
    assert off.model_copy(update={"batching": on.batching, "variant": on.variant}) == on


def test_every_setting_has_a_description() -> None:
    assert [key for key, _, description in setting_rows() if not description] == []


# Precedence


def test_each_layer_overrides_the_one_below(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: mine\nbatching: {max_batch_size: 16, timeout_ms: 1}\nexperiment: {batch_sizes: [2]}\n"
        "variants: {small: {batching.max_batch_size: 8, experiment.seed: 3}}\n",
    )
    plain = load_settings(path)
    assert (plain.batching.max_batch_size, plain.batching.timeout_ms, plain.experiment.seed) == (16, 1, 0)
    assert plain.experiment.batch_sizes == [2], "a list is replaced whole"
    assert plain.batching.enabled is True, "the base configuration shows through"
    small = load_settings(path, variant="small")
    assert (small.batching.max_batch_size, small.experiment.seed, small.variant) == (8, 3, "small")
    overrides = ["batching.max_batch_size=4", "experiment.batch_sizes=[1, 4]", "batching.max_batch_size=5"]
    told = load_settings(path, variant="small", overrides=overrides)
    assert (told.batching.max_batch_size, told.experiment.seed) == (5, 3), "the last --set wins"
    assert told.experiment.batch_sizes == [1, 4]


def test_the_environment_lies_above_files_and_below_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "batching: {max_batch_size: 16}\nvariants: {small: {batching.max_batch_size: 8}}\n")
    environment = {"MLIS_BATCHING__MAX_BATCH_SIZE": "4", "MLIS_EXPERIMENT__ARRIVAL__RATES": "[1, 2.5]"}
    given = load_settings(file, variant="small", environment=environment)
    assert (given.batching.max_batch_size, given.experiment.arrival.rates) == (4, [1.0, 2.5])
    over = ["batching.max_batch_size=2"]
    assert load_settings(file, overrides=over, environment=environment).batching.max_batch_size == 2
    assert load_settings(legacy=file, environment=environment).batching.max_batch_size == 4


def test_what_a_program_wants_lies_between_the_files_and_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "server: {port: 1}\nvariants: {v: {server.port: 2}}\n")
    free = [Given("server.port", 0, "the runner")]
    assert load_settings(file, variant="v", programs=free, environment={}).server.port == 0
    assert load_settings(file, programs=free, environment={"MLIS_SERVER__PORT": "3"}).server.port == 3
    assert load_settings(file, programs=free, overrides=["server.port=4"]).server.port == 4
    with pytest.raises(ConfigError, match="^the runner: server.port: "):
        load_settings(programs=[Given("server.port", -1, "the runner")])


def test_what_is_no_setting_in_the_environment_is_left_alone() -> None:
    """Kubernetes sets these for services called mlis and mlis-server; compose files set empty ones."""
    environment = {
        "MLIS_PORT": "tcp://10.0.0.1:50051",
        "MLIS_SERVER_PORT": "tcp://10.0.0.1:50051",
        "MLIS_SERVER_SERVICE_HOST": "10.0.0.1",
        "MLIS_CACHE_DIR": "/somewhere",
        "MLIS_MODEL__DEVICE": "",
        "HOSTNAME": "a1b2",
        "mlis_server__port": "1",
    }
    assert load_settings(environment=environment) == load_settings(environment={})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MLIS_SERVER__PROT", "1", "MLIS_SERVER__PROT=1: unknown key server.prot; did you mean server.port?"),
        (
            "MLIS_SERVER__PORT",
            "many",
            "MLIS_SERVER__PORT=many: server.port: input should be a valid integer, not 'many'",
        ),
        (
            "MLIS_SERVER__PORT",
            "8080",
            f"MLIS_SERVER__PORT=8080 and {BASE_CONFIG}: server.port and metrics.port are both",
        ),
        (
            "MLIS_MODEL__NAME",
            "a #b",
            "MLIS_MODEL__NAME=a #b: in YAML a comment begins at the #: put",
        ),
        ("MLIS_MODEL__", "x", "MLIS_MODEL__=x: unknown key model."),
        ("MLIS_SERVR__PORT", "1", "MLIS_SERVR__PORT=1: unknown key servr; did you mean server?"),
        (
            "MLIS_EXPERIMENT__ARRIVAL__RATS",
            "[1]",
            "MLIS_EXPERIMENT__ARRIVAL__RATS=[1]: unknown key experiment.arrival.rats; did you mean experiment",
        ),
        ("MLIS_SERVER__PORT__X", "1", "MLIS_SERVER__PORT__X=1: server.port: input should be a valid integer"),
    ],
)
def test_an_error_names_the_variable(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environment={name: value})
    assert str(caught.value).startswith(message)


def test_the_command_that_repeats_a_run_holds_its_environment() -> None:
    environment = {"MLIS_MODEL__DEVICE": "cpu", "MLIS_CACHE_DIR": "/x", "MLIS_MODEL__NAME": "a b"}
    line = command_to_repeat(["python", "x.py"], environment)
    assert line == "env MLIS_MODEL__DEVICE=cpu 'MLIS_MODEL__NAME=a b' python x.py"
    assert command_to_repeat(["python", "x.py"], {}) == "python x.py"


def test_legacy_file_stands_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "server: {port: 6000}\n")
    assert load_settings(legacy=path).server.port == 6000
    assert load_settings(legacy=path, overrides=["server.port=0"]).server.port == 0


def test_deep_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1, "c": [1, 2]}, "d": 4}, {"a": {"c": [3]}, "d": {"e": 5}}
    assert deep_merge(base, over) == {"a": {"b": 1, "c": [3]}, "d": {"e": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("batching.enabled=false", "batching.enabled", False),
        ("a.b=[1, 2]", "a.b", [1, 2]),
        ("a.b=x=y", "a.b", "x=y"),
        ("description=", "description", None),
        (" name =  two words ", "name", "two words"),
        ("model.name='a #b: c'", "model.name", "a #b: c"),
    ],
)
def test_override_values_are_read_as_yaml(text: str, key: str, value: Any) -> None:
    given = parse_override(text)
    assert (given.key, given.value) == (key, value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5e-3", 5e-4), ("-.5", -0.5), ("+1.e+2", 100.0), ("1.5e3", 1500.0),
        ("1e5000", math.inf), ("0.25", 0.25), ("12", 12), ("0x10", 16), ("1_000", 1000), (".inf", math.inf),
    ],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written_elsewhere(text: str, number: float) -> None:
    value = parse_yaml(text)
    assert (type(value), value) == (type(number), number)


@pytest.mark.parametrize("text", ["1.2.3", "v1e5", "1e5a", "e5", "2024-11-05", "1e", "1e-", ".", "1.0-rc1", "08"])
def test_versions_dates_and_names_stay_texts(text: str) -> None:
    assert parse_yaml(text) == text


def test_contradictions_are_looked_for_once_everything_is_merged(tmp_path: Path) -> None:
    swapped = [Given("server.port", 8080, "--port 8080"), Given("metrics.port", 9090, "--http-port 9090")]
    settings = load_settings(overrides=swapped)
    assert (settings.server.port, settings.metrics.port) == (8080, 9090)
    for order in (1, -1):
        precision = ["model.quantization=bf16", "model.quantized=true"][::order]
        assert load_settings(overrides=precision).model.precision == "bf16"
    file = write(tmp_path, "model: {quantized: true}\nvariants: {a: {model.quantization: int8, model.device: cpu}}\n")
    assert load_settings(file, variant="a").model.precision == "int8"
    repaired = write(tmp_path, "server: {port: 8080}\n", "port.yaml")
    assert load_settings(repaired, overrides=["metrics.port=0"]).server.port == 8080


def test_values_of_flags_are_taken_as_they_are() -> None:
    for name in ("2024-11-05", "a #b", "a: b", "1e5", "::", "null", "[1", "'", "{a: b}", "*x", "&x", "!x", "~", " x "):
        assert load_settings(overrides=[Given("model.name", name, "--model-name")]).model.name == name


def test_an_error_names_whoever_brought_the_value(tmp_path: Path) -> None:
    file = write(
        tmp_path, "batching: {max_batch_size: -1}\nvariants: {v: {server.port: 8080, batching.timeout_ms: -2}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_settings(
            file,
            variant="v",
            overrides=[
                "batching.max_queue_tokens=1",
                "experiment.batch_sizes=[0]",
                Given("model.device", "x", "--device x"),
            ],
        )
    told = str(caught.value)
    for source, path in (
        (f"{file}: ", "batching.max_batch_size: "),
        (f"{file}, variant v: ", "batching.timeout_ms: "),
        ("--set batching.max_queue_tokens=1: ", "batching.max_queue_tokens: "),
        ("--set experiment.batch_sizes=[0]: ", "experiment.batch_sizes.0: "),
        ("--device x: ", "model.device: "),
    ):
        assert source + path in told
    assert str(BASE_CONFIG) not in told


def test_a_contradiction_names_both_sides(tmp_path: Path) -> None:
    file = write(tmp_path, "server: {port: 9000}\n")
    with pytest.raises(ConfigError, match=f"^{file} and --http-port 9000: server.port and metrics.port are both 9000"):
        load_settings(file, overrides=[Given("metrics.port", 9000, "--http-port 9000")])


def test_merge_keys_work_and_keep_the_check_for_equal_keys(tmp_path: Path) -> None:
    fast = "variants:\n  a: &a {batching.max_batch_size: 8, experiment.seed: 1}\n"
    file = write(tmp_path, fast + "  b: {<<: *a, experiment.seed: 2}\n  c: {<<: [*a, {model.device: cpu}]}\n")
    b, c = load_settings(file, variant="b"), load_settings(file, variant="c")
    assert (b.batching.max_batch_size, b.experiment.seed) == (8, 2)
    assert (c.batching.max_batch_size, c.experiment.seed, c.model.device) == (8, 1, "cpu")


def test_a_number_that_no_value_holds_is_refused_and_a_date_that_there_is_not_is_a_name() -> None:
    with pytest.raises(ConfigError, match=r"^--set batching.timeout_ms=1e999: batching.timeout_ms: .*finite"):
        load_settings(overrides=["batching.timeout_ms=1e999"])
    assert load_settings(overrides=["model.name=2024-13-45"]).model.name == "2024-13-45"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().server.port = 1  # type: ignore[misc]


# Bad input: one clear sentence that names the place and the remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown key modle; did you mean model?"),
        ("batching: {max_batchsize: 3}", "unknown key batching.max_batchsize; did you mean batching.max_batch_size?"),
        ("metrics: {zzz: 3}", "unknown key metrics.zzz; known here: host, port, window_s"),
        ("batching: {max_batch_size: many}", "batching.max_batch_size: input should be a valid integer"),
        ("batching: {max_batch_size: 0}", "batching.max_batch_size: input should be greater than or equal to 1, not 0"),
        ("batching: {max_batch_size: true}", "batching.max_batch_size: input should be a valid integer, not True"),
        ('batching: {max_batch_size: "8"}', "batching.max_batch_size: input should be a valid integer, not '8'"),
        ("batching: {enabled: 1}", "batching.enabled: input should be a valid boolean, not 1"),
        ("batching: {timeout_ms: .nan}", "batching.timeout_ms: input should be a finite number"),
        ("batching: {timeout_ms: .inf}", "batching.timeout_ms"),
        ("batching: 7", "batching: "),
        ("experiment: {batch_sizes: []}", "experiment.batch_sizes: "),
        ("experiment: {batch_sizes: [1, 0]}", "experiment.batch_sizes.1: "),
        ("model: {device: tpu}", "model.device: input should be 'auto', 'cpu', 'cuda' or 'mps', not 'tpu'"),
        ("model: {quantization: fp16}", "set quantized: true"),
        ("model: {quantized: true, quantization: none}", "name fp16, bf16, int8 or auto"),
        ("name: ../../etc/passwd", "name: "),
        ("server: {port: 8080}", "server.port and metrics.port are both 8080"),
        ("server: {port: 65536}", "server.port: "),
        ("server: {enable_test_faults: true, host: 0.0.0.0}", "needs server.host 127.0.0.1"),
        ("server: {max_message_bytes: 65536}", "server.max_message_bytes is smaller"),
        ("experiment: {arrival: {rates: [0]}}", "experiment.arrival.rates.0: "),
        (
            "experiment: {arrival: {rate: 1}}",
            "unknown key experiment.arrival.rate; did you mean experiment.arrival.rates?",
        ),
        ("a: 1\nb: [", ":2: not valid YAML"),
        ("name: a\nname: b", ":2: not valid YAML: key 'name' stands twice"),
        ("model: {device: cpu, device: mps}", "key 'device' stands twice"),
        ("[1, 2]", "expected keys and values at the top, found list"),
        ("1: x", "mine.yaml: "),
        ("? [a]\n: 1", ":1: not valid YAML: found unhashable key"),
        ("name: \x00", "not valid YAML"),
        ("name: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("model: &m {x: *m}", "not valid YAML: found unconstructable recursive node"),
        ("<<: {name: a, name: b}", ":1: not valid YAML: key 'name' stands twice"),
        ("<<: {name: a}\n<<: {name: b}", ":2: not valid YAML: key '<<' stands twice"),
        ("a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}", ":2: not valid YAML: key 'b' stands twice"),
        ("<<: 7", "not valid YAML: expected a mapping or list of mappings for merging"),
        ("name: !!int many", "not valid YAML"),
        ("name: !!timestamp many", "not valid YAML"),
        ("name: !!bool many", "not valid YAML"),
        (f"experiment: {{seed: {'9' * 5000}}}", "not valid YAML"),
        ("name: 2024-11-05\nmodel: {name: 2024-11-05, backend: [2024-11-05]}", "model.backend: "),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batching\.max_batch_size.*; unknown key server\.prot.*server\.port"):
        load_settings(write(tmp_path, "batching: {max_batch_size: -1}\nserver: {prot: 1}\n"))


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"minilm_basline\.yaml: no such file; did you mean minilm_baseline\.yaml\?"):
        load_settings(tmp_path / "minilm_basline.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "latin.yaml")
    assert load_settings(write(tmp_path, "")) == Settings(), "an empty file overrides nothing"


@pytest.mark.parametrize(
    "text",
    [
        "novalue",
        "=3",
        "a..b=1",
        ".a=1",
        "server.port=[1",
        "server.port=high",
        "nope.x=1",
        "a={[b]: 1}",
        "model.name=a #b",
        "a=[1] #b",
        "a.b=::",
    ],
)
def test_a_bad_override_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set "):
        load_settings(overrides=[text])


def test_unknown_variant_lists_the_known_ones() -> None:
    path = EXPERIMENTS_DIR / "minilm_dynamic_batching.yaml"
    with pytest.raises(ConfigError, match="no variant 'on'; it has: batching_off, batching_on"):
        load_settings(path, variant="on")
    with pytest.raises(ConfigError, match="no variant 'on'; it has: none"):
        load_settings(variant="on")


def test_a_bad_variant_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "variants: {huge: {batching.max_batch_size: 1000000}}\n")
    with pytest.raises(ConfigError, match=r"variant huge: batching\.max_batch_size: "):
        load_settings(path, variant="huge")


@pytest.mark.parametrize(
    ("quantized", "quantization", "device", "asked"),
    [
        (False, None, "cpu", "none"),
        (False, "none", "mps", "none"),
        (True, None, "cpu", "int8"),
        (True, None, "mps", "fp16"),
        (True, "bf16", "cpu", "bf16"),
    ],
)
def test_requested_quantization(quantized: bool, quantization: Any, device: str, asked: str) -> None:
    assert ModelSettings(quantized=quantized, quantization=quantization).requested_quantization(device) == asked


def test_no_default_is_out_of_its_own_range() -> None:
    for section in (settings for settings in Settings() if hasattr(settings[1], "model_dump")):
        type(section[1]).model_validate(section[1].model_dump())
    assert math.isfinite(Settings().batching.timeout_ms)
