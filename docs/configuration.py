"""Writes ``docs/configuration.md`` from ``jlora.config``: ``python docs/configuration.py``.

A test compares the committed page with what this script writes.
"""

from __future__ import annotations

from pathlib import Path

from jlora import config

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """\
# All settings

Written by `python docs/configuration.py` from the dataclasses in `jlora/config`; the same list as
`python -m jlora.train --help`. Names are those of PEFT's `LoraConfig`, transformers'
`BitsAndBytesConfig` and `TrainingArguments` where those have one.

On the command line any setting is `section.key=value`, such as `train.learning_rate=1e-4`,
`data.train.0.path=my.jsonl` or `lora.target_modules=[q_proj,v_proj]`. Without a `quantization`
section the base is not quantized; without a `lora` section the whole model is trained.
Relative paths are looked up from the working directory, then from the config file's folder;
`jlora://…` names files shipped with jlora. Settings without a default are required.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    options = list(config.options())
    for section in dict.fromkeys(option.section for option in options):
        settings = [option for option in options if option.section == section]
        parts.append(f"\n## {section}\n\n{settings[0].section_help}\n\n")
        parts.append("| key | type | default | |\n|---|---|---|---|\n")
        for o in settings:
            cells = (f"`{o.field}`", o.type, "" if o.default is None else f"`{o.default}`", o.help)
            parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
