"""Several adapters over one base in one run: each is what it would be alone."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_runs import ADAPTER, Place

import jlora
from jlora import cli, config
from jlora.errors import ConfigError
from jlora.ui import metrics_log

TRAIN = {
    "max_steps": 5,
    "logging_steps": 1,
    "eval_steps": None,
    "save_steps": None,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.05,
    "adam_epsilon": 1e-4,
}
"""The first moments' elements that are only rounding do not count: Adam would make them 1."""

LORA = {"target_modules": ["q_proj", "down_proj"]}
NAMES = ("up", "down")


def sources(place, only=None):
    """Train and eval sources of two adapters: other rows, of which one has few."""
    rows = place.rows.read_text().splitlines(keepends=True)
    files = {"up": rows[:20], "down": rows[20:24]}
    found = []
    for name, lines in files.items():
        path = place.folder / f"{name}.jsonl"
        path.write_text("".join(lines))
        source = {"path": str(path), "format": "messages"}
        if only is None:
            found.append(source | {"adapter": name})
        elif only == name:
            found.append(source)
    return {"train": found, "eval": [dict(source) for source in found], "max_length": 48}


def settings(place, only=None, **train):
    out = str(place.folder / (only or "together"))
    return {
        "lora": LORA,
        "data": sources(place, only),
        "train": TRAIN | {"output_dir": out} | train,
        "evaluate": {"samples": 0, "max_new_tokens": 2},
    }


def run(place, only=None, *overrides, devices=1, **train):
    """The run's lines and the folder it wrote."""
    wanted = settings(place, only, **train)
    place.run(*overrides, devices=devices, **wanted)
    out = Path(wanted["train"]["output_dir"])
    return metrics_log.read_metrics(out / "metrics.jsonl"), out


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_base, tiny_cache):
    return Place(tmp_path_factory.mktemp("several"), tiny_base, tiny_cache)


@pytest.fixture(scope="module")
def together(here):
    return run(here, None, "evaluate.samples=1", save_steps=3)


@pytest.mark.slow
def test_activation_offloading_changes_nothing(here, together):
    out = str(here.folder / "offloading")
    lines, _ = run(here, None, activation_offloading=True, output_dir=out)
    got, want = ([line["loss"] for line in each if "loss" in line] for each in (lines, together[0]))
    assert got == want and len(got) == 5


@pytest.mark.parametrize("name", NAMES)
def test_each_adapter_is_what_it_is_alone(here, together, name):
    """Losses and weights, with dropout, clipping and accumulation; evaluation too."""
    (lines, out), (alone, folder) = together, run(here, name)
    actual, expected = load_file(out / name / ADAPTER), load_file(folder / ADAPTER)
    assert set(actual) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, atol=1e-5, err_msg=key)
    for key, other in (("loss", f"loss/{name}"), ("eval_loss", f"eval_loss/{name}")):
        got = [line[other] for line in lines if other in line]
        want = [line[key] for line in alone if key in line]
        assert len(want) == (5 if key == "loss" else 1)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_runs_loss_is_over_all_tokens_and_the_adapters_differ(together):
    lines, out = together
    first = next(line for line in lines if "loss" in line)
    assert min(first["loss/up"], first["loss/down"]) < first["loss"]
    assert first["loss"] < max(first["loss/up"], first["loss/down"])
    up, down = (load_file(out / name / ADAPTER) for name in NAMES)
    assert any(np.abs(up[key] - down[key]).max() > 1e-3 for key in up)


def test_each_folder_is_a_run_of_its_own(together):
    """It is what jlora evaluate, generate and merge take."""
    _, out = together
    down_settings = config.load(out / "down")
    assert down_settings.adapters == () and down_settings.train.output_dir == str(out / "down")
    assert [s.path for s in down_settings.data.train] == [str(out.parent / "down.jsonl")]
    assert (out / "down" / "tokenizer.json").is_file()


def test_on_two_devices(here, together):
    """Half as many rows a device: the same rows a step, in another order of summation."""
    changed = {"per_device_train_batch_size": 1, "output_dir": str(here.folder / "split")}
    lines, split = run(here, None, "data.eval=[]", devices=2, **changed)
    for name in NAMES:
        actual, expected = (load_file(out / name / ADAPTER) for out in (together[1], split))
        for key, value in actual.items():
            np.testing.assert_allclose(expected[key], value, atol=1e-5, err_msg=key)
        losses = [[line[f"loss/{name}"] for line in run[:5]] for run in (together[0], lines)]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_resuming_is_bitwise(here, together):
    """From the checkpoint of step 3 a run goes on to the same adapters."""
    _, out = together
    again = {"output_dir": str(here.folder / "resumed"), "resume": str(out / "checkpoints" / "3")}
    _, resumed = run(here, None, "data.eval=[]", **again)
    for name in NAMES:
        assert (resumed / name / ADAPTER).read_bytes() == (out / name / ADAPTER).read_bytes()


def test_each_is_exported_from_a_checkpoint(together):
    _, out = together
    assert cli.main("export", [str(out), "export.checkpoint=5"]) == 0
    for name in NAMES:
        exported = out / "exported" / "5" / name
        for file in (ADAPTER, "adapter_config.json", "base_model.json"):
            assert (exported / file).read_bytes() == (out / name / file).read_bytes()


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_each_folder_loads_in_peft(here, together):
    """A batch of both there is the same batch here."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    peft = pytest.importorskip("peft")
    out, ids = together[1], np.arange(24, dtype=np.int32).reshape(3, 8) + 6
    base = transformers.AutoModelForCausalLM.from_pretrained(here.base, dtype=torch.float32)
    peft_model = peft.PeftModel.from_pretrained(base, out / "up", "up")
    peft_model.load_adapter(out / "down", "down")
    with torch.no_grad():
        tokens, names = torch.tensor(ids).long(), ["down", "__base__", "up"]
        want = peft_model.eval()(input_ids=tokens, adapter_names=names).logits.numpy()
    model, params = jlora.load_pretrained(here.base, dtype="float32")
    stack = jlora.stack_adapters({n: jlora.load_adapter(out / n, params) for n in NAMES})
    rows = stack.ids(["down", None, "up"])
    got = model(jlora.attach(params, stack, adapter_ids=rows), ids)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def faults(place, change):
    """The message for settings that ``change`` has changed."""
    wrong = place.settings(**settings(place))
    change(wrong)
    file = place.folder / "wrong.yaml"
    file.write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError) as error:
        config.load(file)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["data"]["train"][0].pop("adapter"), "others do not"),
        (lambda s: s["data"]["eval"][1].update(adapter="left"), "left is not trained"),
        (lambda s: s["data"]["train"][0].update(adapter="a/b"), "cannot be the name of"),
        (lambda s: s.pop("lora"), "full fine-tuning has none"),
        (lambda s: s["train"].update(optim="paged_adamw_8bit"), "use adamw_8bit"),
        (lambda s: s["train"].update(fp16=True), "one loss scale"),
        (lambda s: s["evaluate"].update(exact_match=True), "does not support several adapters"),
    ],
)
def test_what_cannot_be_together_is_refused(place, change, message):
    assert message in faults(place, change)
