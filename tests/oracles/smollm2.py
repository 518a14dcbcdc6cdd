"""Writes ../fixtures/smollm2.json: what transformers makes of SmolLM2-135M-Instruct.

usage: KINDLING_SMOLLM2=DIR python smollm2.py     (made with transformers 5.23.0, torch 2.15.0; versions are also in the file)

Greedy answers to ten prompts in the model's own chat format, with how far the best logit is ahead of the second at every
token, and the log-probabilities of a page of text. The weights are the model's own and are not part of this repository.
"""

import hashlib
import json
import os

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW = 48
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about autumn.",
    "Explain in two sentences why the sky is blue.",
    "I just lost my keys and I am late for work.",
    "Translate into French: the cat sleeps on the chair.",
    "What is 17 + 26?",
    "Give me three names for a bakery.",
    "Who wrote \"Pride and Prejudice\"?",
    "Write a Python function that reverses a string.",
    "Café, naïve, 東京 – what do these words mean? 🙂",
]
# Jane Austen, Pride and Prejudice (1813), chapter 1.
PAGE = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in \
the minds of the surrounding families, that he is considered the rightful property of some one or other of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of England; that \
he came down on Monday in a chaise and four to see the place, and was so much delighted with it that he agreed with Mr. Morris \
immediately; that he is to take possession before Michaelmas, and some of his servants are to be in the house by the end of next week."
"""

torch.set_num_threads(2)
directory = os.environ["KINDLING_SMOLLM2"]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
with open(os.path.join(directory, "model.safetensors"), "rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()

answers = []
for prompt in PROMPTS:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
    out = model.generate(torch.tensor([ids]), max_new_tokens=MAX_NEW, do_sample=False, repetition_penalty=1.0, output_logits=True,
                         return_dict_in_generate=True)
    lead = []
    for logits in out.logits:
        best = logits[0].topk(2).values
        lead.append(round((best[0] - best[1]).item(), 5))
    answer = out.sequences[0, len(ids):].tolist()
    print(repr(prompt), "->", repr(tokenizer.decode(answer)), min(lead))
    answers.append({"prompt": prompt, "prompt_ids": ids, "answer_ids": answer, "lead": lead})

page = tokenizer(PAGE, add_special_tokens=False).input_ids
with torch.inference_mode():
    log_probs = model(torch.tensor([page])).logits[0].double().log_softmax(-1)
of_targets = log_probs[:-1].gather(1, torch.tensor(page[1:])[:, None])[:, 0]

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../fixtures/smollm2.json"), "w") as file:
    json.dump({
        "transformers": transformers.__version__, "torch": torch.__version__, "weights_sha256": sha256, "max_new": MAX_NEW,
        "answers": answers, "page": PAGE, "page_ids": page, "page_log_probs": [round(x, 6) for x in of_targets.tolist()],
    }, file, ensure_ascii=False)
    file.write("\n")
