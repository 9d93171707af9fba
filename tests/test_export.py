"""A checkpoint's weights, exported as training writes them, without the base's weights."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import Place

from jlora import cli, config
from jlora.run.abstract_job import abstract_adapter, abstract_model
from jlora.run.artifacts import write_trained
from jlora.run.checkpoints import Checkpoints, identity
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import open_tokenizer
from jlora.run.progress import Progress
from jlora.run.step_counts import StepCounts
from jlora.training.optim import make_optimizer
from jlora.training.state import init_state
from jlora.tree.fingerprint import fingerprint

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_base, tiny_cache):
    """Two steps with a checkpoint after each, on a base whose weights were then deleted."""
    place = Place(tmp_path_factory.mktemp("ran"), tiny_base, tiny_cache)
    place.settings_for_loss()
    base = shutil.copytree(tiny_base, place.folder / "base")
    place.defaults["model"] = {"name_or_path": str(base)}
    place.defaults["train"] = {"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1}
    lora = {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["model.norm"]}
    lora["alpha_pattern"] = {"q_proj": 3}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        place.run(lora=lora)
    place.printed = printed.getvalue()
    (base / "model.safetensors").unlink()
    return place


def export(place, *overrides):
    return cli.main("export", [str(place.output), *overrides])


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_exporting_the_last_checkpoint_reproduces_the_trained_files(ran):
    assert export(ran) == 0
    got, wrote = content(ran.output / "exported" / "2"), content(ran.output)
    assert {"adapter_model.safetensors", "adapter_config.json", *TOKENIZER} <= got.keys()
    assert got == {name: wrote[name] for name in got}


def test_programs_that_misread_the_scales_are_named_by_train_and_export(ran, tmp_path, capsys):
    assert export(ran, f"export.output_dir={tmp_path / 'out'}") == 0
    for printed in (ran.printed, capsys.readouterr().out):
        said = " ".join(printed.split())
        for program in ("vLLM", "SGLang", "llama.cpp"):
            assert program in said
        assert "would apply another scale than PEFT to 2 of 4 modules" in said


def test_a_checkpoint_is_named_by_step_or_folder(ran, tmp_path):
    folder = ran.output / "checkpoints" / "1"
    assert export(ran, "export.checkpoint=1") == 0
    assert export(ran, f"export.checkpoint={folder}", f"export.output_dir={tmp_path / 'one'}") == 0
    first = content(tmp_path / "one")
    assert first == content(ran.output / "exported" / "1")
    weights = "adapter_model.safetensors"
    assert first[weights] != ran.adapter() and len(first[weights]) == len(ran.adapter())


def test_a_run_can_start_from_an_export(ran, tmp_path, tiny_base):
    """An export is a complete adapter: a run on the base can start from it."""
    assert export(ran, "export.checkpoint=1", f"export.output_dir={tmp_path / 'one'}") == 0
    overrides = [f"lora.init_from={tmp_path / 'one'}", f"model.name_or_path={tiny_base}"]
    overrides.append("lora.lora_dropout=0.3")
    settings = config.load(ran.output, overrides)
    job = open_job(settings, open_tokenizer(settings), trained=False)
    assert job.trainable.config.lora_dropout == 0.3
    out = tmp_path / "again"
    write_trained(out, "float32", job.model, job.tokenizer, job.trainable)
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()


def test_the_bases_hub_name_is_written_if_it_is_known(ran, capsys, tmp_path):
    """A path of this machine is for this machine only, and is said to be there."""

    def base_of(*overrides):
        out = tmp_path / str(len(overrides))
        assert export(ran, f"export.output_dir={out}", *overrides) == 0
        said = " ".join(capsys.readouterr().out.split())
        written = json.loads((out / "adapter_config.json").read_text())
        return written["base_model_name_or_path"], written["revision"], "a path of this" in said

    base = ran.folder / "base"
    assert base_of() == (str(base), None, True)
    assert base_of("lora.base_model_name_or_path=org/base") == ("org/base", None, False)
    snapshot = tmp_path / "models--org--base-it" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(base, snapshot)
    settings = config.load(ran.output, [f"model.name_or_path={snapshot}"])
    adapter = abstract_adapter(settings, abstract_model(settings, None).shapes)
    assert adapter.config.base_model_name_or_path == "org/base-it"
    assert adapter.config.revision == "abc123"


def test_the_runs_own_folders_are_not_written_to(ran, capsys):
    before = content(ran.output)
    folders = ran.output, ran.output / "checkpoints", ran.output / "checkpoints" / "2", ran.folder
    for folder in (*folders, ran.folder / "base"):
        assert export(ran, f"export.output_dir={folder}") == 2
        assert "would be overwritten" in capsys.readouterr().err
    assert content(ran.output) == before


def test_training_does_not_write_to_its_base(ran, capsys):
    assert ran.main(f"train.output_dir={ran.folder / 'base'}") == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert ran.main(f"lora.init_from={ran.output}") == 2
    assert "is lora.init_from" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(ran, capsys, tmp_path):
    def refused(*overrides):
        code = export(ran, *overrides, f"export.output_dir={tmp_path / 'none'}")
        return code, capsys.readouterr().err

    code, message = refused("export.checkpoint=7")
    assert code == 2 and "export.checkpoint" in message and "complete here: 1, 2" in message
    code, message = refused("lora.lora_alpha=16", "lora.r=2")
    assert code == 2 and "lora.lora_alpha: 8 there, 16 here" in message and "lora.r: 4" in message
    code, message = refused(f"train.output_dir={tmp_path}")
    assert code == 2 and "holds no complete checkpoint" in message
    assert not (tmp_path / "none").exists()


def test_a_damaged_leaf_is_named_and_the_optimizer_is_not_read(ran, capsys, tmp_path):
    copied = shutil.copytree(ran.output, tmp_path / "copy")
    state = copied / "checkpoints" / "2" / "state"
    for folder in state.glob("state.opt_state.*"):
        shutil.rmtree(folder)
    checkpoint_option = f"export.checkpoint={copied / 'checkpoints' / '2'}"
    assert export(ran, checkpoint_option, f"export.output_dir={tmp_path / 'out'}") == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == ran.adapter()
    name = "state.trainable.weights.model.norm.scale"
    chunk = max(
        (f for f in (state / name).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    assert export(ran, checkpoint_option, f"export.output_dir={tmp_path / 'no'}") == 65
    message = capsys.readouterr().err
    assert f"{chunk}: the file is damaged" in message and f"(leaf {name})" in message
    assert not (tmp_path / "no").exists()


def test_a_fully_trained_model_becomes_a_transformers_folder(place, capsys):
    """Equals ``write_trained`` of the saved state; masters are float32, files bfloat16."""
    place.settings_for_loss()
    file = place.write(lora=None, model={"dtype": "bfloat16"})
    settings = config.load(file)
    job = open_job(settings, open_tokenizer(settings), trained=False)
    rng = np.random.default_rng(3)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), job.trainable
    )
    counts = StepCounts.of(settings, job.mesh, lambda rows: 4)
    state = init_state(trained, make_optimizer(settings.train, 4, trained))
    checkpoints = Checkpoints(
        place.output / "checkpoints",
        settings.train,
        identity=identity(settings, counts, "rows"),
        base_fingerprint=fingerprint(job.base),
    )
    checkpoints.save(state, Progress(step=5))
    checkpoints.wait()
    wanted, other = place.folder / "wanted", place.folder / "adapter"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    assert cli.main("export", [str(file), f"export.output_dir={other}"]) == 2
    assert "holds an adapter" in capsys.readouterr().err
    write_trained(wanted, "bfloat16", job.model, job.tokenizer, trained)
    assert cli.main("export", [str(file)]) == 0
    got = content(place.output / "exported" / "5")
    assert got == content(wanted) and "config.json" in got
    size = sum(np.prod(x.shape) for x in jax.tree.leaves(trained))
    assert 2 * size < len(got["model.safetensors"]) < 3 * size


@pytest.mark.slow
def test_pissas_initial_weights_are_recomputed_from_the_base(tmp_path, tiny_base, tiny_cache):
    place = Place(tmp_path, tiny_base, tiny_cache)
    place.settings_for_loss()
    place.defaults["train"] = {"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1}
    modules = ["q_proj", "down_proj"]  # an SVD of each is compiled
    place.run(lora={"init_lora_weights": "pissa", "use_dora": True, "target_modules": modules})
    assert export(place) == 0
    got, wrote = content(place.output / "exported" / "2"), content(place.output)
    assert got == {name: wrote[name] for name in got}
    assert cli.main("merge", [str(place.output)]) == 0
