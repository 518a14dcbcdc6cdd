"""Writes ../fixtures/tokenizer.json: what the Python side of `tokenizers` learns from a text, and how it encodes.

pip install tokenizers==0.23.1 && python tokenizer.py
"""

import hashlib
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ["<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WHO = ["the fox", "a small bird", "Mia", "the old baker", "his sister", "Tom's dog", "nobody"]
DID = ["found", "painted", "lost", "couldn't lift", "was looking for", "sang about", "they're hiding"]
WHAT = ["a red boat", "the key", "12 lemons", "an umbrella", "the moon", "3,141 marbles", "a café in Zürich", "naïve 🦊s"]
END = [".", "!", "?\n", "...", " — and slept.\n\n", ";\tthen left.", ".  \n"]
PROBES = [
    "", " ", "The fox found the fox's boat!", "  two  spaces\n\n\nthree lines\n", "naïve café — 🦊🦊 ẞ 你好", "12345 it's they'll I'd",
    "don't<|user|>do<|end|>that", "\x00\x7f\u00a0\u2028", "unseen Ωords qqqzzz",
]


def documents():
    state = 1
    for _ in range(60):
        words = []
        for _ in range(5):
            for choices in (WHO, DID, WHAT, END):
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                words.append(choices[(state >> 33) % len(choices)])
        yield " ".join(words)


def without_specials(tokenizer, text):
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def bpe(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {"vocab_size": vocab_size, "merges": merges, "ids": [without_specials(tokenizer, text) for text in PROBES]}


def wordpiece(texts, vocab_size):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # The library numbers the characters inside words in the order of a randomly seeded hash map, and breaks ties by
    # these numbers, so two runs differ. Named as special tokens, they are numbered in this order.
    words = [word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    inner = [f"##{c}" for c in sorted({c for word in words for c in word[1:]})]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - len(SPECIALS), special_tokens=["[UNK]", *inner], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # They are special no more.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "[UNK]"]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    ids = [without_specials(tokenizer, text) for text in PROBES]
    vocab = dict(sorted(tokenizer.get_vocab().items()))
    return {"vocab_size": vocab_size, "vocab": vocab, "ids": ids, "texts": [tokenizer.decode(i) for i in ids]}


def of_stories(vocab_size):
    """What is learned from real stories, of which only a hash is kept."""
    text = (Path(__file__).parent.parent.parent.parent / "shared/data/stories/pretrain.val.txt").read_text()
    texts = [part.strip("\r\n") for part in text.split("<|endoftext|>") if part.strip()]
    learned = bpe(texts, vocab_size)
    merges = "\n".join(" ".join(pair) for pair in learned["merges"])
    return {"vocab_size": vocab_size, "merges_sha256": hashlib.sha256(merges.encode()).hexdigest()}


if __name__ == "__main__":
    texts = list(documents())
    fixture = {
        "written_by": f"tests/oracles/tokenizer.py, tokenizers {tokenizers.__version__}",
        "documents": texts,
        "probes": PROBES,
        "bpe": bpe(texts, 400),
        "wordpiece": wordpiece(texts, 200),
        "stories": of_stories(1500),
    }
    path = Path(__file__).parent.parent / "fixtures" / "tokenizer.json"
    path.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")
