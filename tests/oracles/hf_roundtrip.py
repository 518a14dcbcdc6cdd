"""Writes ../fixtures/hf_roundtrip*: what transformers computes from checkpoints that Kindling wrote.

pip install torch transformers safetensors numpy && python hf_roundtrip.py
Recorded with transformers 5.23.0, torch 2.15.0. The script has Cargo write the checkpoints (tests/parity.rs), loads
each by its Auto class, and fails if transformers warns of anything: missing, unexpected or newly initialised weights,
unknown or deprecated settings. Numbers are computed in float64 from the float32 weights.
"""

import hashlib
import json
import logging
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


class Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def rounded(value):
    return [rounded(x) for x in value] if isinstance(value, list) else round(value, 7)


def load(directory):
    """The model in float64, and everything transformers had to say about it."""
    collector = Collector()
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(collector)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = AutoConfig.from_pretrained(directory)
        is_score = config.architectures[0].endswith("ForSequenceClassification")
        auto = AutoModelForSequenceClassification if is_score else AutoModelForCausalLM
        model, info = auto.from_pretrained(directory, output_loading_info=True)
        generation = GenerationConfig.from_pretrained(directory)
    logger.removeHandler(collector)
    said = collector.messages + [str(warning.message) for warning in caught]
    said += [f"{kind}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    assert type(model).__name__ == config.architectures[0], type(model)
    assert generation.eos_token_id == config.eos_token_id and generation.pad_token_id == config.pad_token_id
    return model.double().eval(), is_score, said


def record(directory):
    model, is_score, said = load(directory)
    given = json.loads((directory / "input.json").read_text())
    ids = torch.tensor(given["input_ids"])
    entry = {
        "class": type(model).__name__,
        "weights_sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "warnings": said,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    if is_score:
        # No mask: the class itself finds the last token that is not `pad_token_id`.
        entry["scores"] = rounded(model(ids).logits[:, 0].tolist())
        entry["score_bias"] = model.config.score_bias
        return entry, None
    result = model(ids, labels=ids)
    result.loss.backward()
    entry["logits"] = rounded(result.logits.tolist())
    entry["loss"] = result.loss.item()
    return entry, {name: p.grad.float().contiguous() for name, p in model.named_parameters()}


def main():
    with tempfile.TemporaryDirectory() as written:
        command = ["cargo", "test", "--release", "-p", "pipeline-tests", "--test", "parity", "--", "--ignored", "--exact"]
        subprocess.run(
            [*command, "write_the_checkpoints_for_the_oracle"],
            cwd=ROOT, check=True, env={**os.environ, "KINDLING_ORACLE_DIR": written},
        )
        models = {}
        for directory in sorted(Path(written).iterdir()):
            models[directory.name], grads = record(directory)
            print(directory.name, models[directory.name]["class"], models[directory.name]["warnings"] or "no warnings")
            if grads:
                path = FIXTURES / f"hf_roundtrip-{directory.name}.safetensors"
                save_file(grads, path)
                path.chmod(0o644)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"written_by": "tests/oracles/hf_roundtrip.py", **versions, "models": models})
    (FIXTURES / "hf_roundtrip.json").write_text(text + "\n")
    assert not any(entry["warnings"] for entry in models.values()), "transformers warned, see above"


if __name__ == "__main__":
    main()
