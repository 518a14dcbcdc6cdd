"""Writes ../fixtures/ppo.json: what TRL's own lines make of given log-probabilities, values and scores.

usage: pip install torch && pip download --no-deps trl==1.12.0 && python ppo.py trl-1.12.0-py3-none-any.whl
(made with trl 1.12.0, torch 2.15.0; versions are also in the file)

TRL's PPO and reward losses stand inline in its trainers. This script cuts those lines out of the wheel and runs them
as they are, in float64, without importing the trainers.

Two things differ on purpose and are arranged here rather than in our code: TRL whitens with the sample variance, we
with the population's (`masked_var` is called with `unbiased=False`); and TRL adds the score on the first padding token
where there is one, we on the last response token (so the responses of the rewards' case all have full length).
"""

import ast
import json
import os
import sys
import textwrap
import types
import zipfile

import torch

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
WHEEL = zipfile.ZipFile(sys.argv[1])
PPO = WHEEL.read("trl/experimental/ppo/ppo_trainer.py").decode()
REWARD = WHEEL.read("trl/trainer/reward_trainer.py").decode()


def functions(source, names):
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {n.name for n in nodes} == set(names)
    return "\n".join(ast.get_source_segment(source, n) for n in nodes)


def lines(source, first, last):
    """The lines from the one that contains `first` up to, not including, the next one that contains `last`."""
    all_lines = source.splitlines()
    start = next(i for i, line in enumerate(all_lines) if first in line)
    end = next(i for i in range(start, len(all_lines)) if last in all_lines[i])
    return textwrap.dedent("\n".join(all_lines[start:end]))


scope = {"torch": torch, "nn": torch.nn, "bool": bool, "ValueError": ValueError}
exec(functions(PPO, ["masked_mean", "masked_var", "masked_whiten"]).replace("unbiased: bool = True", "unbiased: bool = False"), scope)


def numbers(*shape, scale=1.0):
    """Random numbers that float32 holds exactly."""
    return (torch.randn(*shape) * scale).float().double()


def rewards_and_advantages():
    batch, length = 5, 7
    args = types.SimpleNamespace(kl_coef=0.05, kl_estimator="k1", whiten_rewards=False, gamma=0.99, lam=0.95)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    case = dict(
        logprobs=-numbers(batch, length).abs(),
        ref_logprobs=-numbers(batch, length).abs(),
        values=numbers(batch, length),
        scores=numbers(batch),
    )
    ends = torch.full((batch,), length - 1)
    run = dict(scope, args=args, padding_mask=padding, padding_mask_p1=padding, sequence_lengths=ends,
               sequence_lengths_p1=ends + 1, responses=padding, **case)
    exec(lines(PPO, "# 4. compute rewards", "empty_cache()"), run)
    log_ratio = case["ref_logprobs"] - case["logprobs"]
    return dict(
        kl_coef=args.kl_coef, gamma=args.gamma, lam=args.lam, **{k: v.tolist() for k, v in case.items()},
        k1=(-log_ratio).tolist(), k3=((log_ratio.exp() - 1) - log_ratio).tolist(), rewards=run["rewards"].tolist(),
        returns=run["returns"].tolist(), whitened_advantages=run["advantages"].tolist(),
        values_whitened_without_shift=scope["masked_whiten"](case["values"], ~padding, shift_mean=False).tolist(),
    )


def losses():
    batch, length = 6, 8
    args = types.SimpleNamespace(cliprange=0.2, cliprange_value=0.2)
    lengths = [8, 3, 5, 1, 8, 6]
    mask = torch.tensor([[t < n for t in range(length)] for n in lengths])
    new = dict(new_logprobs=-numbers(batch, length).abs(), vpred=numbers(batch, length))
    case = dict(
        mb_logprobs=(new["new_logprobs"] + numbers(batch, length, scale=0.3)).float().double(),
        mb_values=(new["vpred"] + numbers(batch, length, scale=0.3)).float().double(),
        mb_advantage=numbers(batch, length),
        mb_return=numbers(batch, length),
    )
    leaves = {k: v.clone().requires_grad_() for k, v in new.items()}
    run = dict(scope, args=args, micro_batch_inds=slice(None), padding_mask=~mask, padding_mask_p1=~mask, **case, **leaves)
    exec(lines(PPO, "vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef"), run)
    exec(lines(PPO, "pg_clipfrac = masked_mean(", "prob_dist ="), run)
    (run["pg_loss"] + run["vf_loss"]).backward()
    flat = lambda x: [x[i, :n].tolist() for i, n in enumerate(lengths)]
    return dict(
        cliprange=args.cliprange, cliprange_value=args.cliprange_value,
        **{k: flat(v) for k, v in {**new, **case}.items()},
        pg_loss=run["pg_loss"].item(), pg_clipfrac=run["pg_clipfrac"].item(),
        vf_loss=run["vf_loss"].item(), vf_clipfrac=run["vf_clipfrac"].item(),
        # TRL averages the ratio and the approximate KL over padding too; these are over the response tokens alone.
        ratio_mean=run["ratio"][mask].mean().item(), ratio_max=run["ratio"][mask].max().item(),
        approx_kl=0.5 * run["logprobs_diff"][mask].square().mean().item(),
        pg_grad=flat(leaves["new_logprobs"].grad), vf_grad=flat(leaves["vpred"].grad),
    )


def pairwise():
    cases = []
    for with_margin in [False, True]:
        chosen, rejected = numbers(9, scale=3).requires_grad_(), numbers(9, scale=3).requires_grad_()
        inputs = {"margin": numbers(9).abs()} if with_margin else {}
        self = types.SimpleNamespace(args=types.SimpleNamespace(center_rewards_coefficient=None))
        run = dict(scope, rewards_chosen=chosen, rewards_rejected=rejected, inputs=inputs, self=self)
        exec(lines(REWARD, 'if "margin" in inputs:', "if mode =="), run)
        run["loss"].backward()
        centring = torch.mean((chosen + rejected) ** 2)
        cases.append(dict(
            chosen=chosen.tolist(), rejected=rejected.tolist(), margin=inputs["margin"].tolist() if inputs else None,
            loss=run["loss"].item(), grad_chosen=chosen.grad.tolist(), grad_rejected=rejected.grad.tolist(),
            centring=centring.item(),
        ))
    return cases


def adaptive():
    """lm-human-preferences' AdaptiveKLController, which TRL no longer has: `train_policy.py`, class of that name."""
    value, target, horizon, steps = 0.15, 6.0, 10000, []
    for kl, n_steps in [(1.0, 512), (5.5, 512), (6.0, 64), (7.0, 512), (40.0, 512)]:
        proportional_error = min(max(kl / target - 1, -0.2), 0.2)
        value *= 1 + proportional_error * n_steps / horizon
        steps.append(dict(kl=kl, n_episodes=n_steps, value=value))
    return dict(init=0.15, target=target, horizon=horizon, steps=steps)


fixture = dict(
    made_with=dict(trl="1.12.0", torch=torch.__version__.split("+")[0]),
    rewards=rewards_and_advantages(), losses=losses(), pairwise=pairwise(), adaptive=adaptive(),
)
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "ppo.json")
with open(path, "w") as file:
    json.dump(fixture, file, indent=1)
    file.write("\n")
