"""Settings in today's words; old names are taken with a notice, and records keep them."""

from __future__ import annotations

import warnings

import pytest

from mosectl.editing.options import AUTO, EditOptions, default_options, options_from
from mosectl.editing.settings import RENAMED, WORDS
from mosectl.editing.targets import TargetOptions
from mosectl.errors import Notice, UsageError

OLD = {
    "insist": "2", "relax": "0.5", "aim": "1", "fisher": "0", "drop": "3", "sphere": "0", "reach": "1.5", "protect": "7",
    "rehearse": "0",
}  # fmt: skip
NOW = ["unreached_weight_growth=2", "preservation_decay=0.5", "placement=spread", "optimizer=adam", "nats_per_step=3"]
NOW += ["preserve_norm=0", "max_displacement=1.5", "previous_edit_weight=7", "replay_margin=0"]


def test_old_names_mean_what_todays_do() -> None:
    assert set(OLD) == set(RENAMED)
    with pytest.warns(Notice) as told:
        old = options_from([f"{name}={value}" for name, value in OLD.items()])
    assert len(told) == len(OLD) and "'relax' is called 'preservation_decay' now" in " ".join(
        str(w.message) for w in told
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert options_from(NOW) == old
    with pytest.warns(Notice, match="aim"):
        assert EditOptions(aim=0).placement == "per-layer"  # type: ignore[call-arg]
    with pytest.warns(Notice, match="fisher"):
        assert TargetOptions(fisher=0) == TargetOptions(optimizer="adam")  # type: ignore[call-arg]


def test_records_keep_the_names_of_format_1() -> None:
    record = default_options("mose").to_record()
    assert (record["relax"], record["aim"], record["targets"]["reach"], record["targets"]["fisher"]) == (
        0.8,
        -1,
        1.5,
        0,
    )
    assert not {*RENAMED.values()} & {*record, *record["targets"]}
    fields = set(vars(EditOptions())) | set(vars(TargetOptions()))
    assert set(RENAMED.values()) <= fields, "every new name is a field"


@pytest.mark.parametrize(
    "setting", ["placement=0", "placement=top", "optimizer=1", "optimizer=", "aim=7", "aim=x", "fisher=3"]
)
def test_what_is_no_choice_lists_the_choices(setting: str) -> None:
    with pytest.raises(UsageError) as e:
        options_from([setting])
    assert any(e.value.fix == f"choose one of: {', '.join(words)}" for words in WORDS.values())


@pytest.mark.parametrize(
    "setting", ["reach=-1", "max_displacement=nan", "relax=inf", "rounds=x", "steps=1.5", "=", "relax"]
)
def test_what_is_no_number_is_refused(setting: str) -> None:
    with pytest.raises(UsageError):
        options_from([setting])


@pytest.mark.parametrize("setting", AUTO)
def test_auto_is_as_if_it_were_not_given(setting: str) -> None:
    for method in ("isospectral", "alphaedit"):
        assert options_from([setting], method=method) == options_from([], method=method)
    for no_number in (setting.replace("auto", "Auto"), "preserve=auto"):
        with pytest.raises(UsageError, match=r"not a (whole )?number"):
            options_from([no_number])


@pytest.mark.parametrize(
    ("method", "setting", "what", "fix"),
    [
        ("isospectral", "rank=abc", "not a whole number", "rank=1"),
        ("isospectral", "rank=0.5", "not a whole number", "rank=1"),
        ("oft", "blocks=2.5", "not a whole number", "blocks=1"),
        ("isospectral", "steps=abc", "not a whole number", "steps=1"),
        ("isospectral", "preserve=abc", "not a number", "preserve=0.5"),
        ("isospectral", f"rank=1{'0' * 400}", "out of range", "nor that large"),
    ],
)
def test_a_whole_number_is_advised_where_one_is_asked(method: str, setting: str, what: str, fix: str) -> None:
    with pytest.raises(UsageError, match=what) as e:
        options_from([setting], method=method)
    assert e.value.fix.endswith(fix)


def test_a_methods_whole_numbers_are_recorded_as_before() -> None:
    assert repr(dict(options_from(["rank=5", "preserve=2"]).solver)) == "{'rank': 5.0, 'preserve': 2.0}"


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("fact_tokn=subject_last", "fact_token"),
        ("presreve=2", "preserve"),
        ("optimiser=adam", "optimizer"),
        ("rehears=1", "replay_margin"),
        ("zzz=yes", None),
        ("", None),
    ],
)
def test_an_unknown_name_is_told_before_its_value_with_the_nearest(setting: str, meant: str | None) -> None:
    with pytest.raises(UsageError, match="'isospectral' has no such setting") as refused:
        options_from([setting], method="isospectral")
    assert refused.value.fix.startswith(f"did you mean {meant}? it has: " if meant else "it has: ")


def test_no_setting_is_meant_that_a_method_does_not_take() -> None:
    with pytest.raises(UsageError, match="no such setting") as refused:
        options_from(["fact_tokn=last"], method="horse")
    assert "fact_token" not in refused.value.fix
