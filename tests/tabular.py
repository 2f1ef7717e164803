"""A language model that can be enumerated, and how near training comes to its exact optimum.

Responses are two tokens of a vocabulary of 12, so a policy is a table of 144 probabilities a prompt
and its win rate and KL are sums. The optimum is that of optimal_discrete_policy.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from datasets import Dataset
from scipy import optimize, special
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, optimal_discrete_policy, pairs, relabel
from ctrl_dpo.theory.procedures import parse_procedure

FITS = [("squared", 0.0), ("squared", 1.0), ("softmax", 0.0), ("soft_label", 0.0)]
HARD_BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # KL of 4 nats down to 1, after 200 updates
VOCABULARY, PROMPTS = 12, ['!"', '"#', "#!"]
LOSSES = ("squared", "softmax", "soft_label")
BETAS = {"single_draw": 0.15, "best_of_4": 0.15, "worst_of_4": 0.3}  # KL of 1.0, 0.6 and 0.4 nats
# two different tokens a prompt: after "a" alone, attention cannot tell "a" from "aa"
RESPONSES = [list(pair) for pair in itertools.product(range(VOCABULARY), repeat=2)]
REWARDS = np.random.default_rng(5).normal(size=(len(PROMPTS), len(RESPONSES)))


def model() -> torch.nn.Module:
    return tiny_llama(
        seed=3,
        vocab_size=VOCABULARY,
        hidden_size=64,
        initializer_range=0.07,
        pad_token_id=None,
        tie_word_embeddings=False,
    )


def table(policy) -> np.ndarray:
    """Probability of every response to every prompt, by plain forward passes."""
    letters = tiny_tokenizer(size=VOCABULARY).convert_tokens_to_ids
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([[*letters(list(prompt)), first] for first in range(VOCABULARY)])
        with torch.no_grad():
            logps = torch.log_softmax(policy(ids).logits[:, -2:].double(), dim=-1)
        rows.append((logps[0, 0][:, None] + logps[:, 1]).flatten().exp().numpy())
    return np.array(rows)


def measure(p: np.ndarray, q: np.ndarray, procedure: str) -> tuple[float, float]:
    """Mean win rate and KL over prompts, as sums over the ordered responses."""
    served, found = parse_procedure(procedure), []
    for mine, theirs, rewards in zip(p, q, REWARDS, strict=True):
        order = np.argsort(rewards)
        a = np.clip(np.concatenate(([0.0], np.cumsum(mine[order]))), 0, 1)
        b = np.clip(np.concatenate(([0.0], np.cumsum(theirs[order]))), 0, 1)
        beaten = (served.distortion(b[1:]) + served.distortion(b[:-1])) / 2
        win = np.diff(served.distortion(a)) @ beaten
        found.append((float(win), float(special.rel_entr(mine, theirs).sum())))
    win, kl = np.mean(found, axis=0)
    return float(win), float(kl)


def optimum(procedure: str) -> list:
    q, beta = table(model()), BETAS[procedure]
    return [optimal_discrete_policy(a, r, procedure, beta) for a, r in zip(q, REWARDS, strict=True)]


def shares(policy, procedure: str) -> tuple[float, float]:
    """Share of the possible objective, and of its gain over the reference's 1/2."""
    win, kl = measure(table(policy), table(model()), procedure)
    beta = BETAS[procedure]
    best = np.mean([each.win_rate - beta * each.kl for each in optimum(procedure)])
    mine = win - beta * kl
    return mine / best, (mine - 0.5) / (best - 0.5)


def exact_groups(procedure: str) -> Dataset:
    """Every response with its exact label."""
    rows = []
    for prompt, solved in zip(PROMPTS, optimum(procedure), strict=True):
        labels = {
            "transformed_rewards": solved.transformed_rewards.tolist(),
            "log_normaliser": solved.log_normaliser,
            "calibrated_rewards": [0.5] * len(RESPONSES),
        }
        rows.append({"prompt": prompt, "procedure": procedure, "beta": BETAS[procedure]} | labels)
    data = Dataset.from_list(rows).add_column("transformation", ["optimal"] * len(rows))
    data = data.add_column("response_ids", [RESPONSES] * len(rows))
    data = data.add_column("finished", [[False] * len(RESPONSES)] * len(rows))
    return data.add_column("responses", [["x"] * len(RESPONSES)] * len(rows))


def fit(tmp_path, data: Dataset, steps: int, **settings) -> torch.nn.Module:
    defaults = {
        "max_steps": steps,
        "learning_rate": 8e-3,
        "adam_beta2": 0.9,  # the gradient has no noise, or little: a short memory of its size
        "max_tokens_per_pass": 4096,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1000,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 100.0,
    }
    args = CTRLDPOConfig(str(tmp_path), **defaults | settings)
    trainer = CTRLDPOTrainer(
        model(), args, data, processing_class=tiny_tokenizer(size=VOCABULARY), ref_model=model()
    )
    trainer.train()
    return trainer.model.eval()


@functools.cache
def labelled(procedure: str, k: int = 64, groups: int = 192, seed: int = 0) -> Dataset:
    """Groups of k draws from the reference policy, labelled by the rewards of many more draws."""
    rng, q = np.random.default_rng(seed), table(model())
    rows = []
    for i in range(groups):
        row = i % len(PROMPTS)
        drawn = rng.choice(len(RESPONSES), size=k, p=q[row] / q[row].sum())
        more = rng.choice(len(RESPONSES), size=4000, p=q[row] / q[row].sum())
        rows.append(
            {
                "prompt": PROMPTS[row],
                "responses": [str(j) for j in drawn],
                "response_ids": [RESPONSES[j] for j in drawn],
                "finished": [False] * k,
                "rewards": REWARDS[row, drawn].tolist(),
                "reference_rewards": REWARDS[row, more].tolist(),
            }
        )
    drawn, beta = Dataset.from_list(rows), BETAS[procedure]
    return relabel(drawn, procedure=procedure, beta=beta, estimator="levels")


def exact_share(folder, loss: str, anchor: float, procedure: str) -> float:
    """Fit every response's exact label; share of the possible gain over the reference."""
    # what a softmax still has to learn there are responses of vanishing probability
    steps = 400 if (loss, procedure) == ("softmax", "worst_of_4") else 140
    made = fit(folder, exact_groups(procedure), steps, loss=loss, anchor=anchor)
    return shares(made, procedure)[1]


def drawn_share(folder, loss: str, form: str, procedure: str, groups: int = 192) -> float:
    """Fit labelled draws, as groups or as pairs; share of the possible objective."""
    data, batch, rate, steps = labelled(procedure, groups=groups), 8, 6e-3, 200
    if form == "pairs":  # as many of few groups as of many
        data, batch, rate, steps = pairs(data, f"random:{4800 // groups}"), 64, 8e-3, 120
    settings = {"per_device_train_batch_size": batch, "learning_rate": rate}
    return shares(fit(folder, data, steps, loss=loss, **settings), procedure)[0]


def hard_label_share(folder, beta: float, procedure: str, steps: int) -> tuple[float, float]:
    """Fit DPO to the order of the exact labels; share of the gain possible at its KL, and that."""
    q = table(model())
    made = fit(folder, exact_groups(procedure), steps, loss="dpo", beta=beta)
    win, kl = measure(table(made), q, procedure)

    def solved(penalty: float) -> list:
        return [
            optimal_discrete_policy(a, r, procedure, penalty)
            for a, r in zip(q, REWARDS, strict=True)
        ]

    def excess(log_penalty: float) -> float:
        return float(np.mean([s.kl for s in solved(np.exp(log_penalty))])) - kl

    low, high = np.log(1e-3), np.log(10.0)
    same = np.exp(optimize.brentq(excess, low, high, xtol=1e-6) if excess(low) > 0 else low)
    best = solved(same)
    # no policy wins more at this KL, also where the optimum's KL jumps as the penalty moves
    possible = np.mean([s.win_rate + same * (kl - s.kl) for s in best])
    return (win - 0.5) / (possible - 0.5), kl
