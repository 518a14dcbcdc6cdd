"""Writes ../fixtures/peft_roundtrip*: what PEFT computes from bases and adapters that Kindling wrote.

pip install torch transformers peft safetensors numpy && python peft_roundtrip.py
Recorded with PEFT 0.21.2, transformers 5.23.0, torch 2.15.0. The script has Cargo write the directories
(tests/parity/adapters.rs), has PEFT find each base by what the adapter says of it, and fails if one of the libraries
warns of anything but the head that a reward model's base lacks. Numbers are computed in float64.
"""

import hashlib
import json
import logging
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

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
    """The adapted model in float64, and everything the libraries had to say about it."""
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    is_score = settings["task_type"] == "SEQ_CLS"
    collector = Collector()
    logger = transformers.utils.logging.get_logger("transformers")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if is_score:
            # The one thing that is expected to be missing is the head, which the adapter brings.
            base = AutoModelForSequenceClassification.from_pretrained(
                settings["base_model_name_or_path"], num_labels=1, pad_token_id=22
            )
            logger.addHandler(collector)
            model = PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
        else:
            logger.addHandler(collector)
            model = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter", is_trainable=True)
    logger.removeHandler(collector)
    said = collector.messages + [str(warning.message) for warning in caught]
    # PEFT itself asks transformers under an older name.
    said = [message for message in said if "`is_gradient_checkpointing` is deprecated" not in message]
    return model.double().eval(), is_score, said


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(directory):
    model, is_score, said = load(directory)
    given = json.loads((directory / "input.json").read_text())
    ids = torch.tensor(given["input_ids"])
    entry = {
        "base_sha256": sha256(directory / "base" / "model.safetensors"),
        "adapter_sha256": sha256(directory / "adapter" / "adapter_model.safetensors"),
        "warnings": said,
    }
    if is_score:
        entry["scores"] = rounded(model(ids).logits[:, 0].tolist())
        return entry, None
    result = model(ids, labels=ids)
    result.loss.backward()
    entry["logits"] = rounded(result.logits.tolist())
    entry["loss"] = result.loss.item()
    trained = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return entry, {name: grad.float().contiguous() for name, grad in trained.items()}


def main():
    with tempfile.TemporaryDirectory() as written:
        command = ["cargo", "test", "--release", "-p", "pipeline-tests", "--test", "parity", "--", "--ignored", "--exact"]
        subprocess.run(
            [*command, "adapters::write_the_adapters_for_the_oracle"],
            cwd=ROOT, check=True, env={**os.environ, "KINDLING_ORACLE_DIR": written},
        )
        models = {}
        for directory in sorted(Path(written).iterdir()):
            models[directory.name], grads = record(directory)
            print(directory.name, models[directory.name]["warnings"] or "no warnings")
            if grads:
                path = FIXTURES / f"peft_roundtrip-{directory.name}.safetensors"
                save_file(grads, path)
                path.chmod(0o644)
    versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"written_by": "tests/oracles/peft_roundtrip.py", **versions, "models": models})
    (FIXTURES / "peft_roundtrip.json").write_text(text + "\n")
    assert not any(entry["warnings"] for entry in models.values()), "a library warned, see above"


if __name__ == "__main__":
    main()
