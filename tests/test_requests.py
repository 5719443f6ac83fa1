"""Requests of every kind, at the command line and in Python: each is either met or refused in one clear line."""

import contextlib
import io
from dataclasses import fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import s6lib.__main__
import s6lib.lab.launch
import s6lib.lab.workers
from s6lib.errors import StudyError
from s6lib.recipes import ALL_CONDITIONS, CONTROL, PLAIN, RECIPES, Condition

WORDS = st.one_of(
    st.sampled_from(
        ["", "-", "--", "0", "-1", "1", "2.5", "1e9", "999999999", "63", "65", "70000", "nan", "inf", "\u0661"]
    ),
    st.sampled_from([*ALL_CONDITIONS, *RECIPES, "gnb", "GBN", "..", "../plain", "auto", "cpu", "cuda", "dask://h:1"]),
    st.text(max_size=8),
)
OPTIONS = st.sampled_from(
    [
        "--recipe",
        "--conditions",
        "--seeds",
        "--epochs",
        "--train-images",
        "--out",
        "--jobs",
        "--device",
        "--cluster",
        "--images",
        "--study",
        "--help",
        "-x",
    ]
)
COMMANDS = st.one_of(st.just(["run"]), st.just(["report"]), st.just([]), st.lists(WORDS, max_size=1))


@settings(max_examples=600)
@given(COMMANDS, st.lists(st.one_of(st.tuples(OPTIONS, WORDS), st.tuples(WORDS)), max_size=4))
@example(["run"], [("--epochs", "999999999999999999999")])
@example(["run"], [("--seeds", "1"), ("--seeds", "1")])
def test_every_command_line_ends_with_an_exit_code_and_a_line(command, options):
    asked = []

    def study_not_run(recipe, conditions, seeds, out, **kwargs):
        asked.append((recipe, conditions, seeds))
        raise StudyError("not run")

    argv = [*command, *(word for option in options for word in option)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(s6lib.lab.launch, "run_study", study_not_run)
        patch.setattr(s6lib.lab.workers, "dask_executor", lambda scheduler: contextlib.nullcontext())
        try:
            code = s6lib.__main__.main(argv)
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 1, 2)
    if code == 0:
        assert "usage:" in out.getvalue()
    else:
        assert err.getvalue().strip()
        assert "Traceback" not in err.getvalue()
    for recipe, conditions, seeds in asked:
        assert recipe.epochs >= 1
        assert 1 <= recipe.train_images <= 60_000
        assert conditions
        assert all(seed >= 0 for seed in seeds)


# No subnormal numbers: some versions of torch.compile switch them off for the whole process.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_subnormal=False),
    st.text(max_size=5),
    st.just([]),
    st.just(60_001),
    st.just(-1),
)


@settings(max_examples=600)
@given(st.sampled_from([PLAIN, CONTROL]), st.data())
def test_every_field_is_sound_or_refused_by_name(thing, data):
    name = data.draw(st.sampled_from([field.name for field in fields(thing)]))
    value = data.draw(VALUES)
    made = refusal = None
    try:
        made = replace(thing, **{name: value})
    except ValueError as error:
        refusal = str(error)
    if made is None:
        assert refusal.startswith(f"{name} must be ")
        assert refusal.endswith(f"not {value!r}")
    else:
        default = {"label": getattr(thing, "slug", None), "train_images": 60_000} if value in ("", None) else {}
        assert getattr(made, name) == default.get(name, value)
        assert hash(made) is not None
        if isinstance(made, Condition):
            assert made.l1 >= 0
            assert made.l2 >= 0
        else:
            assert all(
                min(replace(made, passes=1).learning_rates(epoch)) >= 0 for epoch in (1, min(made.epochs, 10**4))
            )
