"""Writes ../fixtures/dialects.json: what implementations of PPO make of the same log-probabilities, values and scores.

usage: pip install torch numpy && pip download --no-deps trl==1.12.0 openrlhf==0.11.2 verl==0.9.1 && python dialects.py *.whl
(made with torch 2.15.0; versions are also in the file)

TRL, OpenRLHF and verl are run: their functions, and the lines that stand inline in a trainer, are cut out of the wheels
and executed as they are, in float64, without importing the trainers. lm-human-preferences, N+ and DeepSpeed-Chat are no
packages; `formulas` writes their equations down anew in numpy, float64, from the sources that `ppo dialects` names. So
it does for this program's own dialect.

Arranged here: OpenRLHF asks for `.float()`, which is made `.double()`; DeepSpeed-Chat's padding is its end token, so that
its score lands on the end token, and its losses are over all response tokens here as elsewhere.
"""

import __future__
import ast
import json
import os
import re
import sys
import textwrap
import types
import zipfile
from collections import defaultdict

import numpy as np
import torch

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
WHEELS = {name: zipfile.ZipFile(next(p for p in sys.argv[1:] if name in os.path.basename(p))) for name in ["trl", "openrlhf", "verl"]}

GAMMA, LAM, KL_COEF, CLIP, MISSING = 0.99, 0.95, 0.05, 0.2, -1.0
LENGTH = 8  # `response_length`
EOS, PAD, OTHER = 2, 0, 5


def read(wheel, path):
    return next(WHEELS[wheel].read(name) for name in WHEELS[wheel].namelist() if name.endswith(path)).decode()


def run(code, scope):
    exec(compile(code, "<original>", "exec", flags=__future__.annotations.compiler_flag), scope)


def definitions(source, names, scope):
    """Defines functions and classes of a source in `scope`, without their decorators."""
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]
    assert {n.name for n in nodes} == set(names)
    for node in nodes:
        run(ast.get_source_segment(source, node), scope)


def lines(source, first, last):
    """The lines from the one that contains `first` up to, not including, the next one that contains `last`."""
    all_lines = source.splitlines()
    start = next(i for i, line in enumerate(all_lines) if first in line)
    end = next(i for i in range(start + 1, len(all_lines)) if last in all_lines[i])
    return textwrap.dedent("\n".join(all_lines[start:end]))


def numbers(*shape, scale=1.0):
    """Random numbers that float32 holds exactly."""
    return exact(torch.randn(*shape) * scale)


def exact(x):
    return x.to(torch.float32).to(torch.float64)


# The cases: `[response, LENGTH]`, of which a response has `lengths`; values have one place more.


def case(name, lengths, ended):
    n = len(lengths)
    log_probs = -numbers(n, LENGTH).abs()
    values = numbers(n, LENGTH)
    return dict(
        name=name, lengths=lengths, ended=ended, scores=numbers(n, scale=2.0), log_probs=log_probs,
        ref_log_probs=exact(log_probs + numbers(n, LENGTH, scale=0.5)), values=values,
        new_log_probs=exact(log_probs + numbers(n, LENGTH, scale=0.3)), new_values=exact(values + numbers(n, LENGTH, scale=0.3)),
    )


def cases():
    lengths = [8, 3, 5, 1, 8, 6, 2, 4, 1, 8]
    ordinary = case("ordinary", lengths, [length < 8 or i == 4 for i, length in enumerate(lengths)])
    short = case("short", [7, 3, 5, 1, 7, 6, 2, 4, 1, 7], [True] * 10)
    extreme = case("extreme", lengths, [length < 8 or i == 4 for i, length in enumerate(lengths)])
    extreme["scores"] *= 6
    for row, token, log_prob, ref in [(1, 1, -0.25, -14.0), (2, 1, -16.0, -0.5), (5, 0, -0.5, -11.0)]:
        extreme["log_probs"][row, token], extreme["ref_log_probs"][row, token] = log_prob, ref
        extreme["new_log_probs"][row, token] = log_prob + 0.125
    for row, token, ratio in [(0, 2, 1.5), (2, 0, 2.0), (4, 3, 1.75), (5, 2, 1.25), (9, 5, 1.5), (7, 1, 21.5), (8, 0, 22.5), (4, 5, -21.0)]:
        extreme["log_probs"][row, token] = -24.0
        extreme["ref_log_probs"][row, token] = -23.5
        extreme["new_log_probs"][row, token] = -24.0 + ratio
    return [ordinary, short, extreme]


def tokens_of(case, width):
    """Responses as ids, padded after their end."""
    rows = []
    for length, ended in zip(case["lengths"], case["ended"]):
        row = [OTHER] * length + [PAD] * (width - length)
        if ended:
            row[length - 1] = EOS
        rows.append(row)
    return torch.tensor(rows)


def ragged(x, lengths):
    return [torch.as_tensor(x)[i, :n].tolist() for i, n in enumerate(lengths)]


# TRL


def trl(case):
    source = read("trl", "trl/experimental/ppo/ppo_trainer.py")
    scope = {"torch": torch, "nn": torch.nn}
    definitions(source, ["masked_mean", "masked_var", "masked_whiten"], scope)
    width = max(case["lengths"])
    ids = tokens_of(case, width)
    lengths = torch.tensor(case["lengths"])
    args = types.SimpleNamespace(
        kl_coef=KL_COEF, kl_estimator="k1", whiten_rewards=False, gamma=GAMMA, lam=LAM, missing_eos_penalty=-MISSING,
        cliprange=CLIP, cliprange_value=0.2, vf_coef=0.1,
    )
    me = types.SimpleNamespace(args=args, processing_class=types.SimpleNamespace(eos_token_id=EOS))
    cut = lambda name: case[name][:, :width].clone()
    scope.update(
        self=me, args=args, INVALID_LOGPROB=1.0, empty_cache=lambda: None, responses=ids, postprocessed_responses=ids,
        sequence_lengths=lengths - 1, scores=case["scores"].clone(), logprobs=cut("log_probs"), ref_logprobs=cut("ref_log_probs"),
        values=cut("values"),
    )
    run(lines(source, "# Response Processing 3.", "empty_cache()"), scope)
    places = [min(n + 1, width) for n in case["lengths"]]
    leaves = {name: cut(name).requires_grad_() for name in ["new_log_probs", "new_values"]}
    scope.update(
        mb_advantage=scope["advantages"], mb_return=scope["returns"], mb_values=scope["values"], mb_logprobs=scope["logprobs"],
        new_logprobs=leaves["new_log_probs"], vpred_temp=torch.cat([leaves["new_values"], torch.zeros(len(ids), 1)], 1).unsqueeze(-1),
        context_length=1, micro_batch_inds=slice(None),
    )
    run(lines(source, "new_logprobs = torch.masked_fill(", "accelerator.backward(loss)"), scope)
    scope["loss"].backward()
    return dict(
        kl=ragged(scope["kl"], case["lengths"]), scores=scope["scores"].tolist(), rewards=ragged(scope["rewards"], places),
        returns=ragged(scope["returns"], places), advantages=ragged(scope["advantages"], case["lengths"]),
        policy_loss=scope["pg_loss"].item(), policy_gradient=ragged(leaves["new_log_probs"].grad, case["lengths"]),
        value_loss=scope["vf_loss"].item(), value_gradient=ragged(leaves["new_values"].grad, places),
    )


# OpenRLHF


def openrlhf(case):
    scope = {"torch": torch, "nn": torch.nn, "KL_IS_WEIGHT_CLIP": 10.0, "itertools": __import__("itertools")}
    definitions(read("openrlhf", "openrlhf/models/utils.py"), ["masked_mean", "compute_approx_kl", "compute_reward"], scope)
    definitions(read("openrlhf", "openrlhf/models/loss.py"), ["aggregate_loss", "PolicyLoss", "ValueLoss"], scope)
    scope["apply_length_penalties"] = lambda *_: None
    definitions(read("openrlhf", "openrlhf/trainer/ppo_utils/experience_maker.py"), ["RemoteExperienceMaker"], scope)
    mask = torch.tensor([[t < n for t in range(LENGTH)] for n in case["lengths"]]).double()
    kl = scope["compute_approx_kl"](case["log_probs"], case["ref_log_probs"], kl_estimator="k1")
    maker = scope["RemoteExperienceMaker"]
    algo = types.SimpleNamespace(advantage=types.SimpleNamespace(estimator="gae", gamma=GAMMA, lambd=LAM, no_std_norm=False))
    args = types.SimpleNamespace(
        algo=algo, rollout=types.SimpleNamespace(n_samples_per_prompt=1), reward=types.SimpleNamespace(clip_range=(-10, 10))
    )
    me = types.SimpleNamespace(
        strategy=types.SimpleNamespace(args=args), kl_ctl=types.SimpleNamespace(value=KL_COEF), advantage_estimator="gae",
        get_advantages_and_returns=lambda *a: maker.get_advantages_and_returns(me, *a),
    )
    experience = types.SimpleNamespace(
        rewards=case["scores"].clone(), index=list(range(len(mask))), kl=kl, values=case["values"], action_mask=mask, info={}
    )
    maker.compute_advantages_and_returns(me, [experience])
    rewards = scope["compute_reward"](case["scores"], KL_COEF, kl, action_mask=mask, reward_clip_range=(-10, 10))
    leaves = {name: case[name].clone().requires_grad_() for name in ["new_log_probs", "new_values"]}
    policy = scope["PolicyLoss"](CLIP, CLIP)(leaves["new_log_probs"], case["log_probs"], experience.advantages, mask)[0]
    value = scope["ValueLoss"](0.5)(leaves["new_values"], case["values"], experience.returns, mask)
    (policy + value).backward()
    flat = lambda x: ragged(x, case["lengths"])
    return dict(
        kl=flat(kl), scores=case["scores"].clamp(-10, 10).tolist(), rewards=flat(rewards), returns=flat(experience.returns),
        advantages=flat(experience.advantages), policy_loss=policy.item(), policy_gradient=flat(leaves["new_log_probs"].grad),
        value_loss=value.item(), value_gradient=flat(leaves["new_values"].grad),
    )


# verl


def verl_scope():
    functional = {"torch": torch}
    definitions(read("verl", "verl/utils/torch_functional.py"), ["masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"], functional)
    scope = {"torch": torch, "np": np, "defaultdict": defaultdict, "verl_F": types.SimpleNamespace(**functional), "AlgoConfig": type("AlgoConfig", (), {})}
    names = ["compute_gae_advantage_return", "kl_penalty", "kl_penalty_forward", "agg_loss", "compute_policy_loss_vanilla", "compute_value_loss"]
    core = read("verl", "verl/trainer/ppo/core_algos.py")
    definitions(core, names, scope)
    scope["core_algos"] = types.SimpleNamespace(kl_penalty=scope["kl_penalty"])
    scope["masked_mean"] = functional["masked_mean"]
    definitions(read("verl", "verl/trainer/ppo/ray_trainer.py"), ["apply_kl_penalty"], scope)
    return scope


class Config(dict):
    __getattr__ = dict.__getitem__


def verl(case):
    scope = verl_scope()
    mask = torch.tensor([[t < n for t in range(LENGTH)] for n in case["lengths"]]).double()
    scores = torch.zeros(len(mask), LENGTH)
    for i, n in enumerate(case["lengths"]):
        scores[i, n - 1] = case["scores"][i]

    class Batch(dict):
        batch_size = [len(mask)]

    data = types.SimpleNamespace(batch=Batch(response_mask=mask, token_level_scores=scores, old_log_probs=case["log_probs"], ref_log_prob=case["ref_log_probs"]))
    control = types.SimpleNamespace(value=KL_COEF, update=lambda **_: None)
    scope["apply_kl_penalty"](data, control)
    rewards = data.batch["token_level_rewards"]
    advantages, returns = scope["compute_gae_advantage_return"](rewards, case["values"], mask, GAMMA, LAM)
    leaves = {name: case[name].clone().requires_grad_() for name in ["new_log_probs", "new_values"]}
    config = Config(clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, clip_ratio_c=3.0, global_batch_info={})
    policy = scope["compute_policy_loss_vanilla"](case["log_probs"], leaves["new_log_probs"], advantages, mask, config=config)[0]
    value = scope["compute_value_loss"](leaves["new_values"], returns, case["values"], mask, 0.5)[0]
    (policy + value).backward()
    flat = lambda x: ragged(x, case["lengths"])
    return dict(
        kl=flat(scope["kl_penalty"](case["log_probs"], case["ref_log_probs"], "kl")), scores=case["scores"].tolist(), rewards=flat(rewards),
        returns=flat(returns), advantages=flat(advantages), policy_loss=policy.item(), policy_gradient=flat(leaves["new_log_probs"].grad),
        value_loss=value.item(), value_gradient=flat(leaves["new_values"].grad),
    )


# lm-human-preferences, N+, DeepSpeed-Chat and this program, by their formulas


def formulas(case, *, missing="replace", place="last", score_clip=None, whiten_rewards=False, whiten=True, ddof=0, vf_coef=1.0):
    array = {name: np.asarray(torch.as_tensor(case[name]).numpy(), dtype=np.float64) for name in ["log_probs", "ref_log_probs", "values", "new_log_probs", "new_values", "scores"]}
    lengths = [LENGTH] * len(case["lengths"]) if place == "fixed" else case["lengths"]
    places = [n + 1 if place == "after" and n < LENGTH else n for n in lengths]
    scores = array["scores"].copy()
    if missing == "replace":
        scores[~np.array(case["ended"])] = MISSING
    if score_clip is not None:
        scores = np.clip(scores, -score_clip, score_clip)
    kl = [array["log_probs"][i, :n] - array["ref_log_probs"][i, :n] for i, n in enumerate(lengths)]
    rewards = []
    for i, n in enumerate(places):
        row = np.zeros(n)
        row[: lengths[i]] = -KL_COEF * kl[i]
        row[-1] += scores[i]
        rewards.append(row)

    def whitened(rows, shift_mean):
        flat = np.concatenate(rows)
        scaled = (flat - flat.mean()) / np.sqrt(flat.var(ddof=ddof) + 1e-8) + (0 if shift_mean else flat.mean())
        return np.split(scaled, np.cumsum([len(row) for row in rows])[:-1])

    learned = whitened(rewards, False) if whiten_rewards else rewards
    values = [array["values"][i, :n] for i, n in enumerate(places)]
    advantages, returns = [], []
    for row, v in zip(learned, values):
        a, last = np.zeros(len(row)), 0.0
        for t in reversed(range(len(row))):
            following = v[t + 1] if t + 1 < len(row) else 0.0
            last = row[t] + GAMMA * following - v[t] + GAMMA * LAM * last
            a[t] = last
        returns.append(a + v)
        advantages.append(a)
    advantages = [a[:n] for a, n in zip(advantages, lengths)]
    if whiten:
        advantages = whitened(advantages, True)
    policy, value = [], []
    for i, n in enumerate(lengths):
        ratio = np.exp(array["new_log_probs"][i, :n] - array["log_probs"][i, :n])
        plain, clipped = -advantages[i] * ratio, -advantages[i] * np.clip(ratio, 1 - CLIP, 1 + CLIP)
        policy.append((np.maximum(plain, clipped), np.where(plain >= clipped, plain, 0.0)))
    for i, n in enumerate(places):
        new = array["new_values"][i, :n]
        plain = (new - returns[i]) ** 2
        clipped = (np.clip(new, values[i] - 0.2, values[i] + 0.2) - returns[i]) ** 2
        value.append((0.5 * np.maximum(plain, clipped), np.where(plain >= clipped, new - returns[i], 0.0)))
    n_tokens, n_values = sum(lengths), sum(places)
    rows = lambda x: [row.tolist() for row in x]
    return dict(
        kl=rows(kl), scores=scores.tolist(), rewards=rows(rewards), returns=rows(returns), advantages=rows(advantages),
        policy_loss=sum(loss.sum() for loss, _ in policy) / n_tokens, policy_gradient=rows(g / n_tokens for _, g in policy),
        value_loss=sum(loss.sum() for loss, _ in value) / n_values, value_gradient=rows(vf_coef * g / n_values for _, g in value),
    )


# Adam, estimators, means


def adam():
    settings = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-5, weight_decay=0.01)
    param, grads = numbers(6), [exact(numbers(6, scale=1e-4)) for _ in range(4)]
    param_torch = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([param_torch], **settings)
    steps_torch, steps_tf = [], []
    theta, m, v = param.numpy().copy(), np.zeros(6), np.zeros(6)
    b1, b2 = settings["betas"]
    for t, grad in enumerate(grads, 1):
        param_torch.grad = grad.clone()
        optimizer.step()
        steps_torch.append(param_torch.tolist())
        # TensorFlow 1's AdamOptimizer; the decay, which it has not, is the same as above.
        g = grad.numpy()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta = theta * (1 - settings["lr"] * settings["weight_decay"])
        theta = theta - settings["lr"] * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + settings["eps"])
        steps_tf.append(theta.tolist())
    return dict(**settings, param=param.tolist(), grads=[g.tolist() for g in grads], torch=steps_torch, tf=steps_tf)


def estimators(case):
    """RLOO and GRPO of TRL, for prompts of two responses each."""
    scope = {"torch": torch}
    definitions(read("trl", "trl/trainer/utils.py"), ["nanstd"], scope)
    me = types.SimpleNamespace(normalize_advantages=False, scale_rewards="group", multi_objective_aggregation="sum_then_normalize")
    k1 = case["log_probs"] - case["ref_log_probs"]
    summed = torch.stack([k1[i, :n].sum() for i, n in enumerate(case["lengths"])])
    scores = torch.where(torch.tensor(case["ended"]), case["scores"], torch.tensor(MISSING))
    scope.update(self=me, num_generations=2, rewards=scores - KL_COEF * summed)
    run(lines(read("trl", "trl/trainer/rloo_trainer.py"), "grouped_rewards = rewards.view", "is_std_zero ="), scope)
    rloo = scope["advantages"].tolist()
    scope.update(rewards=scores)
    source = read("trl", "trl/trainer/grpo_trainer.py")
    run(lines(source, "mean_grouped_rewards = torch.nanmean(rewards.view", "is_std_zero ="), scope)
    return dict(samples_per_prompt=2, rloo=rloo, grpo=scope["advantages"].tolist())


def loss_means(case):
    """verl's aggregations of the same losses, with k2 and k3 as a part of them."""
    scope = verl_scope()
    mask = torch.tensor([[t < n for t in range(LENGTH)] for n in case["lengths"]]).double()
    advantages = numbers(len(mask), LENGTH)
    result = dict(advantages=ragged(advantages, case["lengths"]))
    for mean, mode in [("token", "token-mean"), ("sequence", "seq-mean-token-mean"), ("fixed-length", "seq-mean-token-sum-norm")]:
        for estimator in ["k2", "k3"]:
            new = case["new_log_probs"].clone().requires_grad_()
            config = Config(clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, clip_ratio_c=1e9, global_batch_info={})
            loss = scope["compute_policy_loss_vanilla"](case["log_probs"], new, advantages, mask, mode, config)[0]
            kl = scope["kl_penalty"](new, case["ref_log_probs"], estimator)
            (loss + KL_COEF * scope["agg_loss"](kl, mask, mode)).backward()
            total = loss + KL_COEF * scope["agg_loss"](kl, mask, mode)
            result[f"{mean}/{estimator}"] = dict(loss=total.item(), gradient=ragged(new.grad, case["lengths"]))
    return result


RUN = "run"
FORMULAS = "float64 formulas"
IMPLEMENTATIONS = {
    "kindling": (FORMULAS, lambda c: formulas(c)),
    "lm-human-preferences": (FORMULAS, lambda c: formulas(c, place="fixed", whiten_rewards=True, vf_coef=0.1)),
    "n-plus": (FORMULAS, lambda c: formulas(c, place="after", ddof=1, vf_coef=0.1)),
    "trl": (RUN, trl),
    "openrlhf": (RUN, openrlhf),
    "verl": (RUN, verl),
    "deepspeed-chat": (FORMULAS, lambda c: formulas(c, missing="none", score_clip=5.0, whiten=False)),
}


def shortened(x):
    """Numbers to nine digits: a hundredth of a rounding of float32."""
    if isinstance(x, dict):
        return {key: shortened(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [shortened(value) for value in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


all_cases = cases()
fixture = dict(
    made_with=dict(trl="1.12.0", openrlhf="0.11.2", verl="0.9.1", torch=torch.__version__.split("+")[0]),
    gamma=GAMMA, **{"lambda": LAM}, kl_coef=KL_COEF, clip_range=CLIP, missing_eos_score=MISSING, response_length=LENGTH,
    cases=[{k: v.tolist() if torch.is_tensor(v) else v for k, v in c.items()} for c in all_cases],
    dialects={
        name: dict(how=how, cases={c["name"]: shortened(implementation(c)) for c in all_cases})
        for name, (how, implementation) in IMPLEMENTATIONS.items()
    },
    adam=shortened(adam()), estimators=shortened(estimators(all_cases[0])), loss_means=shortened(loss_means(all_cases[0])),
)
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "dialects.json")
with open(path, "w") as file:
    # A row of numbers a line.
    text = json.dumps(fixture, indent=1)
    text = re.sub(r"\[\s+((?:(?:-?[\d.e+-]+|true|false),?\s+)+)\]", lambda m: "[" + " ".join(m.group(1).split()) + "]", text)
    file.write(text + "\n")
