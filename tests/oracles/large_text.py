"""Makes a large corpus of files of all formats, to measure what pretraining on it takes (docs/data.md).

Documents are sentences of the given texts in random order, with invented words among them, so that the vocabulary keeps
growing as that of real text does. Every file holds 125 MB of text, in turn .txt, .jsonl, .jsonl.gz and .parquet.

    python tests/oracles/large_text.py DIR GIGABYTES TEXT...

Needs pyarrow 26. The same arguments give the same files.
"""

import gzip
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILE_BYTES = 125_000_000
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "an", "el", "or")]


def documents(rng: random.Random, sentences: list[str]):
    """Texts of about a kilobyte, `FILE_BYTES` in all."""
    left = FILE_BYTES
    while left > 0:
        parts = rng.choices(sentences, k=rng.randrange(4, 24))
        for _ in range(2):
            word = "".join(rng.choices(SYLLABLES, k=rng.randrange(2, 5)))
            parts.insert(rng.randrange(len(parts)), f"{word.capitalize()} said so.")
        text = " ".join(parts)
        left -= len(text)
        yield text


def write(path: Path, texts) -> None:
    """Writes one file in the format of its ending."""
    if path.suffix == ".txt":
        with path.open("w") as file:
            file.writelines(text + "\n\n" for text in texts)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), path, row_group_size=20_000)
    else:
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as file:
            file.writelines(lines)


def main() -> None:
    out, gigabytes, inputs = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    out.mkdir(parents=True, exist_ok=True)
    words = " ".join(" ".join(Path(name).read_text().split()) for name in inputs)
    sentences = sorted({f"{part}." for part in words.split(". ") if 8 < len(part) < 300})
    for i in range(round(gigabytes * 1e9 / FILE_BYTES)):
        ending = (".txt", ".jsonl", ".jsonl.gz", ".parquet")[i % 4]
        path = out / f"part-{i:03}{ending}"
        if not path.exists():
            write(path, documents(random.Random(i), sentences))


main()
