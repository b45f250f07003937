"""Fields that several dialects share, told apart by hand: a union's own errors name none of what is wrong."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SkipValidation, WithJsonSchema
from pydantic_core import PydanticCustomError

_REFUSED_IDS = (
    "token ids are refused, as another tokenizer than this model's may have made them: send the text itself as a string"
)
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}


def is_token_ids(value: Any) -> bool:
    """[1, 2], or [[1, 2], [3]]: judged by its first item, as a list that begins so cannot be a list of texts."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise PydanticCustomError("texts", "a list of strings is needed, not {what}", {"what": json_type(value)})
    for place, each in enumerate(value):
        if not isinstance(each, str):
            if is_token_ids(each):
                raise PydanticCustomError("token_ids", _REFUSED_IDS)
            context = {"place": place, "what": json_type(each)}
            raise PydanticCustomError("texts", "item {place} must be a string, not {what}", context)
    return value


def _one_or_more(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        context = {"what": json_type(value)}
        raise PydanticCustomError("texts", "a string or a list of strings is needed, not {what}", context)
    return _texts(value)


def json_type(value: Any) -> str:
    """What JSON calls it, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "something else")


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "not valid Unicode (a lone surrogate)") from None
    return value


Echoed = Annotated[str, AfterValidator(_unicode)]
"""A string that stands in the answer again; a lone surrogate could not be written there."""

JsonKey = Annotated[str, SkipValidation]
"""What a key always is. Pydantic would collect an error for each lone surrogate."""

# What stands in a list was looked at above, up to the first item that is wrong.
_Listed = list[Annotated[str, SkipValidation]]

Texts = Annotated[_Listed, BeforeValidator(_texts), WithJsonSchema(_TEXTS)]
"""A list of strings. Token ids are refused with a sentence."""

OneOrMoreTexts = Annotated[_Listed, BeforeValidator(_one_or_more), WithJsonSchema({"anyOf": [_TEXT, _TEXTS]})]
"""A string or a list of strings, as a list. Token ids are refused with a sentence."""
