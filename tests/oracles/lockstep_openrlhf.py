"""Writes ../fixtures/lockstep-openrlhf/: three iterations of OpenRLHF's PPO, to be made again from the same tokens.

usage: pip install torch transformers peft && pip download --no-deps openrlhf==0.11.2 && python lockstep_openrlhf.py *.whl
(made with openrlhf 0.11.2, transformers 5.24.0, torch 2.15.0; versions are also in the file)

OpenRLHF trains with Ray, DeepSpeed and vLLM, none of which runs on a CPU alone. Its own classes run here all the same: the loop of
`BasePPOTrainer`, `RemoteExperienceMaker`, the actors and trainers of policy and critic, their models, losses and replay buffers.
What they import from those three is replaced: a call of Ray's is the call itself, and DeepSpeed's part of a step is PyTorch's AdamW.
Responses are sampled by transformers in place of vLLM, and handed over in the form in which OpenRLHF's generator returns them.

The models are float64, of which OpenRLHF makes float32 logits. They begin as those of lockstep.py,
whose fixture has them. Recorded are the prompts and tokens, what OpenRLHF logs, and the weights of policy and value model at the end.
"""

import copy
import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import zipfile
from types import SimpleNamespace as Section
from unittest.mock import MagicMock

import torch
import transformers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that are imported and not used here."""

    ROOTS = {"aiohttp", "deepspeed", "flash_attn", "pylatexenc", "ray", "torchdata", "vllm"}

    def find_spec(self, name, path=None, target=None):
        # OpenRLHF asks whether flash-attention's own loss is there, and goes on without it.
        absent = name.split(".")[0] in self.ROOTS and not name.startswith("flash_attn.ops")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        if spec.name == "ray":
            module.remote = lambda *args, **kwargs: (lambda cls: cls) if kwargs else args[0]
            module.get = lambda refs: refs
            module.put = lambda value: value
        return module

    def exec_module(self, module):
        pass


wheel = zipfile.ZipFile(next(p for p in sys.argv[1:] if "openrlhf" in os.path.basename(p)))
unpacked = tempfile.mkdtemp()
for name in wheel.namelist():
    if "/purelib/openrlhf/" in name or name.startswith("openrlhf/"):
        inner = name[name.index("openrlhf/") if name.startswith("openrlhf/") else name.index("purelib/") + 8:]
        os.makedirs(os.path.join(unpacked, os.path.dirname(inner)), exist_ok=True)
        with open(os.path.join(unpacked, inner), "wb") as file:
            file.write(wheel.read(name))
version = next(name for name in wheel.namelist() if ".dist-info/" in name).split("/")[0].split("-")[1].removesuffix(".dist")
sys.path.insert(0, unpacked)
sys.meta_path.insert(0, Absent())
torch.compile = lambda function: function
torch.cuda.current_device = lambda: 0
torch.cuda.empty_cache = torch.cuda.synchronize = lambda: None

from openrlhf.models.actor import Actor  # noqa: E402
from openrlhf.models.model import _get_critic_model, _get_reward_model  # noqa: E402
from openrlhf.trainer.ppo_trainer import BasePPOTrainer  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ray import ppo_actor, ppo_critic  # noqa: E402

Experience.to_device = lambda self, device: self  # there is one device
ppo_actor.torch_dist_barrier_and_cuda_sync = lambda: None

torch.set_default_dtype(torch.float64)
torch.manual_seed(5)
PAD, EOS, LENGTH, BATCH, ITERATIONS = 0, 1, 10, 12, 3
SETTINGS = dict(
    learning_rate=5e-3, adam_betas=(0.9, 0.95), adam_epsilon=1e-5, num_ppo_epochs=4, kl_coef=0.05, gamma=0.99, lam=0.95, temperature=0.7, cliprange=0.2,
    cliprange_value=0.5, reward_clip=10.0,
)

folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "lockstep-openrlhf")
given = os.path.join(folder, "..", "lockstep")
policy = GPT2LMHeadModel.from_pretrained(os.path.join(given, "policy"), dtype=torch.float64)
reward_model = GPT2ForSequenceClassification.from_pretrained(os.path.join(given, "reward-model"), dtype=torch.float64)


def scalar(make):
    """A reward model or a critic as OpenRLHF builds them, with the weights of `reward_model`."""
    model = make(GPT2PreTrainedModel, GPT2Model)(GPT2Config(**{**reward_model.config.to_dict(), "normalize_reward": False}))
    model.load_state_dict(reward_model.state_dict())
    return model.eval()


def actor(model):
    made = Actor(model, temperature=SETTINGS["temperature"])
    made.packing_samples = False
    return made


args = Section(
    actor=Section(
        eps_clip_low_high=(SETTINGS["cliprange"],) * 2, dual_clip=None, loss_agg_mode="token-mean", policy_loss_type="ppo",
        aux_loss_coef=0.0, entropy_coef=None,
    ),
    algo=Section(
        advantage=Section(
            estimator="gae", gamma=SETTINGS["gamma"], lambd=SETTINGS["lam"], no_std_norm=False, is_correction_level="off",
            is_correction_mode="mask", is_correction_gating="ratio", is_correction_threshold=(0.5, 5.0),
        ),
        kl=Section(use_loss=False, estimator="k1", init_coef=SETTINGS["kl_coef"], target=None, unbiased_gradient=False),
    ),
    ckpt=Section(best_metric_key="none"),
    critic=Section(freezing_steps=-1),
    ds=Section(packing_samples=False, ring_attn_size=1, tensor_parallel_size=1, enable_sleep=False),
    logger=Section(wandb=Section(key=None), tensorboard_dir=None),
    reward=Section(clip_range=(-SETTINGS["reward_clip"], SETTINGS["reward_clip"]), overlong_buffer_len=None, stop_properly_penalty_coef=None),
    rollout=Section(micro_batch_size=4, n_samples_per_prompt=1, batch_size=BATCH),
    train=Section(
        max_epochs=SETTINGS["num_ppo_epochs"], dynamic_batch_enable=False, colocate_all=False, colocate_actor_ref=False,
        colocate_critic_reward=False, async_enable=False,
    ),
    vllm=Section(sync_backend="gloo"),
)


class Strategy:
    """DeepSpeed's part of a step, on one process without accumulation and clipping."""

    args, ring_attn_group, accumulated_gradient = args, None, 1
    is_rank_0 = lambda self: False
    all_reduce = lambda self, status: status
    get_grad_norm = lambda self, model: 0.0
    backward = lambda self, loss, model, optimizer: loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name):
        optimizer.step()
        optimizer.zero_grad()


class Group:
    """A `RayActorGroup` of one actor."""

    def __init__(self, actor):
        self.actor = actor

    def async_run_method(self, method_name, **kwargs):
        return [getattr(self.actor, method_name)(**kwargs)]

    def async_run_method_batch(self, method_name, **kwargs):
        count = len(next(iter(kwargs.values())))
        results = [getattr(self.actor, method_name)(**{name: rows[i] for name, rows in kwargs.items()}) for i in range(count)]
        return [results]


class Frozen:
    """What `ReferenceModelActor` and `RewardModelActor` do."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def forward(self, sequences, attention_mask, action_mask=None, pad_sequence=None):
        masks = [] if action_mask is None else [action_mask]
        return self.model(sequences, *masks, attention_mask=attention_mask)


def trained(cls, trainer_class, field, model, **settings):
    """`PolicyModelActor` or `CriticModelActor` after its set-up of Ray and DeepSpeed."""
    made = cls.__new__(cls)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS["learning_rate"], betas=SETTINGS["adam_betas"], eps=SETTINGS["adam_epsilon"], weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    made.strategy = Strategy()
    setattr(made, field, model)
    names = {"actor": dict(ema_model=None, actor_optim=optimizer, actor_scheduler=scheduler), "critic": dict(critic_optim=optimizer, critic_scheduler=scheduler)}
    made.trainer = trainer_class(made.strategy, model, **names[field], micro_train_batch_size=BATCH, dataloader_pin_memory=False, **settings)
    return made


# The actors pass tensors to `torch.cuda.current_device()`, which is the CPU here.
move = torch.Tensor.to
torch.Tensor.to = lambda self, *places, **kwargs: self if places == (0,) else move(self, *places, **kwargs)

learner, critic = actor(policy), scalar(_get_critic_model)
trainer = BasePPOTrainer(
    Strategy(),
    Group(trained(ppo_actor.PolicyModelActor, ppo_actor.ActorPPOTrainer, "actor", learner)),
    Group(trained(ppo_critic.CriticModelActor, ppo_critic.CriticPPOTrainer, "critic", critic, value_clip=SETTINGS["cliprange_value"])),
    Group(Frozen(scalar(_get_reward_model))),
    Group(Frozen(actor(copy.deepcopy(policy)))),
    None,
    Section(pad_token_id=PAD, decode=lambda *_, **__: [""]),
)


def rollout(prompt, response):
    """One sample, as `SamplesGenerator._process_response_into_experience` makes it."""
    ids = torch.tensor(prompt + response)
    actions = torch.zeros(len(ids), dtype=torch.long)
    actions[len(prompt):] = 1
    return Experience(
        sequences=ids[None], attention_mask=torch.ones_like(ids)[None], action_mask=actions[None, 1:], prompts=[""], labels=[""],
        response_length=torch.tensor([len(response)]), truncated=torch.tensor([response[-1] != EOS]), total_length=torch.tensor([len(ids)]),
        info={},
    )


iterations = []
for step in range(ITERATIONS):
    prompts = [torch.randint(3, policy.config.vocab_size, (1 + i % 5,)).tolist() for i in range(BATCH)]
    responses = []
    for prompt in prompts:
        sampled = policy.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=True, temperature=SETTINGS["temperature"], top_k=0, max_new_tokens=LENGTH, eos_token_id=EOS, pad_token_id=PAD)
        responses.append(sampled[0, len(prompt):].tolist())
    status, _ = trainer.train_step([rollout(*pair) for pair in zip(prompts, responses)], step)
    logged = {name: float(status[name]) for name in ["kl", "reward", "return", "policy_loss", "critic_loss", "ppo_clip_ratio"]}
    iterations.append(dict(prompts=prompts, responses=responses, logged=logged))


reward_model.load_state_dict(critic.state_dict())
for name, model in [("policy-after", policy), ("value-after", reward_model)]:
    model.to(torch.float32).save_pretrained(os.path.join(folder, name))
    for file in os.listdir(os.path.join(folder, name)):
        if file not in ["config.json", "model.safetensors"]:
            os.remove(os.path.join(folder, name, file))
with open(os.path.join(folder, "expected.json"), "w") as file:
    made_with = dict(openrlhf=version, transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
    head = json.dumps(dict(made_with=made_with, response_length=LENGTH, end=EOS, settings=SETTINGS))
    file.write(head[:-1] + ', "iterations": [\n' + ",\n".join(json.dumps(iteration) for iteration in iterations) + "\n]}\n")
print(json.dumps([iteration["logged"] for iteration in iterations], indent=1))
