"""Writes ../fixtures/chat_templates.json: what transformers makes of chat templates, and of SentencePiece's tokenizers.

pip install transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6 && python chat_templates.py

With KINDLING_SMOLLM2, the directory of a SmolLM2-135M-Instruct, its conversations are recorded anew, too.

The templates have the structure of those in use (ChatML with a default system text, Llama 3, Qwen 2.5 and 3, Phi 3, DeepSeek R1,
Zephyr, nanochat), written anew and kept short, and what else of Jinja templates use.
"""

import json
import os
import tempfile
from pathlib import Path

import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?<>|/_[]{}\"':;-"

# --- Tokenizers -------------------------------------------------------------------------------------------------------


def byte_level():
    """Byte-level BPE with few merges, some of white space and punctuation: they reach over the edges of texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("<", "|"), ("|", ">"), ("Ġ", "Ġ"), ("h", "i")]
    vocab = {token: i for i, token in enumerate(alphabet)}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe():
    """As Llama 2's: a space before the text, bytes where the vocabulary has no character."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token in ["▁", *LETTERS, "▁t", "he", "▁the", "▁▁"]:
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def unigram(scheme, byte_fallback):
    """A unigram model in which the marks are pieces that the text could take."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + c, -5.0) for c in LETTERS[:26]] + [(c, -5.0) for c in LETTERS] + [("▁the", -4.0), ("he", -6.0)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    metaspace = {"replacement": "▁", "prepend_scheme": scheme}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    if byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**metaspace)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "sentencepiece-bpe": sentencepiece_bpe,
    "unigram": lambda: unigram("always", False),
    "unigram-first": lambda: unigram("first", False),
    "unigram-bytes": lambda: unigram("first", True),
}

# --- Templates --------------------------------------------------------------------------------------------------------

CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_END
CHATML_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML_TURN + "{% endfor %}" + CHATML_END)
CHATML_GENERATION = """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Tools!\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}
{%- if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- else %}{{ ('<｜User｜>' if m.role == 'user' else '') + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
NANOCHAT = """{{- '<|bos|>' }}{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{%- set ns.system = m.content + '\\n\\n' %}
{%- elif m.role == 'user' %}{{- '<|user_start|>' + ns.system + m.content + '<|user_end|>' }}{%- set ns.system = '' %}
{%- else %}{{- '<|assistant_start|>' }}{%- generation %}{{- m.content + '<|assistant_end|>' }}{%- endgeneration %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{%- endif %}"""


# The same text with the answers marked: what the assistant wrote by transformers' account, where the template is silent.
MARKED = {
    "chatml": CHATML_GENERATION,
    "llama3": LLAMA3.replace(
        "+ '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}",
        "+ '<|end_header_id|>\\n\\n' }}{% if message.role == 'assistant' %}{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}"
        "{% endgeneration %}{% else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}"),
    "qwen2.5": QWEN25.replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{- message.content + '<|im_end|>' }}{% endif %}{{- '\\n' }}"),
    "qwen3": QWEN3.replace("{{- '<|im_start|>' + message.role + '\\n<think>", "{{- '<think>").replace(
        "{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}").replace(
        "{%- if loop.index0 > ns", "{{- '<|im_start|>assistant\\n' }}{% generation %}\n        {%- if loop.index0 > ns").replace(
        "{{- '<|im_end|>\\n' }}", "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"),
    "zephyr": ZEPHYR.replace(
        "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n",
        "{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}\n\n"),
    "phi3": PHI3.replace(
        "m.content + '<|end|>\\n' }}",
        "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}"
        "{% endif %}{{ '\\n' }}"),
    "r1": R1.replace(
        " + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}",
        " }}{% generation %}{{ m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endgeneration %}"),
    "llama2": LLAMA2.replace(
        "{{ ' ' + content.strip() + ' ' + eos_token }}",
        "{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}"),
}


def turns(form, before=""):
    """ChatML in which `form` stands for a message's text."""
    return (before + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}" + form + "{{ '<|im_end|>\\n' }}{% endfor %}"
            + CHATML_END)


FEATURES = {
    "trim": turns("{{ m['content'] | trim }}"),
    "strip": turns("{{ m.content.strip() + '|' + m.content.lstrip() + '|' + m.content.rstrip() + '|' + m.content.strip('h ') }}"),
    "tojson": turns("{{ m['content'] | tojson }}"),
    "tojson-all": turns("{{ m | tojson }}{{ [1, 2.5, true, none, {'a': [], 'b': {}}] | tojson }}"),
    "tojson-indent": turns("{{ {'b': [m.content, 1], 'a': {}} | tojson(indent=2) }}{{ {'b': 1, 'a': [2]} | tojson(indent=4, sort_keys=true) }}"),
    "tojson-ascii": turns("{{ m | tojson(ensure_ascii=true, separators=(',', ':')) }}"),
    "slice": turns("{{ m['content'][:5] }}{{ m.content[-2:] }}{{ m.content[::-1] }}"),
    "test": turns("{{ ('/no_think' if 'the' in m['content'] else '') + m['content'] }}"),
    "upper": turns("{{ m['content'] | upper }}{{ m.content.lower() }}{{ m.content.title() }}"),
    "replace": turns("{{ m['content'] | replace('the', 'a') }}{{ m.content.replace('h', 'H') }}"),
    "startswith": turns("{{ ('!' if m['content'].startswith('hi') else '?') + m['content'] }}"),
    "length": turns("{{ (m['content'] | length | string) + ':' + m['content'] }}"),
    "twice": turns("{{ m['content'] + ' / ' + m['content'] }}"),
    "split": turns("{{ m.content.split(' ') | join('_') }}{{ m.content.split('e')[0] }}{{ m.content.split() | length }}"),
    "values": turns("{{ true }} {{ none }} {{ 1.0 }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ 7 / 2 }} {{ loop.index }}{{ nothing }}{{ m.nothing }}"),
    "concat": turns("{{ m.content ~ 1 ~ true ~ none ~ 2.5 }}"),
    "filters": turns("{{ m.content | default('x') }}{{ [3, 1, 2] | sort | join(',') }}{{ ['a', 'b'] | first }}{{ 'ab' | capitalize }}{{ 'a,b' | list | last }}{{ '3' | int + 1 }}"),
    "format": turns("{{ '%s-%d' | format(m.content, 3) }}"),
    "indent": turns("{{ m.content | indent(2) }}"),
    "escapes": turns("{{ 'tab\\there \\u2581 \\x41 quote\\' back\\\\' }}{{ m.content }}"),
    "generation-set": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{% set text = m.content %}{{ text }}{{ loop.index }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_END,
    "namespace": "{% set ns = namespace(first=true) %}{% for m in messages %}{% if ns.first %}{{ 'Begin. ' }}{% set ns.first = false %}{% endif %}" + CHATML_TURN + "{% endfor %}" + CHATML_END,
    "items": "{% for m in messages %}{% for key, value in m.items() %}{{ key + ': ' + value + ' ' }}{% endfor %}{% for key in m %}{{ key }}{% endfor %}{{ m.get('content') }}{{ m.get('x', 'y') }}{{ m.keys() | list | join }}{% endfor %}" + CHATML_END,
    "macro": "{% macro say(m, end='<|im_end|>') %}{{ '<|im_start|>' + m.role + '\\n' + m.content + end + '\\n' }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}" + CHATML_END,
    "break": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}" + CHATML_TURN + "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}" + CHATML_END,
    "blocks": "{%- for m in messages %}\n    {%- if true %}\n" + CHATML_TURN + "\n    {%- endif %}\n{%- endfor %}\n" + CHATML_END,
    "white-space": "{% for m in messages %}\n  {# a comment #}\n  {% set x = 1 %}\n    {{ m.role }}:\n\t{% if x %}\n {{ m.content }}  \n{% endif %}\n{% endfor %}\n\n" + CHATML_END,
    "tools": "{% if tools %}{{ 'Tools! ' }}{% endif %}{% if documents is defined and documents %}{{ 'Documents! ' }}{% endif %}" + CHATML,
    "kinds": turns("{% if m.content is string %}s{% endif %}{% if m is mapping %}m{% endif %}{% if messages is iterable and messages is sequence %}l{% endif %}{% if m.x is undefined %}u{% endif %}{% if m.content is none %}n{% endif %}{{ m.content }}"),
    "loops": "{% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role %}same {% endif %}{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{{ loop.length }}" + CHATML_TURN + "{% else %}none{% endfor %}" + CHATML_END,
    "select": "{% for m in messages | selectattr('role', 'equalto', 'user') | list %}" + CHATML_TURN + "{% endfor %}{{ messages | map(attribute='role') | join(' ') }}{{ messages | rejectattr('role', 'in', ['user']) | list | length }}" + CHATML_END,
    "blockset": "{% for m in messages %}{% set x %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endset %}{{ x }}{% endfor %}" + CHATML_END,
    "tokens": "{{ bos_token is defined }}{{ pad_token is defined }}{{ eos_token }}" + CHATML,
    "list": [{"name": "tool_use", "template": "{{ 'wrong' }}"}, {"name": "default", "template": CHATML}],
}

CHATML_TOKENS = {"special": ["<|im_start|>", "<|im_end|>"], "plain": [], "settings": {"eos_token": "<|im_end|>"}}
DIRECTORIES = [
    # name, tokenizer, template, added tokens
    ("chatml", "byte-level", CHATML, CHATML_TOKENS),
    ("chatml-default-system", "byte-level", CHATML_DEFAULT, CHATML_TOKENS),
    ("chatml-generation", "byte-level", CHATML_GENERATION, CHATML_TOKENS),
    ("chatml-plain", "byte-level", CHATML,
     {"special": ["<|im_end|>"], "plain": ["<|im_start|>"], "settings": {"eos_token": "<|im_end|>"}}),
    ("llama3", "byte-level", LLAMA3,
     {"special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "plain": [],
      "settings": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}}),
    ("qwen3", "byte-level", QWEN3,
     {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "plain": ["<tool_response>", "</tool_response>", "<think>", "</think>"],
      "settings": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}),
    ("qwen2.5", "byte-level", QWEN25,
     {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"], "plain": [],
      "settings": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}),
    ("phi3", "byte-level", PHI3,
     {"special": ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "plain": [],
      "settings": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}}),
    ("r1", "byte-level", R1,
     {"special": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"], "plain": ["<think>", "</think>"],
      "settings": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜end▁of▁sentence｜>"}}),
    ("zephyr", "sentencepiece-bpe", ZEPHYR, {"special": [], "plain": [], "settings": {"bos_token": "<s>", "eos_token": "</s>"}}),
    ("llama2", "sentencepiece-bpe", LLAMA2, {"special": [], "plain": [], "settings": {"bos_token": "<s>", "eos_token": "</s>"}}),
    ("nanochat", "byte-level", NANOCHAT,
     {"special": ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"], "plain": [],
      "settings": {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}}),
    ("chatml-unigram", "unigram", CHATML_GENERATION, CHATML_TOKENS),
    ("chatml-unigram-first", "unigram-first", CHATML, CHATML_TOKENS),
    ("zephyr-unigram", "unigram-bytes", ZEPHYR, {"special": [], "plain": [], "settings": {"bos_token": "<s>", "eos_token": "</s>"}}),
] + [(f"feature-{name}", "byte-level", template, CHATML_TOKENS) for name, template in FEATURES.items()]

CHATS = [
    [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "the cat."}],
    [
        {"role": "system", "content": "  be kind \n"},
        {"role": "user", "content": "  hi the, \"quick\"\tTom\\Lily\n\n"},
        {"role": "assistant", "content": "naïve 🦊 héé\n\n"},
        {"role": "user", "content": "\ta <b> | c; if x < 3 [and] </i> {y}"},
        {"role": "assistant", "content": " <|im_ <| |> im_end"},
    ],
    [{"role": "user", "content": "the 字 \x1f\u00a0"}, {"role": "assistant", "content": "\x1c ok"}, {"role": "user", "content": ""}, {"role": "assistant", "content": "e"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nhm, the\n</think>\n\nthe cat the cat"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "<think>\nhe\n</think>\n\nhi"},
    ],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}] * 3,
]
TEXTS = ["", " ", "the cat", "the 😀 cat", "字", "A cat sat.", "  two  spaces\n\nnew", "<0x41> x", "▁ Ω\t"]


def ids_of(tokenizer, chat, prompt, **variables):
    try:
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=prompt, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=not prompt and "generation %}" in str(variables.get("chat_template", tokenizer.chat_template)),
            **variables)
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    record = {"ids": list(encoded["input_ids"])}
    if "assistant_masks" in encoded:
        record["mask"] = list(encoded["assistant_masks"])
    return record


def conversation(tokenizer, name, chat):
    record = ids_of(tokenizer, chat, False)
    if name in MARKED and "ids" in record:
        with_mask = ids_of(tokenizer, chat, False, chat_template=MARKED[name])
        assert with_mask["ids"] == record["ids"], (name, chat, tokenizer.decode(record["ids"]), tokenizer.decode(with_mask["ids"]))
        return with_mask
    return record


def directory(folder, name, base, template, tokens):
    tokenizer = TOKENIZERS[base]()
    added = [{"content": t, "special": True} for t in tokens["special"]] + [{"content": t, "special": False} for t in tokens["plain"]]
    tokenizer.add_tokens([AddedToken(**token, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **tokens["settings"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(folder)
    record = {
        "tokenizer": base,
        "added": [{"id": tokenizer.token_to_id(token["content"]), **token} for token in added],
        "settings": settings,
        "conversations": [conversation(loaded, name, chat) for chat in CHATS],
        "prompts": [ids_of(loaded, chat[:-1], True) for chat in CHATS],
    }
    if "enable_thinking" in str(template):
        for thinking in (True, False):
            record[f"prompts_thinking_{thinking}".lower()] = [ids_of(loaded, chat[:-1], True, enable_thinking=thinking) for chat in CHATS]
    return record


def smollm2(folder):
    """Conversations by a real model's own files, with the answers marked in its template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert tokenizer.chat_template.count(turn) == 1
    answer = "{{ message['content'] + '<|im_end|>' }}"
    with_marks = tokenizer.chat_template.replace(
        turn, "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}" + answer
        + "{% endgeneration %}{% else %}" + answer + "{% endif %}{{ '\n' }}")
    record = []
    for chat in CHATS:
        plain, marked = ids_of(tokenizer, chat, False), ids_of(tokenizer, chat, False, chat_template=with_marks)
        assert plain["ids"] == marked["ids"]
        record.append(marked)
    return {"conversations": record, "prompts": [ids_of(tokenizer, chat[:-1], True) for chat in CHATS]}


def tokenizer_record(base):
    tokenizer = TOKENIZERS[base]()
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    return {"file": json.loads(tokenizer.to_str()), "ids": ids, "texts": [tokenizer.decode(row) for row in ids]}


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "fixtures" / "chat_templates.json"
    versions = f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, jinja2 {jinja2.__version__}"
    record = {"made_with": versions, "chats": CHATS, "texts": TEXTS, "tokenizers": {}, "directories": {}}
    for base in TOKENIZERS:
        record["tokenizers"][base] = tokenizer_record(base)
    for name, base, template, tokens in DIRECTORIES:
        with tempfile.TemporaryDirectory() as folder:
            record["directories"][name] = directory(Path(folder), name, base, template, tokens)
    record["smollm2"] = smollm2(os.environ["KINDLING_SMOLLM2"]) if "KINDLING_SMOLLM2" in os.environ else json.loads(path.read_text())["smollm2"]
    path.write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
