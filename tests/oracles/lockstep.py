"""Writes ../fixtures/lockstep/: three iterations of TRL's PPOTrainer, to be made again from the same tokens.

usage: pip install trl==1.12.0 transformers datasets && python lockstep.py
(made with trl 1.12.0, transformers 5.23.0, torch 2.15.0; versions are also in the file)

The trainer runs as it is, in float64. Recorded are the models that it begins with, the prompts and tokens that it samples,
what it logs, and the weights of policy and value model at the end.
"""

import copy
import json
import os
import tempfile

import torch
import transformers
import trl
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.set_default_dtype(torch.float64)
torch.manual_seed(5)
VOCAB, PAD, EOS, LENGTH, BATCH = 14, 0, 1, 10, 12
SETTINGS = dict(
    learning_rate=5e-3, num_ppo_epochs=4, num_mini_batches=1, kl_coef=0.05, gamma=0.99, lam=0.95, missing_eos_penalty=1.0,
    temperature=0.7, vf_coef=0.1, cliprange=0.2, cliprange_value=0.2, adam_epsilon=1e-5,
)

config = dict(vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=EOS, pad_token_id=PAD, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
policy = GPT2LMHeadModel(GPT2Config(**config))
reward_model = GPT2ForSequenceClassification(GPT2Config(**config, num_labels=1))
with torch.no_grad():
    for model in [policy, reward_model]:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            # Numbers that float32 holds exactly.
            parameter.copy_(parameter.to(torch.float32).to(torch.float64))
    reward_model.score.weight.mul_(8)
    # Nobody samples padding, which TRL would take for the end: its logit is near −200, by one dimension that is all its own.
    policy.transformer.wte.weight[:, 0] = 0
    policy.transformer.wte.weight[PAD] = 0
    policy.transformer.wte.weight[PAD, 0] = -20
    policy.transformer.ln_f.bias[0] = 10
value_model = copy.deepcopy(reward_model)
begin = {name: copy.deepcopy(model.state_dict()) for name, model in [("policy", policy), ("reward_model", reward_model)]}

words = {f"t{i}": i for i in range(VOCAB)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t13")), pad_token="t0", eos_token="t1", padding_side="left")
prompts = [torch.randint(3, VOCAB, (1 + i % 5,)).tolist() for i in range(3 * BATCH)]
data = Dataset.from_list([{"input_ids": ids} for ids in prompts])

sampled, logged = [], []
original = module.batch_generation


def recording(*args, **kwargs):
    query_responses, logits = original(*args, **kwargs)
    queries = args[1]
    rows = [[token for token in query.tolist() if token != PAD] for query in queries]
    responses = []
    for row in query_responses[:, queries.shape[1]:].tolist():
        end = row.index(EOS) + 1 if EOS in row else len(row)
        responses.append(row[:end])
    sampled.append(dict(prompts=rows, responses=responses))
    return query_responses, logits


module.batch_generation = recording
with tempfile.TemporaryDirectory() as out:
    arguments = trl.experimental.ppo.PPOConfig(
        output_dir=out, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, total_episodes=3 * BATCH,
        response_length=LENGTH, stop_token="eos", bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no",
        report_to="none", num_sample_generations=0, lr_scheduler_type="linear", weight_decay=0.0, seed=5, **SETTINGS,
    )
    trainer = trl.experimental.ppo.PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=copy.deepcopy(policy), reward_model=reward_model,
        train_dataset=data, eval_dataset=data, value_model=value_model,
    )
    trainer.log = lambda metrics, *_: logged.append(dict(metrics))
    trainer.train()

NAMES = ["objective/kl", "objective/entropy", "objective/scores", "loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg"]
folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "lockstep")


def save(name, model, weights):
    """`model` with other weights, in float32."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    model.to(torch.float32).save_pretrained(os.path.join(folder, name))
    for file in os.listdir(os.path.join(folder, name)):
        if file not in ["config.json", "model.safetensors"]:
            os.remove(os.path.join(folder, name, file))


save("policy", policy, begin["policy"])
save("reward-model", reward_model, begin["reward_model"])
save("policy-after", policy, policy.state_dict())
save("value-after", value_model, value_model.state_dict())
with open(os.path.join(folder, "expected.json"), "w") as file:
    iterations = [dict(**batch, logged={name: line[name] for name in NAMES}) for batch, line in zip(sampled, logged)]
    made_with = dict(trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
    head = json.dumps(dict(made_with=made_with, response_length=LENGTH, end=EOS, settings=SETTINGS))
    file.write(head[:-1] + ', "iterations": [\n' + ",\n".join(json.dumps(iteration) for iteration in iterations) + "\n]}\n")
print(json.dumps([iteration["logged"] for iteration in iterations], indent=1))
