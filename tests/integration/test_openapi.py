"""GET /openapi.json is a sound description, and it describes what the server does."""

import jsonschema
from openapi_spec_validator import validate

from tests.integration.http_kit import http_client


async def test_the_description_is_valid_and_lists_every_dialect() -> None:
    async with http_client() as client:
        reply = await client.get("/openapi.json")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    validate(reply.json)
    assert {"OpenAI", "Cohere", "TEI", "Open Inference"} <= {tag["name"] for tag in reply.json["tags"]}
    assert "post" in reply.json["paths"]["/v1/embeddings"]


async def test_every_example_fits_its_own_schema_and_is_answered() -> None:
    """The page fills them in: they must work as they stand."""
    async with http_client(server={"accept_any_model": True}) as client:
        api = (await client.get("/openapi.json")).json
        tried = 0
        for path, methods in api["paths"].items():
            content = methods.get("post", {}).get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            for each in schema.get("anyOf", [schema] if schema else []):
                name = each["$ref"].rpartition("/")[2]
                example = api["components"]["schemas"][name]["example"]
                whole = {"components": api["components"], **each}
                jsonschema.Draft202012Validator(whole).validate(example)
                if name not in ("TeiPredictRequest", "TeiDecodeRequest"):  # of cross-encoders, of a real vocabulary
                    reply = await client.post(path.replace("{version}", "1"), example)
                    assert reply.status == 200, (path, reply.body)
                    tried += 1
        assert tried >= 8


async def test_every_error_has_the_described_form() -> None:
    async with http_client() as client:
        api = (await client.get("/openapi.json")).json
        for path, methods in api["paths"].items():
            if "post" not in methods or "{" in path:
                continue
            reply = await client.send(path, b"[]")
            described = methods["post"]["responses"][str(reply.status)]["content"]["application/json"]["schema"]
            whole = {"components": api["components"], **described}
            jsonschema.Draft202012Validator(whole).validate(reply.json)
