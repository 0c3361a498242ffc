"""KNOB=VALUE as people type it."""

import pytest

from nemotron_train.compose.compose import compose_config, to_typed
from nemotron_train.compose.overrides import is_knob, parse_overrides
from nemotron_train.config.errors import ConfigError
from nemotron_train.data.prepare import PrepareConfig
from nemotron_train.evaluate.knobs import HarnessConfig

TEXTS = ["2024_01_05", "1.10", "1e3", "012345", "no", "null", "4:00:00", "</s>", "données"]
TEXTS += ["my books (1)", "k=v", "a#b", "c&d", "it's", "a,b", "x[1]", "me@home", "100%", "~/data"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_typed(text: str) -> None:
    config = to_typed(
        PrepareConfig,
        {},
        parse_overrides([f"input={text}", "output=o", f"tokenizer={text}"], PrepareConfig),
    )
    assert config.input == config.tokenizer == text


@pytest.mark.parametrize("form", ['"{}"', "'{}'"])
def test_quotes_around_the_whole_value_go(form: str) -> None:
    word = "input=" + form.format("</s> and more")
    [override] = parse_overrides([word], PrepareConfig)
    assert override.value() == "</s> and more"


def test_text_in_lists_and_tables() -> None:
    [override] = parse_overrides(["tasks=[1.10,no,'a b',2024_01]"], HarnessConfig)
    assert override.value() == ["1.10", "no", "a b", "2024_01"]


@pytest.mark.parametrize("text", ["2e6", "2_000_000", "2000000", "2.0e6"])
def test_whole_numbers_in_any_spelling(text: str) -> None:
    assert compose_config([f"train.total_tokens={text}"]).train.total_tokens == 2_000_000


def test_a_number_that_is_not_whole_is_quoted_in_the_message() -> None:
    with pytest.raises(ConfigError, match=r"train\.total_tokens=2\.5"):
        compose_config(["train.total_tokens=2.5"])


@pytest.mark.parametrize("word", ["+trian.total_tokens=1e6", "+foo=1", "++foo=1", "+train.foo=1"])
def test_an_added_knob_must_exist(word: str) -> None:
    with pytest.raises(ConfigError, match="there is no such knob"):
        compose_config([word])


def test_the_message_of_an_unknown_knob_does_not_repeat_its_value() -> None:
    """It may be a key that was put where it does not belong."""
    with pytest.raises(ConfigError, match=r"\+logging\.wandb_api_key: there is no") as caught:
        compose_config(["+logging.wandb_api_key=0123456789abcdef"])
    assert "0123456789abcdef" not in str(caught.value)


def test_an_entry_of_a_table_is_added() -> None:
    rule = "+precision.rules.mine={match: '*.in_proj', format: bf16}"
    config = compose_config(["precision=nvfp4_all", rule])
    assert config.precision.rules["mine"].match == "*.in_proj"


def test_a_folder_with_an_equals_sign_is_no_knob(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    from pathlib import Path

    Path("lr=1e-3/run").mkdir(parents=True)
    assert not is_knob("lr=1e-3/run") and not is_knob("lr=1e-3/run@100")
    assert is_knob("temperature=0")
