"""A byte-level tokenizer of some 300 tokens, made in memory, and chat templates of known models.

The templates are short versions with the relevant features of the originals: trimming, default
system messages, dropped thinking, tools, an eos after the last message only.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eos|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same text as CHATML, with the tags from which transformers computes its mask.
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

# Thinking is rendered only after the last user message; the last reply always has a block.
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

# The generation prompt opens a thinking block; finished thinking is never rendered.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>' + m.content.split('</think>')[-1].strip() + '<|eos|>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|><think>\n' }}{% endif %}"
)

# The prompt opens a thinking block that the reply has to close (Qwen3.5).
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' and '<think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# An eos follows only the last message.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Earlier replies end with a different token than the last one.
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
    """Byte-level BPE as in GPT-2, Llama-3 and Qwen."""
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
    """A transformers tokenizer; with ``adds_bos`` it starts every text with bos, like Llama's."""
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
