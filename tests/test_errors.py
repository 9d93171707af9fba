import pytest

from jlora import errors

CODES = {
    errors.JloraError: 1,
    errors.ConfigError: 2,
    errors.DataError: 65,
    errors.DivergedError: 70,
    errors.OutputInUseError: 73,
    errors.StorageError: 74,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_exit_codes_match_the_contract(kind, code):
    assert kind("x").exit_code == code


def test_every_error_class_is_listed_here():
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)}
    assert classes == {*CODES, errors.StoppedError}


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_a_signal_is_added_to_128(signum, code):
    assert errors.StoppedError("stopped", signum=signum).exit_code == code


@pytest.mark.parametrize(
    ("where", "fix", "text"),
    [
        (None, None, "it broke"),
        ("a.yaml:3", None, "a.yaml:3: it broke"),
        (None, "mend it", "it broke\n  fix: mend it"),
        ("a.yaml:3", "mend it", "a.yaml:3: it broke\n  fix: mend it"),
    ],
)
def test_a_message_has_place_cause_and_remedy(where, fix, text):
    assert str(errors.DataError("it broke", where=where, fix=fix)) == text


def test_nearest_is_best_first_and_empty_when_nothing_is_close():
    assert errors.nearest("q_prj", ["o_proj", "q_proj", "gate"])[0] == "q_proj"
    assert errors.nearest("xyz", ["q_proj", "gate"]) == []
    assert errors.nearest("aa", ["aa", "aa", "ab"]) == ["aa", "ab"]


@pytest.mark.parametrize(
    ("word", "options", "want"),
    [
        ("foo", ["olmo2", "fp4", "opt"], []),
        ("optax.foo", ["optax.sgd", "optax.lion"], []),
        ("num_foo", ["num_proc"], []),
        ("train.jsonl", ["valid.jsonl", "trian.jsonl"], ["trian.jsonl"]),
        ("AdamW", ["adamw", "lion"], ["adamw"]),
        ("output-dir", ["output_dir"], ["output_dir"]),
        ("trian", ["train", "data"], ["train"]),
        ("epochs", ["num_train_epochs", "seed"], ["num_train_epochs"]),
        ("x", ["r"], []),
    ],
)
def test_only_what_is_near_is_suggested(word, options, want):
    """A part that names have in common (``optax.``, ``.jsonl``) does not make them alike."""
    assert errors.nearest(word, options) == want


def test_did_you_mean():
    assert errors.did_you_mean("q_prj", ["q_proj", "zzz"]) == "did you mean 'q_proj'?"
    assert errors.did_you_mean("xyz", ["q_proj"]) is None
    assert errors.did_you_mean("a_proj", ["q_proj", "k_proj"]).count("proj") == 2
