"""Is the answer JSON, and does it keep to a schema?"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from config.declaration import Fraction, declared, option
from config.errors import InvalidConfigurationError
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, quoted
from rewards.tags import PRESETS, Tags
from rewards.text_utils import fenced_block


@register("json_schema", "json_validity", "valid_json")
@declared
class JsonSchema(RowReward):
    """1 for JSON that keeps to the schema, ``invalid_score`` for JSON that does not, 0 for no JSON.

    Read is the answer (what follows the thinking): the contents of its first block fenced as json, else all of it.
    Without a schema any JSON scores 1. A row's own schema, in its column ``json_schema`` or in its ``meta``, goes
    before the configured one; it is a JSON Schema (draft 2020-12 where it does not say), given as a mapping or as
    text. NaN and Infinity are no JSON. References to other documents are never fetched.

    A schema needs ``pip install jsonschema``.
    """

    reward_name: ClassVar[str] = "json_schema"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    schema: dict[str, Any] | None = option(default=None, meaning="The JSON Schema; none = any JSON.")
    invalid_score: Fraction = option(default=0.5, meaning="What JSON is worth that breaks the schema.")

    def prepare(self) -> None:
        """Refuse a schema that is none, or the lack of the library that reads it."""
        if self.schema is not None:
            _validator(json.dumps(self.schema, sort_keys=True))

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        answer = row.answer(self.tags)
        block = fenced_block(answer, "json")
        try:
            found = json.loads(answer if block is None else block, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return Judgement(0.0, {"no JSON": f"{error}", "answer": quoted(answer)})
        schema = row.field("json_schema", self.schema)
        if schema is None:
            return Judgement(1.0, {"JSON": type(found).__name__, "schema": "none"})
        schema = schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True)
        try:
            problem = next(iter(_validator(schema).iter_errors(found)), None)
        except RecursionError:
            return Judgement(0.0, {"no JSON": "nested too deeply"})
        if problem is not None:
            place = problem.json_path
            return Judgement(
                self.invalid_score, {"breaks the schema at": place, "because": quoted(problem.message)}
            )
        return Judgement(1.0, {"JSON": type(found).__name__, "schema": "kept"})


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry
    except ImportError as error:
        raise InvalidConfigurationError(
            "json_schema: the library jsonschema is not installed; pip install jsonschema brings it"
        ) from error
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, (Mapping, bool)):
            raise ValueError(f"a mapping is expected, found {type(parsed).__name__}")
        kind = validator_for(parsed, default=Draft202012Validator)
        kind.check_schema(parsed)
    except (ValueError, SchemaError) as error:
        reason = getattr(error, "message", str(error))
        raise InvalidConfigurationError(
            f"json_schema: the schema {quoted(schema)} is none ({reason})"
        ) from None
    return kind(parsed, registry=Registry())  # an empty registry: nothing is fetched
