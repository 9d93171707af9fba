"""The packaged base model: it is small and loadable, and has its training tokenizer."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

import jlora
from jlora.assets.quickstart import make_model

FOLDER = Path(make_model.__file__).parent / "model"
LIMIT = 4_000_000


def test_is_small_and_complete():
    files = {f.name: f.stat().st_size for f in FOLDER.iterdir()}
    assert sum(files.values()) <= LIMIT
    assert {"model.safetensors", "config.json", "README.md"} <= files.keys()
    assert set(make_model.TOKENIZER_FILES) <= files.keys()


def test_has_the_architecture_of_the_script():
    found = json.loads((FOLDER / "config.json").read_text())
    assert {k: found[k] for k in make_model.CONFIG if found.get(k) is not None} == {
        k: v for k, v in make_model.CONFIG.items() if v is not None
    }
    with safe_open(FOLDER / "model.safetensors", "np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_is_trained():
    """It predicts tokens of a training sentence with far more than chance, one in 2048."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    chat = [
        {"role": "user", "content": "Repeat after me: Return the name of the file."},
        {"role": "assistant", "content": "Return the name of the file."},
    ]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    start = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    model, params = jlora.load_pretrained(str(FOLDER), dtype="float32")
    logits = np.asarray(model(params, np.asarray([ids])))[0, start:-1]
    chances = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    mean = np.mean([chance[token] for chance, token in zip(chances, ids[start + 1 :], strict=True)])
    assert mean > 0.3
