"""The words KNOB=VALUE of the command line, parsed by the type of the knob.

A knob that holds text takes the value as it was typed: numbers, `no`, `</s>`, accents, spaces, `=`,
`#` and parentheses stay what they are. Quotes around the whole value are removed. Everything else
follows Hydra's grammar: lists, tables, interpolations, and several values of a sweep.

Owns: parsing one word and its error. Does not own: the merge (`compose`), which sweeps exist.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from nemotron_train.compose.recipe_files import nearest
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.typed_values import knob_names, knob_type, typed_value

_WORD = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.DOTALL)


def parse_overrides(words: Sequence[str], schema: Any, sweeps: bool = False) -> list[Any]:
    """Parse overrides of the dataclass `schema` into Hydra's `Override` objects.

    sweeps: allow several values for a knob. Raises ConfigError for an argument that is not
    `KNOB=VALUE`, for the deletion of a knob, for an added knob that does not exist, and, unless
    `sweeps`, for several values.
    """
    return [_parse(word, schema, sweeps) for word in words]


def is_knob(word: str) -> bool:
    """Whether a word of a verb that takes runs and knobs is a knob: KNOB=VALUE, unless it is the
    path of a run folder, with or without @STEP."""
    return _WORD.fullmatch(word) is not None and not any(
        os.path.isdir(path) for path in (word, word.rpartition("@")[0]) if path
    )


def value_texts(override: Any, schema: Any) -> list[str]:
    """The values of an override as they are written after `KNOB=`: several for a sweep."""
    typed = override.input_line.partition("=")[2]
    if not override.is_sweep_override():
        return [typed]
    if knob_type(schema, override.key_or_group) is str and override.is_choice_sweep():
        values = override.value().list if hasattr(override.value(), "list") else []
        if len(values) == typed.count(",") + 1:  # no comma inside a value
            return [value.strip() for value in typed.split(",")]
    return list(override.sweep_string_iterator())


def _parse(word: str, schema: Any, sweeps: bool) -> Any:
    from hydra.core.override_parser.types import Override, OverrideType, ValueType

    match = _WORD.fullmatch(word)
    kind = knob_type(schema, match[2]) if match else None
    if match and match[1] and kind is None:
        # Without the value, which may be a secret.
        name, known = f"{match[1]}{match[2]}", knob_names(schema)
        raise ConfigError(f"{name}: there is no such knob{nearest(match[2], known)}")
    override, error = _by_grammar(word)
    if match and kind is str:
        is_sweep = override is not None and override.is_sweep_override()
        if not (sweeps and is_sweep):
            added = OverrideType.ADD if match[1] == "+" else OverrideType.CHANGE
            kind_of_change = OverrideType.FORCE_ADD if match[1] == "++" else added
            return Override(
                type=kind_of_change,
                key_or_group=match[2],
                value_type=ValueType.ELEMENT,
                _value=_text(match[3], override),
                input_line=word,
            )
    if override is None:
        raise ConfigError(f"{word!r} is no override KNOB=VALUE ({error})")
    if override.is_delete():
        raise ConfigError(f"{word}: a knob cannot be deleted; set it with KNOB=VALUE")
    if override.is_sweep_override():
        if not sweeps:
            raise ConfigError(
                f"{word}: several values at once are a sweep; give one value, or use "
                "`nemotron-train sweep`"
            )
        return override
    if match and kind is not None:
        texts, _ = _by_grammar(word, keep_texts=True)
        override._value = typed_value(kind, override.value(), texts.value())
    return override


def _text(typed: str, override: Any) -> str:
    """The text of a value: as it was typed, without quotes around the whole of it."""
    from hydra.core.override_parser.types import QuotedString

    value = override._value if override is not None else None
    return value.text if isinstance(value, QuotedString) else typed


def _by_grammar(word: str, keep_texts: bool = False) -> tuple[Any, str]:
    """Hydra's reading of a word, or None and the reason why there is none. keep_texts: every scalar
    is its source text."""
    from hydra.errors import HydraException

    parser = _text_parser() if keep_texts else _parser()
    try:
        return parser.parse_override(word), ""
    except HydraException as error:
        return None, str(error).splitlines()[0]


@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


@cache
def _text_parser() -> Any:
    """Hydra's parser with one difference: an unquoted scalar stays text."""
    from hydra.core.override_parser import overrides_parser
    from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
    from hydra.core.override_parser.types import QuotedString

    class TextVisitor(HydraOverrideVisitor):
        def visitPrimitive(self, ctx: Any) -> Any:
            value = super().visitPrimitive(ctx)
            return value if isinstance(value, str | QuotedString) else ctx.getText()

        def visitDictKey(self, ctx: Any) -> Any:
            value = super().visitDictKey(ctx)
            return value if isinstance(value, str | QuotedString) else ctx.getText()

    class TextParser(overrides_parser.OverridesParser):
        def parse_rule(self, s: str, rule_name: str) -> Any:
            # UPSTREAM(hydra-core 1.3): the parser builds its visitor by a name of its module.
            module: Any = overrides_parser
            module.HydraOverrideVisitor = TextVisitor
            try:
                return super().parse_rule(s, rule_name)
            finally:
                module.HydraOverrideVisitor = HydraOverrideVisitor

    return TextParser.create()
