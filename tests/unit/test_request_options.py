"""What a request may ask beside its texts: roles, names, the space, and smaller forms of a vector."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sentence_transformers.util.quantization import quantize_embeddings

from ml_inference_server.backends.base import BackendInfo, TextTokenizer
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.server.encodings import Encoding, bytes_per_vector, encode_rows
from ml_inference_server.server.names import ModelNames
from ml_inference_server.server.roles import prompt_for
from ml_inference_server.server.similarity import probability
from ml_inference_server.server.space import Spaces, spaces_of
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import InvalidRequest, ModelNotFound

E5 = {"query": "query: ", "passage": "passage: "}
ROLES = ("query", "search_query", "retrieval.query")


@pytest.mark.parametrize("role", ROLES)
def test_every_word_for_a_query_chooses_the_models_own_prompt(role: str) -> None:
    assert prompt_for(role, E5) == ("query", "")


@pytest.mark.parametrize("role", ["document", "search_document", "retrieval.passage", "passage"])
def test_every_word_for_a_document_chooses_the_models_own_prompt(role: str) -> None:
    assert prompt_for(role, E5) == ("passage", "")
    assert prompt_for(role, {"document": "d: ", "passage": "p: "}).prompt_name in ("document", "passage")


@pytest.mark.parametrize("role", [*ROLES, "classification", "clustering"])
def test_a_model_without_prompts_takes_a_role_and_says_that_it_changes_nothing(role: str) -> None:
    chosen = prompt_for(role, {})
    assert chosen.prompt_name is None
    assert f"the role {role}" in chosen.warning
    assert "changes nothing" in chosen.warning


def test_a_role_without_its_prompt_names_the_prompts_that_there_are() -> None:
    assert "topic" in prompt_for("query", {"topic": "about: "}).warning


@pytest.mark.parametrize("role", ["image", "QUERY ", "", "\n"])
def test_another_word_is_no_role(role: str) -> None:
    with pytest.raises(InvalidRequest, match="input_type: no such role; there are: "):
        prompt_for(role, E5)


def is_query(role: str) -> bool:
    return role == "query"


NAMES = ModelNames("/srv/models/minilm", ["sentence-transformers/all-MiniLM-L6-v2", "text-embedding-3-small"])


@pytest.mark.parametrize(
    "name",
    [
        "",
        "minilm",
        "/srv/models/minilm",
        "all-MiniLM-L6-v2",
        "sentence-transformers/all-minilm-l6-v2",
        "text-embedding-3-small",
    ],
)
def test_a_model_is_known_by_each_of_its_names(name: str) -> None:
    assert NAMES.check(name, is_query) == ""


def test_a_name_may_carry_a_role() -> None:
    assert NAMES.check("minilm:query", is_query) == "query"
    assert ModelNames("fake:base_ms=2").check("fake:base_ms=2", is_query) == ""


@pytest.mark.parametrize(
    "name", ["gpt-4", "minilm2", "srv", "models/minilm", ":", "../minilm", "minilm:a:b", "minilm:latest", "\x00"]
)
def test_another_name_is_refused_with_those_that_exist_and_without_the_servers_folders(name: str) -> None:
    with pytest.raises(ModelNotFound) as error:
        NAMES.check(name, is_query)
    served = "minilm, sentence-transformers/all-MiniLM-L6-v2, text-embedding-3-small"
    assert str(error.value) == f"no such model is served here; served: {served}"


def test_a_server_may_answer_to_any_name() -> None:
    names = ModelNames("minilm", accept_any=True)
    assert (names.check("gpt-4:query", is_query), names.check("minilm:query", is_query)) == ("", "query")


def info(**changes: Any) -> BackendInfo:
    backend = FakeBackend(ModelSettings.model_validate({"backend": "fake", "name": "fake"}))
    backend.load_model()
    values = {field: getattr(backend.info, field) for field in BackendInfo.__dataclass_fields__}
    return BackendInfo(**(values | changes))


def fake_tokenizer(max_tokens: int = 256) -> TextTokenizer:
    model = ModelSettings.model_validate({"backend": "fake", "name": "fake", "max_tokens": max_tokens})
    backend = FakeBackend(model)
    backend.load_model()
    return backend.tokenizer


def test_a_space_id_is_16_hex_digits_and_the_same_in_every_process() -> None:
    spaces = Spaces("model", 256, {"": "0:", "query": "0:query: "})
    assert spaces.id(None, 384) == "7bfe7f7f32a38c50"
    assert set(spaces.all(384)) == {"", "query"}
    assert len(set(spaces.all(384).values())) == 2


def test_whatever_decides_which_vector_a_text_gets_changes_its_space() -> None:
    def space(dimension: int = 8, max_tokens: int = 256, **changes: Any) -> str:
        given_info = info(max_tokens=max_tokens, **changes)
        return spaces_of(given_info, fake_tokenizer(max_tokens)).id(None, dimension)

    base: dict[str, Any] = {"model_sha256": "aa", "weights_sha256": "bb"}
    changed = [
        space(**base),
        space(**(base | {"model_sha256": "ac"})),
        space(**(base | {"weights_sha256": "bc"})),
        space(**(base | {"random_weights": True})),
        space(**base, max_tokens=128),
        space(4, **base),
    ]
    assert len(set(changed)) == len(changed)


def test_precision_and_engine_leave_the_space_as_it_is() -> None:
    tokenizer = fake_tokenizer()
    ids = {
        spaces_of(info(model_sha256="aa", weights_sha256="bb", **changes), tokenizer).id(None, 8)
        for changes in ({}, {"dtype": "int8", "quantized_layers": 9}, {"backend": "onnx"}, {"device": "cuda"})
    }
    assert len(ids) == 1


VECTORS = arrays(np.float32, (3, 20), elements=st.floats(-1000, 1000, width=32))


@given(VECTORS)
def test_int8_with_its_scale_is_within_half_a_step(values: np.ndarray) -> None:
    rows, scales = encode_rows(values, Encoding.INT8)
    assert rows.dtype == np.int8
    assert scales is not None
    assert (np.abs(rows * scales[:, None] - values) <= 0.51 * scales[:, None] + 1e-6).all()


@given(VECTORS)
def test_binary_is_what_sentence_transformers_packs(values: np.ndarray) -> None:
    binary, ubinary = quantize_embeddings(values, "binary"), quantize_embeddings(values, "ubinary")
    np.testing.assert_array_equal(encode_rows(values, Encoding.BINARY).rows, binary)
    np.testing.assert_array_equal(encode_rows(values, Encoding.UBINARY).rows, ubinary)


@given(VECTORS, st.sampled_from(list(Encoding)))
def test_a_vector_takes_as_many_bytes_as_is_said(values: np.ndarray, encoding: Encoding) -> None:
    rows, scales = encode_rows(values, encoding)
    assert len(rows.tobytes()) + (0 if scales is None else 12) == 3 * bytes_per_vector(20, encoding)


def test_a_number_beyond_float16_is_its_largest_and_zeros_stay_zeros() -> None:
    assert encode_rows(np.array([[1e6, -1e6]], np.float32), Encoding.FLOAT16).rows.tolist() == [[65504, -65504]]
    assert encode_rows(np.zeros((1, 4), np.float32), Encoding.INT8).rows.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan", "logit"])
def test_a_score_from_0_to_1_keeps_the_order(similarity: str) -> None:
    raw = {"cosine": [-1, -0.5, 0, 1], "dot": [-9, 0, 3, 90], "logit": [-500, -11, 0, 12]}
    scores = np.array(raw.get(similarity, [-1e6, -3, -0.5, 0]), np.float32)
    found = probability(similarity, scores)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (np.diff(found) >= 0).all()
    assert len(set(found.tolist())) >= 3
