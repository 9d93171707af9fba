"""Tokenizing and packing chats, compared with TRL's preparation and a plain ``datasets.map``.

    python benchmarks/data.py [--rows 1600,6400,25600]

The chats have three turns made from the quickstart's rows, all different, with its tokenizer and a
template that marks the assistant's tokens: each side renders and tokenizes every chat, finds the
tokens that carry loss, and packs rows of 256 tokens. The peers start from rows in memory, jlora
from the file. "TRL" is what ``SFTTrainer`` does to its data set (``packing=True,
assistant_only_loss=True``), omitted where trl is not installed; "datasets" is ``map`` with the chat
template, without packing. Each uses one process and no cached results. Needs the extra ``parity``,
and ``pip install trl`` for TRL.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import llama
import paired

PACKAGED = Path(__file__).parent.parent / "jlora/assets/quickstart"
LENGTH = 256
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def write(file: Path, count: int) -> None:
    """Writes ``count`` chats of three turns."""
    lines = (PACKAGED / "data/train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line)["messages"] for line in lines]
    with file.open("w", encoding="utf-8") as out:
        for row in range(count):
            chat = []
            for turn in range(3):
                pair = pairs[(7 * row + 13 * turn) % len(pairs)]
                # Numbered, so that no text occurs twice.
                chat += [{**m, "content": f"{m['content']} ({row}.{turn})"} for m in pair]
            out.write(json.dumps({"messages": chat}) + "\n")


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "model")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jlora_unit(file: str) -> Any:
    """``data.prepare``: what ``jlora train`` does before it loads the model."""
    from jlora import data
    from jlora.config import DataConfig, SourceConfig

    source = SourceConfig(path=file, format="messages")
    config = DataConfig(train=(source,), max_length=LENGTH)
    tokenizer = _tokenizer()

    def unit() -> dict[str, int]:
        packed = data.prepare([source], tokenizer, config).packed
        return {
            "rows": len(packed.input_ids),
            "tokens": int((packed.segment_ids != 0).sum()),
            "targets": int((packed.labels != -100).sum()),
        }

    return unit


def _data_set(file: str) -> Any:
    """The rows in memory; nothing derived from them is cached between calls."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    with open(file, encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


def trl_unit(file: str) -> Any:
    """The preparation that an ``SFTTrainer`` does."""
    from trl import SFTConfig, SFTTrainer

    llama.torch_threads()
    logging.disable(logging.WARNING)
    rows, tokenizer = _data_set(file), _tokenizer()
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        packing=True,
        max_length=LENGTH,
        assistant_only_loss=True,
        use_cpu=True,
        report_to="none",
        bf16=False,
    )
    model = llama.transformers_model(llama.shape(384, 1))
    trainer = SFTTrainer(model, config, train_dataset=rows.select([0]), processing_class=tokenizer)

    def unit() -> dict[str, int]:
        got = trainer._prepare_dataset(rows, tokenizer, config, True, None, "train")
        return {"rows": len(got), "tokens": sum(map(len, got["input_ids"]))}

    return unit


def map_unit(file: str) -> Any:
    """``map`` with the chat template, row by row."""
    rows, tokenizer = _data_set(file), _tokenizer()

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        got = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": got["input_ids"], "assistant_masks": got["assistant_masks"]}

    def unit() -> dict[str, int]:
        got = rows.map(encode, remove_columns="messages")
        return {"rows": len(got), "tokens": sum(map(len, got["input_ids"]))}

    return unit


def main() -> None:
    """Measures each number of chats."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--rows", default="1600,6400,25600")
    args = parser.parse_args()
    peers = {"TRL": "data:trl_unit"} if importlib.util.find_spec("trl") else {}
    peers["datasets"] = "data:map_unit"
    with tempfile.TemporaryDirectory() as place:
        points = {}
        for count in map(int, args.rows.split(",")):
            file = Path(place) / f"{count}.jsonl"
            write(file, count)
            points[count] = [
                paired.Contestant(name, setup, {"file": str(file)})
                for name, setup in {"jlora": "data:jlora_unit", **peers}.items()
            ]
        paired.compare("data-preparation", "chats", points, args, peers=list(peers)[:1])


if __name__ == "__main__":
    main()
