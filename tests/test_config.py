import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import ClassVar

import pytest

import jlora
from jlora import config
from jlora.config import LoraConfig, MeshConfig, QuantConfig, TrainConfig
from jlora.config.engine.faults import Fault
from jlora.config.engine.loader import load_section
from jlora.config.engine.other_tools import OTHER_TOOLS_KEYS
from jlora.config.engine.schema import ConfigSection, Count
from jlora.errors import ConfigError, StorageError

ROOT = Path(jlora.__file__).parents[1]

MINIMAL = """\
model: {name_or_path: org/base}
data:
  train:
    - {path: org/rows, format: messages}
train:
  output_dir: out
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config file into a folder other than the working directory."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / "files" / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def fault(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    return str(caught.value)


# Sections built in Python


def test_lists_and_dicts_make_equal_hashable_sections():
    a = LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"b": 2, "a": 3})
    b = LoraConfig(target_modules=("q_proj", "v_proj"), rank_pattern={"a": 3, "b": 2})
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != dataclasses.replace(b, r=9)
    assert a.target_modules == ("q_proj", "v_proj")
    assert a.rank_pattern["a"] == 3 and list(a.rank_pattern.items()) == [("a", 3), ("b", 2)]
    assert pickle.loads(pickle.dumps(a)) == copy.deepcopy(a) == a
    with pytest.raises(TypeError):
        a.rank_pattern["a"] = 4  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.r = 4  # pyright: ignore


def test_defaults_match_the_contract():
    lora, quant, train = LoraConfig(), QuantConfig(), TrainConfig(output_dir="o")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (8, 8, 0.0, "none")
    assert (quant.bnb_4bit_quant_type, quant.bnb_4bit_use_double_quant) == ("nf4", True)
    assert (quant.block_size, quant.bnb_4bit_compute_dtype) == (64, "bfloat16")
    assert (train.num_train_epochs, train.max_steps, train.learning_rate) == (3, -1, 2e-4)
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (4, 4)
    assert (train.lr_scheduler_type, train.warmup_ratio, train.max_grad_norm) == ("cosine", 0.03, 1)
    assert (train.bf16, train.fp16, train.seed, train.resume) == (None, False, 42, "auto")
    assert (train.logging_steps, train.eval_steps, train.save_steps) == (10, 100, 500)
    assert train.save_total_limit == 3 and train.gradient_checkpointing
    assert MeshConfig() == MeshConfig(data=-1, fsdp=1, tensor=1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "r: must be at least 1, got 0"),
        ({"r": True}, "r: expected an integer at least 1, got true"),
        ({"r": 8.0}, "r: expected an integer at least 1, got 8.0"),
        ({"lora_alpha": 0}, "lora_alpha: must be above 0, got 0"),
        ({"lora_alpha": -1.5}, "lora_alpha: must be above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha: expected a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be at least 0 and below 1"),
        ({"bias": "non"}, "did you mean 'none'?"),
        ({"target_modules": []}, "nothing would train"),
        ({"target_modules": [""]}, "an empty name matches nothing"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"rank_pattern": {"(q": 4}}, "is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: must be at least 1"),
        ({"modules_to_save": "lm_head"}, "expected a list of strings or null"),
        ({"layers_pattern": "h"}, "has no effect without layers_to_transform"),
        (
            {"layers_to_transform": [1], "target_modules": ".*q_proj"},
            "layers_to_transform: has no effect when target_modules is a regular expression",
        ),
        ({"layers_to_transform": [-1]}, "must be at least 0"),
        ({"init_lora_weights": "pisa"}, "did you mean 'pissa'?"),
        ({"init_lora_weights": "pissa_niter_"}, "expected a number after pissa_niter_"),
        ({"init_lora_weights": "orthogonal", "r": 6, "rank_pattern": {"q": 3}}, "even ranks"),
        (
            {"init_lora_weights": "olora", "lora_bias": True},
            "is not supported with init_lora_weights",
        ),
        ({"loftq_config": {"loftq_bit": 4}}, "did you mean 'loftq_bits'?"),
    ],
)
def test_an_invalid_value_in_python_names_its_field(values, words):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**values)
    assert words in str(caught.value) and "LoraConfig" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"load_in_4bit": False},
        {"load_in_8bit": True, "load_in_4bit": True},
        {"block_size": 65},
        {"bnb_4bit_quant_type": "nf5"},
        {"include_modules": ["lm_head"], "llm_int8_skip_modules": ["lm_head"]},
    ],
)
def test_contradictory_quantization_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        QuantConfig(**values)


def test_quantization_is_4_bit_unless_8_bit_is_requested():
    four, eight = QuantConfig(), QuantConfig(load_in_8bit=True)
    assert (four.load_in_4bit, four.load_in_8bit) == (True, False)
    assert (eight.load_in_4bit, eight.load_in_8bit) == (False, True)
    assert four == QuantConfig(load_in_4bit=True) and hash(four) != hash(eight)


def test_precision_and_aliases_resolve():
    train = TrainConfig(output_dir="o", fp16=True, optim="adamw_torch")  # pyright: ignore
    assert (train.fp16, train.optim) == (True, "adamw")
    with pytest.raises(ConfigError, match="both fp16 and bf16"):
        TrainConfig(output_dir="o", fp16=True, bf16=True)
    with pytest.raises(ConfigError, match="needs gradient_checkpointing, which is false"):
        TrainConfig(output_dir="o", activation_offloading=True, gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": 0}, "max_steps: must be positive or -1"),
        ({"output_dir": ""}, "output_dir: is empty"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "cosine has no argument 'min_lr'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of min_lr and min_lr_rate"),
    ],
)
def test_contradictions_between_train_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**({"output_dir": "o"} | values))


@pytest.mark.parametrize("axes", [{"data": -1, "fsdp": -1}, {"tensor": 0}, {"fsdp": -2}])
def test_a_mesh_has_at_most_one_free_axis(axes):
    with pytest.raises(ConfigError):
        MeshConfig(**axes)


# YAML


def test_a_minimal_file_resolves_to_the_defaults(write):
    c = config.load(write(MINIMAL))
    assert c.model.name_or_path == "org/base" and c.data.train[0].path == "org/rows"
    assert c.lora is None and c.quantization is None
    assert c.mesh == MeshConfig() and c.train == TrainConfig(output_dir="out")


FULL = """\
model: {name_or_path: org/base, dtype: bf16, revision: '12'}
quantization: {}
lora:
  r: 16
  target_modules: [q_proj, v_proj]
  layers_to_transform: 3
  rank_pattern: {q_proj: 4}
  alpha_pattern: {"1e-5": 2.5, v_proj: 3}
  use_dora: false
data:
  train: [{path: org/rows, format: text, weight: 2}, {path: org/more, format: alpaca, name: "no"}]
  eval: [{path: org/rows, format: text, split: "null"}]
train: {output_dir: "1e3", learning_rate: 1e-5, eval_strategy: steps, max_grad_norm: null,
  lr_scheduler_type: polynomial, lr_scheduler_kwargs: {power: 2}, early_stopping_patience: 2}
mesh: {data: 2, fsdp: 2, tensor: 2}
generate: {prompt: "two\\nlines: \\u00e9 # x", top_p: 1}
"""


def test_resolved_yaml_loads_back_to_an_equal_config(write):
    first = config.load(write(FULL))
    text = config.to_yaml(first)
    again = config.load(write(text, "again.yaml"))
    assert again == first and hash(again) == hash(first)
    assert config.to_yaml(again) == text
    assert first.train.learning_rate == 1e-5 and first.train.output_dir == "1e3"
    assert first.model.dtype == "bfloat16" and first.data.eval[0].split == "null"
    assert first.lora and first.lora.alpha_pattern == {"1e-5": 2.5, "v_proj": 3.0}


CLASSES = """\
model: {{name_or_path: org/base{model}}}
data:
  train: [{{path: org/rows, format: {format}}}]
{data}
train: {{output_dir: out}}
{rest}
"""
SEQ_CLS = "lora: {task_type: SEQ_CLS}"


def classes(model="", format="classification", data="", rest=SEQ_CLS):
    return CLASSES.format(model=model, format=format, data=data, rest=rest)


def test_rows_with_classes_make_a_classifier(write):
    names = ", num_labels: 2, id2label: ['no', 'yes']"
    c = config.load(write(classes(names)))
    assert c.is_classification and c.lora and c.lora.task_type == "SEQ_CLS"
    assert (c.model.num_labels, c.model.id2label) == (2, ("no", "yes"))
    assert config.load(write(config.to_yaml(c), "again.yaml")) == c
    assert config.load(write(classes(rest=""))).is_classification, "full fine-tuning"
    assert not config.load(write(MINIMAL)).is_classification


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (classes(rest="lora: {}"), ["c.yaml:6: lora.task_type: is CAUSAL_LM", "write SEQ_CLS"]),
        (classes(format="text"), ["c.yaml:6: lora.task_type: SEQ_CLS", "format: classification"]),
        (classes(", num_labels: 2", "text", rest=""), ["c.yaml:1: model.num_labels: the rows"]),
        (classes(", id2label: [a, b]", "text", rest=""), ["model.id2label: the rows have no"]),
        (classes(", num_labels: 1"), ["model.num_labels: must be at least 2, got 1"]),
        (classes(", id2label: [a]"), ["model.id2label: needs at least two names"]),
        (classes(", id2label: [a, a]"), ["all different"]),
        (classes(", id2label: [a, b], num_labels: 3"), ["has 2 names, but num_labels is 3"]),
        (classes(", label2id: {a: 0}"), ["model.label2id: unknown key", "write model.id2label"]),
        (
            classes(", problem_type: regression"),
            ["model.problem_type", "only single-label classification"],
        ),
        (
            classes(data="  eval: [{path: org/rows, format: text}]"),
            ["c.yaml:2: data: rows with classes are mixed with text", "separate runs"],
        ),
        (classes(rest=SEQ_CLS + "\nevaluate: {exact_match: true}"), ["evaluate.exact_match:"]),
    ],
)
def test_contradictions_about_classes_are_named(write, text, words):
    message = fault(write(text))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("held_out", "words"),
    [("", "needs held-out rows"), ("  eval: [{path: a, format: text}]", "have no replies")],
)
def test_exact_match_needs_held_out_replies(write, held_out, words):
    text = (
        "model: {name_or_path: org/base}\nlora: {r: 4}\ntrain: {output_dir: out}\n"
        f"data:\n  train: [{{path: org/rows, format: text}}]\n{held_out}\n"
        "evaluate: {exact_match: true}\n"
    )
    message = fault(write(text))
    assert "evaluate.exact_match" in message and words in message


def test_exact_match_that_no_rows_allow_is_refused_once(write):
    path = write(classes(rest=SEQ_CLS + "\nevaluate: {exact_match: true}"))
    assert "held-out" not in fault(path)
    text = MINIMAL.replace("messages}", "messages, adapter: a}")
    message = fault(write(text + "lora: {r: 4}\nevaluate: {exact_match: true}\n"))
    assert "several adapters" in message and "held-out" not in message


FAULTY = """\
model: {name_or_path: org/base, torch_dtype: bfloat16}
quantization:
lora:
  rr: 8
  r: 8
  r: 9
  lora_alpha: 0
  target_modules: [q_proj, 5]
  use_qalora: true
  use_rslora: yes
data:
  train:
    - {path: rows.jsonl, format: message}
    - {path: org/rows}
  lora_dropout: 0.1
  max_length: null
train:
  learning_rate: fast
  fp16: true
  bf16: true
  evaluation_strategy: epoch
  early_stopping_patience: 3
trian: {}
"""

FAULTS = {
    1: ["model.torch_dtype: unknown key", "write model.dtype"],
    2: ["quantization: the section is empty", "quantization: null to leave it out"],
    4: ["lora.rr: unknown key", "did you mean 'r'?"],
    6: ["the key 'r' is there twice (first in line 5)"],
    7: ["lora.lora_alpha: must be above 0, got 0"],
    8: ["lora.target_modules: expected a string, got 5", 'put it in quotes: "5"'],
    9: ["lora.use_qalora: jlora does not support this field of PEFT yet"],
    10: ["lora.use_rslora: expected true or false, got 'yes'", "write true"],
    13: ["data.train.0.path: no such file", "data.train.0.format:", "did you mean 'messages'?"],
    14: ["data.train.1.format: is missing", "give one of messages, sharegpt,"],
    15: ["data.lora_dropout: unknown key", "it belongs to the section lora"],
    16: ["data.max_length: null is not allowed", "leave the key out"],
    17: ["train.output_dir: is missing"],
    18: ["train.learning_rate: expected a number above 0, got 'fast'"],
    19: ["train.fp16: both fp16 and bf16 are true"],
    21: ["train.evaluation_strategy: unknown key", "train.eval_steps"],
    22: ["train.early_stopping_patience: needs held-out rows"],
    23: ["trian: unknown section", "did you mean 'train'"],
}


def test_all_faults_of_a_file_in_one_error_each_with_its_line(write):
    path = write(FAULTY)
    message = fault(path)
    by_line: dict[int, str] = {}
    line = 0
    for text in message.splitlines()[1:]:
        if text.startswith(f"{path}:"):
            line = int(text[len(str(path)) + 1 :].partition(":")[0])
        by_line[line] = by_line.get(line, "") + text + "\n"
    assert set(by_line) == set(FAULTS)
    for number, words in FAULTS.items():
        assert all(word in by_line[number] for word in words), by_line[number]
    assert list(by_line) == sorted(by_line)
    assert message.startswith("19 settings are wrong")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["model: the section is missing", "data:", "train:"]),
        ("- a", ["expected keys and values, got a list"]),
        ("model: [", ["c.yaml:", "not valid YAML"]),
        ("a: 1\n---\nb: 2", ["not valid YAML"]),
        ("model: !!python/object/apply:os.system ['true']", ["c.yaml:1", "are not allowed"]),
        ("model: &a [*a]", ["alias refers to itself"]),
        ("? [a]\n: 1", ["a key must be a name"]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("a: \x07", ["not valid YAML"]),
        ("lora: {r: 8}\nlora: {}", ["twice (first in line 1)"]),
        ("mesh: 3", ["mesh: expected keys and values, got 3"]),
        ("data: {train: {path: x, format: text}}", ["data.train:", "begin it with a dash"]),
    ],
)
def test_malformed_files_are_config_errors(write, text, words):
    message = fault(write(text))
    assert all(word in message for word in words), message


def test_an_alias_bomb_is_refused_quickly(write):
    rows = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 22)]
    start = time.monotonic()
    rows += ["lora: {target_modules: *a21, use_dora: *a21}"]
    assert "lora.target_modules: expected a string" in fault(write("\n".join(rows)))
    assert time.monotonic() - start < 5


def test_an_override_changes_one_alias_only(write):
    text = MINIMAL.replace("    - {", "    - &rows {") + "\n"
    text = text.replace("train:\n  out", "  eval: [*rows]\ntrain:\n  out")
    c = config.load(write(text), ["data.eval.0.weight=2"])
    assert (c.data.train[0].weight, c.data.eval[0].weight) == (1.0, 2.0)


def test_full_fine_tuning_of_quantized_weights_is_refused(write):
    path = write(MINIMAL + "quantization: {}\n")
    assert f"{path}:7: quantization: quantized weights cannot be fully fine-tuned" in fault(path)
    assert config.load(path, ["lora={}"]).lora == LoraConfig()


@pytest.mark.parametrize("name", ["lorafa: true", "loraplus_lr_ratio: 16"])
def test_optimizer_settings_for_adapters_need_a_lora_section(write, name):
    path = write(MINIMAL + f"  {name}\n")
    message = f"train.{name.split(':')[0]}: has no effect without an adapter"
    assert message in fault(path) and "add a lora section" in fault(path)
    config.load(path, ["lora={}"])


def test_the_home_folder_is_expanded_in_output_folders(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(
        MINIMAL.replace("output_dir: out", "output_dir: ~/out") + "merge:\n  output_dir: ~/m"
    )
    c = config.load(path, ["export.output_dir=~/e", "quantize.output_dir=~/q"])
    found = c.train.output_dir, c.merge.output_dir, c.export.output_dir, c.quantize.output_dir
    assert found == tuple(str(tmp_path / name) for name in ("out", "m", "e", "q"))
    assert config.load(path, ["train.output_dir=~/o"]).train.output_dir == str(tmp_path / "o")
    assert TrainConfig(output_dir="~/o").output_dir == str(tmp_path / "o")


def test_files_that_cannot_be_read(write, tmp_path):
    path = write(MINIMAL)
    assert "did you mean 'c.yaml'?" in fault(path.with_name("cc.yaml"))
    assert "output folder of a run" in fault(tmp_path / "cwd")
    path.write_bytes(b"model: 1\ntrain: \xff")
    assert f"{path}:2: not UTF-8" in fault(path)
    with pytest.raises(StorageError, match=r"x\.yaml"):
        config.load(path / "x.yaml")


def test_a_check_that_involves_a_faulty_field_is_not_reported(write):
    text = MINIMAL + "  lr_scheduler_type: cosin_min\n  lr_scheduler_kwargs: {min_lr: 1e-5}\n"
    message = fault(write(text))
    assert "train.lr_scheduler_type: expected one of" in message and "no argument" not in message


# Overrides


def test_later_overrides_replace_earlier_ones(write):
    values = [
        "lora.r=4",
        "lora.r=32",
        "lora.target_modules=[q_proj, o_proj]",
        "train.learning_rate=1e-5",
        "data.train.0.format=text",
        "data.eval=[{path: org/held, format: text}]",
        "quantization={}",
        "model.revision=123",
        "generate.prompt=Say: [hello",
        "train.eval_steps=null",
        "mesh.data=1",
    ]
    c = config.load(write(MINIMAL), values)
    assert c.lora == LoraConfig(r=32, target_modules=["q_proj", "o_proj"])
    assert c.quantization == QuantConfig()
    assert c.train.learning_rate == 1e-5 and c.train.eval_steps is None
    assert c.data.train[0].format == "text" and c.data.eval[0].path == "org/held"
    assert c.model.revision == "123" and c.generate.prompt == "Say: [hello" and c.mesh.data == 1
    assert config.load(write(MINIMAL), ["lora.r=4", "lora=null"]).lora is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ["train.learning_rat: unknown key", "'learning_rate'"]),
        ("learning_rate=1", ["unknown section", "it belongs to the section train"]),
        ("train.seed", ["not an override", "write section.key=value"]),
        ("=3", ["not an override"]),
        ("train..seed=3", ["not an override"]),
        ("train.seed=x", ["train.seed: expected an integer at least 0, got 'x'"]),
        ("train.seed=", ["train.seed: null is not allowed"]),
        ("train.seed.x=1", ["train.seed: expected an integer at least 0"]),
        ("train.output_dir.x=1", ["'out' is a value, so there is nothing below it"]),
        ("data.train.1.path=x", ["the list has 1"]),
        ("data.train.x.path=x", ["'x' is not an index"]),
        ("mesh.fsdp=-1", ["only one axis can be -1"]),
    ],
)
def test_an_error_names_the_override(write, override, words):
    message = fault(write(MINIMAL), override)
    assert f"override {override!r}" in message
    assert all(word in message for word in words), message


# Paths


def test_relative_inputs_from_the_working_directory_then_from_the_file(write, tmp_path):
    text = MINIMAL.replace("org/rows", "rows.jsonl")
    path = write(text)
    assert "did you mean 'row.jsonl'?" in fault_near(path, tmp_path / "files" / "row.jsonl")
    next_to_config = write("", "rows.jsonl")
    assert config.load(path).data.train[0].path == str(next_to_config)
    here = tmp_path / "cwd" / "rows.jsonl"
    here.write_text("")
    assert config.load(path).data.train[0].path == str(here)
    pattern = config.load(path, ["data.train.0.path=r*.jsonl"]).data.train[0].path
    assert pattern == str(tmp_path / "cwd" / "r*.jsonl")


def fault_near(path, near) -> str:
    near.write_text("")
    return fault(path)


def test_jlora_scheme_names_packaged_files(write):
    path = write(MINIMAL)
    c = config.load(path, ["data.train.0.path=jlora://quickstart/data/train.jsonl"])
    assert Path(c.data.train[0].path).is_file()
    assert Path(c.data.train[0].path).parts[-4:] == ("assets", "quickstart", "data", "train.jsonl")
    message = fault(path, "data.train.0.path=jlora://quickstart/data/trian.jsonl")
    assert "no such file" in message and "'train.jsonl'" in message


@pytest.mark.parametrize(
    "key", ["lora.init_from", "data.chat_template", "train.resume", "generate.file"]
)
def test_paths_that_cannot_be_hub_names_must_exist(write, key):
    assert f"{key}: no such file or folder" in fault(write(MINIMAL), f"{key}=org/name")


def test_a_run_folder_is_read_as_its_config_yaml(write, tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.yaml").write_text(MINIMAL.replace("org/rows", "gone/rows.jsonl"))
    c = config.load(run, ["generate.prompt=hi"])
    assert c.train.output_dir == str(run) and c.data.train[0].path == "gone/rows.jsonl"
    assert c.generate.prompt == "hi"
    assert config.load(run, ["train.output_dir=x"]).train.output_dir == "x"


# Checks run once, on the section itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk(ConfigSection):
    """A section whose check uses a derived property."""

    size: Count
    used: Count = 1

    checked: ClassVar[list] = []
    converted: ClassVar[list] = []

    @property
    def free(self) -> int:
        return self.size - self.used

    @classmethod
    def convert_field(cls, name, value):
        cls.converted.append(name)
        return super().convert_field(name, value)

    def check(self):
        self.checked.append(self)
        if self.free < 0:
            yield Fault(("used", "size"), f"is more than size, {self.size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine(ConfigSection):
    disk: Disk


def test_a_check_may_use_a_property_of_its_section(write):
    path = write("disk: {size: 8, used: 9}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:1: disk\.used: is more than size, 8"):
        load_section(Machine, path)
    with pytest.raises(ConfigError, match="Disk: used: is more than size, 8"):
        Disk(size=8, used=9)


def test_a_section_is_converted_and_checked_once_and_is_the_one_returned(write):
    Disk.checked.clear()
    Disk.converted.clear()
    loaded = load_section(Machine, write("disk: {size: 8, used: 3}\n")).disk
    assert [id(section) for section in Disk.checked] == [id(loaded)]
    assert sorted(Disk.converted) == ["size", "used"]
    assert loaded == Disk(size=8, used=3) and loaded.free == 5


def test_a_check_that_fails_on_a_faulty_field_does_not_hide_its_fault(write):
    with pytest.raises(ConfigError) as caught:
        load_section(Machine, write("disk: {size: many, used: 3}\n"))
    assert str(caught.value).endswith("disk.size: expected an integer at least 1, got 'many'")


def sections(section=config.Config):
    yield section
    for hint in typing.get_type_hints(section).values():
        for inner in (hint, *typing.get_args(hint)):
            if isinstance(inner, type) and issubclass(inner, ConfigSection):
                yield from sections(inner)


def test_defaults_have_their_fields_types():
    """The loader does not convert defaults."""
    assert len({*sections()}) == 15
    for section in {*sections()}:
        for field in dataclasses.fields(section):
            if field.default is not dataclasses.MISSING:
                value = section.convert_field(field.name, field.default)
                assert (type(value), value) == (type(field.default), field.default), field.name


# Help, settings of other tools, exit code


def test_every_setting_has_help_and_a_default_that_loads(write):
    options = list(config.options())
    assert all(o.help and o.type for o in options)
    assert len({(o.section, o.field) for o in options}) == len(options)
    given = [
        f"{o.section}.{o.field}={o.default}"
        for o in options
        if o.default is not None and not o.section.startswith("data.train.")
    ]
    c = config.load(write(MINIMAL), [v for v in given if v != "train.eval_steps=100"])
    assert c == dataclasses.replace(
        config.load(write(MINIMAL)), lora=LoraConfig(eva_config={}), quantization=QuantConfig()
    )


def test_keys_of_other_tools_are_unknown_here_and_their_advice_names_known_keys(write):
    known = {(o.section, o.field) for o in config.options()}
    for section, keys in OTHER_TOOLS_KEYS.items():
        for key, (_, advice) in keys.items():
            assert (section, key) not in known
            for word in advice.replace(":", " ").replace(";", " ").split():
                name = tuple(word.strip(",").split("."))
                if section and len(name) == 2 and name[0] in OTHER_TOOLS_KEYS and name[1]:
                    assert name in known, advice


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("logging_first_step", "train.logging_steps to 1"),
        ("load_best_model_at_end", "train.early_stopping_patience"),
    ],
)
def test_keys_of_other_tools_that_would_have_an_effect_name_what_has_it(write, key, advice):
    assert config.load(write(f"{MINIMAL}  {key}: false\n")) == config.load(write(MINIMAL))
    with pytest.raises(ConfigError, match=advice):
        config.load(write(f"{MINIMAL}  {key}: true\n"))


def test_keys_of_other_tools_with_no_effect_are_ignored(write):
    text = (
        MINIMAL + "  fp16: false\n  report_to: none\n  deepspeed: null\nlora: {peft_type: LORA}\n"
    )
    assert config.load(write(text)).lora == LoraConfig()
    assert "set mesh.fsdp" in fault(write(text), "train.deepspeed=ds.json")


SILENT = """
import sys
from jlora import cli
code = cli.main("train", sys.argv[1:])
slow = {"jax", "flax", "optax", "transformers", "datasets", "torch", "orbax", "numpy", "rich"}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def test_a_config_error_exits_2_before_slow_imports(write):
    path = write(MINIMAL.replace("output_dir", "outputdir"))
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert f"{path}:6: train.outputdir: unknown key" in done.stderr
    assert "did you mean 'output_dir'?" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
