"""Writes ../fixtures/dpo.json and ../fixtures/dpo.safetensors: a few steps of TRL's DPOTrainer on a tiny GPT-2.

usage: pip install torch trl==1.12.0 && python dpo.py
(made with trl 1.12.0, transformers 5.23.0, torch 2.15.0; versions are also in the file)

The trainer runs as it is, in float64, on token ids that are given to it: those of the tests' byte tokenizer, a byte's id
being its value, with the special tokens behind. Every step is one batch of all pairs, so the order of the data does not
matter. The model's configuration has dropout, which both sides turn off.

TRL 1.12.0 has label smoothing no more in its loss `sigmoid`; the formula that earlier versions had there is that of `aot`
over batches of one pair, where nothing is there to be sorted.
"""

import json
import os
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

BOS, PAD, USER, ASSISTANT, END = 256, 257, 259, 260, 261
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures")
N_STEPS = 5
LR = 3e-3

PAIRS = [
    ("say a", "aaaa", "bbb"),
    ("and now", "a", "bbbbbb!"),
    ("b?", "no, a", "b"),
    ("what does the fox see?", "a boat", "a boat and a tree"),
    ("more", "aa ba", "ba aa"),
]


def ids(text):
    return list(text.encode())


def record(prompt, chosen, rejected):
    return {
        "prompt_ids": [BOS, USER, *ids(prompt), END, ASSISTANT],
        "chosen_ids": [*ids(chosen), END],
        "rejected_ids": [*ids(rejected), END],
    }


class OnIds(trl.DPOTrainer):
    """The trainer on a data set that is tokenised already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def initial():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=262, n_positions=48, n_embd=8, n_layer=2, n_head=2, bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )
    model = GPT2LMHeadModel(config)
    # Larger weights than GPT-2 begins with, rounded to what the fixture holds: otherwise all pairs are alike.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weight * 8 if weight.dim() == 2 else weight + torch.randn_like(weight) * 0.1)
    return model.double()


def train(model, loss_type, beta, label_smoothing, one_by_one):
    set_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": END}, "<pad>")),
                                        pad_token="<pad>", eos_token="<end>")
    reference = GPT2LMHeadModel(model.config).double()
    reference.load_state_dict(model.state_dict())
    n = len(PAIRS)
    with tempfile.TemporaryDirectory() as out:
        args = trl.DPOConfig(
            output_dir=out, loss_type=[loss_type], beta=beta, label_smoothing=label_smoothing, max_steps=N_STEPS,
            per_device_train_batch_size=1 if one_by_one else n, gradient_accumulation_steps=n if one_by_one else 1,
            learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
            adam_epsilon=1e-5, max_grad_norm=1.0, logging_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=None,
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        )
        trainer = OnIds(model, ref_model=reference, args=args, processing_class=tokenizer,
                        train_dataset=Dataset.from_list([record(*pair) for pair in PAIRS]))
        trainer.train()
    names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected"]
    return [{name: log[name] for name in names} for log in trainer.state.log_history if "loss" in log]


def weights(model, prefix):
    # The head is tied to the embedding.
    return {f"{prefix}/{name}": weight.detach().float().clone() for name, weight in model.named_parameters()}


start = initial()
state = {name: weight.clone() for name, weight in start.state_dict().items()}
tensors = weights(start, "initial")
cases = []
for name, loss_type, beta, label_smoothing, one_by_one, settings in [
    ("sigmoid", "sigmoid", 0.1, 0.0, False, {"loss": "sigmoid"}),
    ("smoothed", "aot", 0.25, 0.1, True, {"loss": "sigmoid", "label_smoothing": 0.1}),
    ("ipo", "ipo", 0.5, 0.0, False, {"loss": "ipo"}),
    ("averaged", "sigmoid_norm", 2.0, 0.0, False, {"loss": "sigmoid", "average_log_probs": True}),
]:
    model = initial()
    # In float64 from float32 values, which is what the fixture has.
    model.load_state_dict({key: value.float().double() for key, value in state.items()})
    steps = train(model, loss_type, beta, label_smoothing, one_by_one)
    cases.append({"name": name, "trl": loss_type, "dpo": {**settings, "beta": beta}, "steps": steps})
    tensors.update(weights(model, name))

fixture = {
    "made_with": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
    "lr": LR,
    "pairs": [dict(zip(["prompt", "chosen", "rejected"], pair), **record(*pair)) for pair in PAIRS],
    "config": json.loads(start.config.to_json_string(use_diff=False)),
    "cases": cases,
}
with open(os.path.join(HERE, "dpo.json"), "w") as file:
    json.dump(fixture, file, indent=1)
    file.write("\n")
save_file(tensors, os.path.join(HERE, "dpo.safetensors"))
