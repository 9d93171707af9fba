"""A vocabulary with new tokens, and ``model.new_tokens``, compared with transformers and peft.

The user's way there: the saved tokenizer, ``resize_token_embeddings(len(tokenizer))``, the adapter.
"""

import importlib
from argparse import Namespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_peers import PEERS_TALK, assert_close, load_torch, peft, torch, torch_logits, transformers
from tiny_runs import ADAPTER, NEW_TOKENS, OFF, Place, make_base_with_new_tokens
from tiny_tokenizer import tiny_tokenizer

import jlora
from jlora import config as settings
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import open_tokenizer

command = importlib.import_module("jlora.merge")  # jlora.merge is the function

pytestmark = [
    *PEERS_TALK,
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied:UserWarning"),
]

SIZE = len(tiny_tokenizer())
IDS = np.random.default_rng(0).integers(0, SIZE + 2, (2, 24), dtype=np.int32)
IDS[:, 3:5] = SIZE, SIZE + 1

BOTH = {"embed_tokens": [SIZE, SIZE + 1], "lm_head": [SIZE, SIZE + 1]}
WAYS = {
    "tied, rows": (True, {"trainable_token_indices": [SIZE, SIZE + 1]}, []),
    "tied, one row": (True, {"trainable_token_indices": [SIZE + 1]}, ["embed_tokens"]),
    "tied, untrained": (True, {}, ["embed_tokens"]),
    "tied, in full": (True, {"modules_to_save": ["embed_tokens"]}, ["embed_tokens"]),
    "tied, LoRA": (True, {"target_modules": ["q_proj", "embed_tokens"]}, ["embed_tokens"]),
    "untied, rows": (False, {"trainable_token_indices": BOTH}, []),
    "untied, rows of the embedding": (
        False,
        {"trainable_token_indices": [SIZE, SIZE + 1]},
        ["lm_head"],
    ),
    "untied, untrained": (False, {}, ["embed_tokens", "lm_head"]),
    "untied, in full": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, []),
    "untied, LoRA on the head": (
        False,
        {"target_modules": ["q_proj", "lm_head"]},
        ["embed_tokens", "lm_head"],
    ),
}
"""Whether the head is tied, settings of lora, and the base's weights that the folder must hold."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {
        tied: make_base_with_new_tokens(tmp_path_factory.mktemp("base"), tied)
        for tied in (True, False)
    }


def resized(folder, size=SIZE + 2, **options):
    """transformers' model, as a user resizes it."""
    base = load_torch(folder, **options)
    torch.manual_seed(1)  # of the noise on the mean
    base.resize_token_embeddings(size)
    return base


def logits_of_adapter(folder):
    """jlora's logits with the folder of an adapter alone, by the commands' way."""
    asked = settings.load(folder, [OFF], adapters=True)
    job = open_job(asked, open_tokenizer(asked), trained=True)
    return np.asarray(job.model(job.params, IDS % job.model.config.vocab_size))


def moved(adapter):
    """The adapter with other values of what was initialized from the base."""
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapter)


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_has_the_rows_that_peft_needs(way, bases, tmp_path):
    tied, lora, needed = WAYS[way]
    model, params = jlora.load_pretrained(bases[tied], dtype="float32", vocab_size=SIZE + 2)
    lora = {"target_modules": ["q_proj"]} | lora
    config = jlora.LoraConfig(
        **lora, init_lora_weights=False, base_model_name_or_path=str(bases[tied])
    )
    adapter = moved(jlora.init_adapter(jax.random.key(0), params, config))
    tables = jlora.embeddings_to_save(model, params, adapter.config)
    saved = [next(m for m in ("embed_tokens", "lm_head") if m in name) for name in tables]
    assert sorted(saved) == needed
    jlora.save_adapter(tmp_path, adapter, embeddings=tables)
    got = np.asarray(model(jlora.attach(params, adapter), IDS))
    model = peft.PeftModel.from_pretrained(resized(bases[tied]), tmp_path).eval()
    assert_close(got, torch_logits(model, IDS), 1e-5)
    assert_close(logits_of_adapter(tmp_path), got, 1e-6)


# Trained rows are new ones; where the head has LoRA, peft 0.21 saves no embedding.
MORE = [way for way in WAYS if way not in ("tied, one row", "untied, LoRA on the head")]
FEWER = [way for way in MORE if "trainable_token_indices" not in WAYS[way][1]]


@pytest.mark.parametrize(
    ("way", "size"), [*((way, SIZE + 2) for way in MORE), *((way, SIZE - 8) for way in FEWER)]
)
def test_the_commands_read_what_peft_saves(way, size, bases, tmp_path):
    tied, lora, _ = WAYS[way]
    config = peft.LoraConfig(**({"target_modules": ["q_proj"]} | lora), init_lora_weights=False)
    base = resized(bases[tied], size)
    with torch.no_grad():  # so that no row is ours by chance
        base.get_input_embeddings().weight[-2:] += 0.1
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.requires_grad):
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    got = logits_of_adapter(tmp_path)
    assert got.shape[-1] == size
    assert_close(got, torch_logits(model, IDS % size), 1e-5)


def check_run(place, quantization=None):
    """Compares the result of a run, and what merging makes of it, with peft's model."""
    asked = settings.load(place.output, [OFF])
    job = open_job(asked, open_tokenizer(asked), trained=True)
    got = np.asarray(job.model(job.params, IDS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.output)
    assert [tokenizer(t).input_ids for t in NEW_TOKENS] == [[SIZE], [SIZE + 1]]
    base = resized(
        place.base,
        len(tokenizer),
        **({"quantization_config": quantization} if quantization else {}),
    )
    model = peft.PeftModel.from_pretrained(base, place.output).eval()
    assert_close(got, torch_logits(model, IDS), 1e-5)
    command.run(asked, Namespace())
    folder = place.output / "merged"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [tokenizer(t).input_ids for t in NEW_TOKENS] == [[SIZE], [SIZE + 1]]
    merged = load_torch(folder)
    assert merged.config.vocab_size == SIZE + 2
    return torch_logits(merged, IDS), model


@pytest.mark.parametrize("way", ["tied, rows", "untied, in full"])
def test_a_run_and_its_merge(way, bases, tmp_path, tiny_cache):
    tied, lora, _ = WAYS[way]
    place = Place(tmp_path, bases[tied], tiny_cache)
    place.settings_for_loss()
    place.run(model={"new_tokens": NEW_TOKENS}, lora=lora, train={"max_steps": 3, "bf16": False})
    got, model = check_run(place)
    assert_close(got, torch_logits(model.merge_and_unload(), IDS), 1e-5)
    trained = load_file(place.output / ADAPTER)
    rows = next(
        x
        for name, x in trained.items()
        if "trainable_tokens_delta" in name or "embed_tokens" in name
    )[-2:]
    assert np.abs(rows[0] - rows[1]).max() > 1e-3  # they began as one


def test_a_quantized_run(bases, tmp_path, tiny_cache):
    pytest.importorskip("bitsandbytes")
    place = Place(tmp_path, bases[False], tiny_cache)
    place.settings_for_loss()
    _, lora, _ = WAYS["untied, rows of the embedding"]
    # Without double quantization the bytes are bitsandbytes'.
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    place.run(
        model={"new_tokens": NEW_TOKENS},
        quantization={**nf4, "bnb_4bit_compute_dtype": "float32"},
        lora=lora,
        train={"max_steps": 2, "bf16": False},
    )
    settings = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
    check_run(place, settings)
