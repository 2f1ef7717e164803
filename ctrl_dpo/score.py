"""Score stage: responses to rewards, by a sequence-classification model or a function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ctrl_dpo._validation import check_columns, check_integer
from ctrl_dpo.data.columns import PROMPT, RESPONSES, REWARDS
from ctrl_dpo.data.inputs import check_dataset
from ctrl_dpo.engine.reward_functions import Candidate, FunctionReward, Reward, import_function
from ctrl_dpo.engine.score_cache import ScoreCache

if TYPE_CHECKING:
    from datasets import Dataset

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def score(
    groups: Dataset,
    reward: str | Callable[..., Any] | Reward,
    *,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Add a reward per response.

    Parameters
    ----------
    groups : Dataset
        Rows with ``prompt`` (text or messages) and ``responses`` (list of text).
    reward : str, callable or Reward
        Folder or hub name of a sequence-classification checkpoint with one output;
        ``module:function``; a function of a list of prompts and a list of responses that returns as
        many numbers; or what :func:`load_reward` returns, for another type or device.
    batch_size : int
        Responses a forward pass, or a call of the function.
    cache : str or Path, optional
        File that scores are appended to as they come and read from on the next call. A score is
        found again by the content of the reward, of the prompt and of the response.
    progress : bool
        Whether a progress bar is shown.

    Returns
    -------
    Dataset
        The rows with ``rewards``: a list of float, in the order of ``responses``.

    Raises
    ------
    TypeError
        If the groups are no ``datasets.Dataset``, a response is no text, or the reward is none of
        these or returns anything but numbers.
    ValueError
        If there is no row, a column is missing or there already or, as ``tools``, would not be
        rendered, a row has no response, or a score is not finite.

    Notes
    -----
    Equal responses to equal prompts are scored once.

    Examples
    --------
    >>> from datasets import Dataset
    >>> groups = Dataset.from_list([{"prompt": "Hi", "responses": ["Hello!", "No."]}])
    >>> scored = score(groups, lambda prompts, responses: map(len, responses), progress=False)
    >>> scored["rewards"][0]
    [6.0, 3.0]
    """
    groups = check_dataset("groups", groups)
    check_columns(groups.column_names, [PROMPT, RESPONSES], "Run `ctrl-dpo sample` first.")
    check_integer("batch_size", batch_size, 1)
    if REWARDS in groups.column_names:
        raise ValueError(
            f"groups must not have the column {REWARDS!r} yet; got {groups.column_names}. "
            "Remove it to score again."
        )
    model = load_reward(reward)
    store = ScoreCache(None if cache is None else Path(cache), model.identity if cache else "")
    keys: list[list[str]] = []
    unscored: dict[str, Candidate] = {}
    for candidates in _candidates(groups):
        keys.append([store.key(c.prompt, c.response) for c in candidates])
        unscored |= {k: c for k, c in zip(keys[-1], candidates, strict=True) if k not in store}
    with store, tqdm(total=len(unscored), desc="score", unit="resp", disable=not progress) as bar:
        for scores in _scored(model, unscored, batch_size):
            store.add(scores)
            bar.update(len(scores))
    return groups.add_column(REWARDS, [[store[key] for key in row] for row in keys])


def load_reward(reward: str | Callable[..., Any] | Reward, **options: Any) -> Reward:
    """Turn a name or a function into a reward; no weights are loaded before they are used.

    Parameters
    ----------
    reward : str, callable or Reward
        As in :func:`score`.
    **options
        ``dtype`` and ``device`` of :class:`~ctrl_dpo.engine.reward_models.SequenceRewardModel`;
        for checkpoints only.

    Returns
    -------
    Reward
        What :func:`score` calls.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If options are given for a function.
    """
    if isinstance(reward, str):
        if not _FUNCTION.fullmatch(reward) or Path(reward).exists():
            from ctrl_dpo.engine.reward_models import SequenceRewardModel  # loads torch

            return SequenceRewardModel(reward, **options)
        reward = import_function(reward)
    if options:
        raise ValueError(
            f"options of a reward must be for a checkpoint; got {sorted(options)} for a function."
        )
    if callable(reward):
        return FunctionReward(reward)
    if not hasattr(reward, "batches"):
        raise TypeError(
            "reward must be a checkpoint's name, module:function, a function or what load_reward "
            f"returns; got {reward!r}."
        )
    return reward


def _candidates(groups: Dataset) -> Iterator[list[Candidate]]:
    """Yield the responses of each row, refusing what cannot be scored."""
    for row, group in enumerate(groups.select_columns([PROMPT, RESPONSES])):
        prompt, responses = group[PROMPT], group[RESPONSES]
        if not isinstance(prompt, str | list) or prompt == []:
            raise ValueError(f"prompt must be text or messages; got {prompt!r} at row {row}.")
        if not responses:
            raise ValueError(f"responses must hold at least one; got {responses!r} at row {row}.")
        for index, response in enumerate(responses):
            if not isinstance(response, str):
                raise TypeError(
                    f"responses must be text; got {response!r} at row {row}, response {index}."
                )
        yield [Candidate(prompt, r, f"row {row}, response {i}") for i, r in enumerate(responses)]


def _scored(
    reward: Reward, unscored: dict[str, Candidate], batch_size: int
) -> Iterator[dict[str, float]]:
    """Yield scores by key, batch by batch, each checked."""
    keys, candidates = list(unscored), list(unscored.values())
    for scores in reward.batches(candidates, batch_size):
        for position, value in scores.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"rewards must be finite; got {value!r} at {candidates[position].place}. Drop "
                    "that response, or mend the reward."
                )
        yield {keys[position]: value for position, value in scores.items()}
