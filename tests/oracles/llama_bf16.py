"""Writes what transformers computes from a Llama with bf16 weights, biases everywhere and shards:

    python tests/oracles/llama_bf16.py ../shared/fixtures/llama-untied-biased-bf16-sharded > tests/fixtures/llama_bf16.json

The numbers beside that directory were made by a model cast to bf16 as a whole, the angles of its positions with it;
transformers keeps them in f32 when it loads a directory, as this does.
"""

import json
import sys

import torch
import transformers

folder = sys.argv[1]
ids = torch.tensor(json.load(open(f"{folder}/expected.json"))["input_ids"])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
result = model(ids, labels=ids)
result.loss.backward()
statistics = {name: [p.grad.sum().item(), p.grad.norm().item()] for name, p in model.named_parameters()}
logits = [[[round(x, 6) for x in position] for position in row] for row in result.logits.tolist()]
print(
    json.dumps(
        {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "logits": logits,
            "loss": result.loss.item(),
            "grad_sum_and_norm": statistics,
        }
    )
)
