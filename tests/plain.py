"""Log-probabilities the slow way: what every faster computation is compared with."""

from __future__ import annotations

import torch


def plain_logps(model, groups) -> torch.Tensor:
    """One forward pass a response, the model's own mask, positions and logits; no padding."""
    found = []
    for group in groups:
        for response in group["response_ids"]:
            ids = torch.tensor([group["prompt_ids"] + response])
            logps = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1].double(), dim=-1)
            start = len(group["prompt_ids"]) - 1
            found.append(logps[start:].gather(1, ids[0, start + 1 :, None]).sum())
    return torch.stack(found)
