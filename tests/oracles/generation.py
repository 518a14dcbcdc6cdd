"""Writes ../fixtures/generation.json: what transformers' generation makes of a small GPT-2 and of rows of logits.

usage: python generation.py     (made with transformers 5.23.0, torch 2.15.0; versions are also in the file)

The model's weights need no file: element `i` of the `t`-th parameter, both counted from 0 and the parameters in the
order of PARAMETERS, is `scale · sin(12.9898·(i + 1) + 78.233·t)`, plus 1 for the gains of the norms.
Only cases whose tokens float32 and float64 agree on are kept, so that rounding cannot flip a decision.
"""

import json
import os

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

VOCAB, D, LAYERS, HEADS, CONTEXT = 40, 16, 2, 2, 48
SCALE = 0.6
# Ours -> Hugging Face. Both store linear weights as [in, out].
PARAMETERS = [("token_embedding", "transformer.wte.weight"), ("position_embedding", "transformer.wpe.weight")]
for layer in range(LAYERS):
    for ours, theirs in [("norm_1.gamma", "ln_1.weight"), ("norm_1.beta", "ln_1.bias"),
                         ("attention.qkv.weight", "attn.c_attn.weight"), ("attention.qkv.bias", "attn.c_attn.bias"),
                         ("attention.proj.weight", "attn.c_proj.weight"), ("attention.proj.bias", "attn.c_proj.bias"),
                         ("norm_2.gamma", "ln_2.weight"), ("norm_2.beta", "ln_2.bias"),
                         ("mlp.up.weight", "mlp.c_fc.weight"), ("mlp.up.bias", "mlp.c_fc.bias"),
                         ("mlp.down.weight", "mlp.c_proj.weight"), ("mlp.down.bias", "mlp.c_proj.bias")]:
        PARAMETERS.append((f"blocks.{layer}.{ours}", f"transformer.h.{layer}.{theirs}"))
PARAMETERS += [("final_norm.gamma", "transformer.ln_f.weight"), ("final_norm.beta", "transformer.ln_f.bias")]


def make_model(dtype):
    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=D, n_layer=LAYERS, n_head=HEADS,
                        bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval().to(dtype)
    state = model.state_dict()
    for t, (ours, theirs) in enumerate(PARAMETERS):
        shape = state[theirs].shape
        values = SCALE * np.sin(12.9898 * (np.arange(state[theirs].numel()) + 1.0) + 78.233 * t)
        if ours.endswith("gamma"):
            values += 1.0
        # Through float32, which is what the other side holds.
        state[theirs].copy_(torch.tensor(values.astype(np.float32)).reshape(shape).to(dtype))
    return model


def generate(model, prompt, beams, length_penalty, repetition_penalty, eos, max_new):
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                         max_new_tokens=max_new, num_beams=beams, do_sample=False, early_stopping=False,
                         length_penalty=length_penalty if beams > 1 else None, repetition_penalty=repetition_penalty,
                         eos_token_id=eos or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    new = out.sequences[0, len(prompt):].tolist()
    for i, token in enumerate(new):
        if token in eos:
            new = new[:i + 1]
            break
    return new, out.sequences_scores[0].item() if beams > 1 else None


def beam_cases():
    torch.manual_seed(0)
    single, double = make_model(torch.float32), make_model(torch.float64)
    cases = []
    for prompt in [[3], [17, 5, 30], [1, 2, 3, 4, 5, 6, 7, 8]]:
        plain, _ = generate(single, prompt, 4, 1.0, 1.0, [], 20)
        for beams in [1, 2, 3, 4, 7]:
            for length_penalty in [-1.0, 0.0, 0.5, 1.0, 2.0] if beams > 1 else [1.0]:
                for repetition_penalty in [1.0, 1.3]:
                    for eos in [[], [plain[4]], sorted({plain[2], plain[9], 11})]:
                        for max_new in [6, 20]:
                            args = (prompt, beams, length_penalty, repetition_penalty, eos, max_new)
                            (new, score), (new_double, _) = generate(single, *args), generate(double, *args)
                            if new == new_double:
                                cases.append({"prompt": prompt, "beams": beams, "length_penalty": length_penalty,
                                              "repetition_penalty": repetition_penalty, "eos": eos,
                                              "max_new_tokens": max_new, "new_tokens": new, "score": score})
    return cases


def filter_cases():
    generator = torch.Generator().manual_seed(1)
    cases = []
    for vocab in [5, 30, 300]:
        for temperature, top_k, top_p, penalty in [(1.0, 0, 1.0, 1.0), (0.7, 4, 1.0, 1.0), (1.3, 0, 0.9, 1.0),
                                                   (0.9, 20, 0.6, 1.0), (1.0, 3, 0.95, 1.4), (0.5, 0, 0.3, 0.8),
                                                   (2.0, 1, 0.01, 1.0), (1.0, 1000, 0.999, 1.1)]:
            logits = 2 * torch.randn(1, vocab, generator=generator)
            prompt = torch.randint(0, vocab, (1, 6), generator=generator)
            chain = LogitsProcessorList()
            if penalty != 1.0:
                chain.append(RepetitionPenaltyLogitsProcessor(penalty))
            if temperature != 1.0:
                chain.append(TemperatureLogitsWarper(temperature))
            if top_k:
                chain.append(TopKLogitsWarper(top_k))
            if top_p < 1.0:
                chain.append(TopPLogitsWarper(top_p))
            probs = torch.softmax(chain(prompt, logits.clone()).double(), -1)
            cases.append({"logits": logits[0].tolist(), "prompt": prompt[0].tolist(), "temperature": temperature,
                          "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty, "probs": probs[0].tolist()})
    return cases


def round_floats(value):
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = beam_cases()
    fixture = {"transformers": transformers.__version__, "torch": torch.__version__,
               "model": {"vocab_size": VOCAB, "d_model": D, "n_layers": LAYERS, "n_heads": HEADS,
                         "max_seq_len": CONTEXT, "scale": SCALE, "parameters": [ours for ours, _ in PARAMETERS]},
               "searches": cases, "filters": filter_cases()}
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "generation.json")
    with open(path, "w") as file:
        # One case a line: small, and a change shows in a diff.
        lines = []
        for key, value in round_floats(fixture).items():
            if isinstance(value, list):
                items = ",\n".join("  " + json.dumps(item) for item in value)
                lines.append(f'"{key}": [\n{items}\n]')
            else:
                lines.append(f'"{key}": {json.dumps(value)}')
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    print(len(cases), "searches")
