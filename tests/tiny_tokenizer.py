"""A byte-level tokenizer of some 300 tokens, made in memory, and chat templates of known models.

The templates are short versions that keep what matters of the originals: trimming, default system
messages, dropped thinking, tools, an eos after the last message only.
"""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eos|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same text as CHATML, with the tags from which transformers computes its own mask.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start|>system<|start|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n' + system"
    " + '<|stop|>' }}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '<|start|>\n\n' + m.content | trim + '<|stop|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|start|>\n\n' }}{% endif %}"
)

# Thinking is shown only after the last user message; the last reply always has a block of it.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set reason = '' %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set reason = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or reason) %}"
    "{{ '<think>\n' + reason + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<r>' + m.content + '</r><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The generation prompt opens a thought; what was thought is never shown afterwards.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>' + m.content.split('</think>')[-1].strip() + '<|eos|>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|><think>\n' }}{% endif %}"
)

# The prompt opens a thought that the reply has to close (Qwen3.5).
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' and '<think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# System text and tools are shown in the last user message only; calls need ids of 9 characters.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[TOOLS] ' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.tool_calls %}{{ '[CALLS] [' }}"
    "{% for c in m.tool_calls %}{% if not c.id is defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be strings of length 9') }}{% endif %}"
    "{% set text = c.function | tojson %}"
    "{{ text[:-1] + ', \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}"
    "{% if not m.tool_call_id is defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be strings of length 9') }}{% endif %}"
    "{{ '[RESULTS] ' + m.content + m.tool_call_id + '[/RESULTS]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

# Arguments have to be JSON text, which is copied.
TEXT_ARGUMENTS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Calls are written as XML (Qwen3-Coder), and content beside them has to be absent.
XML_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is defined and m.content is not none %}{{ m.content }}"
    "{% else %}{% for c in m.tool_calls %}{{ '<function=' + c.function.name + '>' }}"
    "{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>' + v | string + '</parameter>' }}{% endfor %}"
    "{{ '</function>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Calls are shown, the definitions of tools are not (DeepSeek R1).
NO_TOOLS = TEXT_ARGUMENTS.replace("{% if tools %}{{ tools | tojson }}{% endif %}", "")

# An eos follows the last message, and only that one.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Earlier replies end in another token than the last one.
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|eos|>{% else %}<|stop|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)

TRAINING_TEXT = [
    "Hello world, how are you today? I am fine, thank you.\n\n",
    "<think>\nassistant user system\n</think>\n\n",
    "What is 2 + 2? The answer is 4. A second line\nand a third one.\n",
]


def byte_tokenizer(trim_offsets: bool = False) -> Tokenizer:
    """Byte-level BPE as GPT-2, Llama-3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def tiny_tokenizer(
    template: str | None = CHATML, *, adds_bos: bool = False, trim_offsets: bool = False, **special
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer; ``adds_bos``: as Llama's, it puts bos before every text."""
    tokenizer = byte_tokenizer(trim_offsets)
    if adds_bos:
        bos = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[bos]
        )
    special = {"bos_token": "<|begin|>", "eos_token": "<|eos|>", **special}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = template
    return wrapped


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE without pre-tokenization, which merges letters over line breaks.

    A text begins with a piece for a space; decoding leaves it out.
    """
    characters = [*"▁\nabcdefghijklmnopqrstuvwxyzHT0123456789+?.'<|_>", "\ue000"]
    merges = [("\n", "h"), ("t", "\n"), ("t\n", "\nh"), ("\n", "\n"), ("e", "l"), ("▁", "a")]
    vocab = ["<unk>", "<s>", "</s>", *characters, *("".join(m) for m in merges)]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    return wrapped
