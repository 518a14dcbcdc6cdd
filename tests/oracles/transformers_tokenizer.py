"""Writes ../fixtures/transformers_tokenizer.json: what transformers makes of the tokenizers that Kindling saves.

pip install transformers==5.23.0 tokenizers==0.23.1 jinja2
KINDLING_ORACLE_DIR=DIR cargo test --release -p common --lib write_for_the_oracle -- --ignored
python transformers_tokenizer.py DIR
"""

import hashlib
import json
import sys
from pathlib import Path

import jinja2
import tokenizers
import transformers
from transformers import AutoTokenizer

CHATS = [
    [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "a red boat."}],
    [
        {"role": "system", "content": "  found \n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "the fox's boat, naïve 🦊\n\n"},
        {"role": "user", "content": "\ta <b> | c;"},
        {"role": "assistant", "content": "[and]"},
    ],
]


def ids(tokenizer, chat, prompt):
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def record(folder, chats):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A checkpoint has the model's config.json beside the tokenizer: it must not change how the tokenizer loads.
    for model_type in ("gpt2", "openai-gpt"):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        beside = AutoTokenizer.from_pretrained(folder)
        (folder / "config.json").unlink()
        for chat in chats:
            assert ids(beside, chat, False) == ids(tokenizer, chat, False), (folder, model_type)
    template = tokenizer.chat_template
    return {
        "class": type(tokenizer).__name__,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "special_tokens": {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        },
        "conversations": [ids(tokenizer, chat, False) for chat in chats],
        "prompts": [ids(tokenizer, chat[:-1], True) for chat in chats],
    }


if __name__ == "__main__":
    chats = CHATS
    versions = f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, jinja2 {jinja2.__version__}"
    fixture = {
        "written_by": f"tests/oracles/transformers_tokenizer.py, {versions}",
        "chats": chats,
        "kinds": {kind: record(Path(sys.argv[1]) / kind, chats) for kind in ("bpe", "wordpiece", "char", "byte")},
    }
    path = Path(__file__).parent.parent / "fixtures" / "transformers_tokenizer.json"
    path.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")
