"""Names of the dataset columns, one place for all stages (see README, "Data format")."""

from collections.abc import Container

PROMPT = "prompt"
RESPONSES = "responses"
REWARDS = "rewards"
RESPONSE = "response"  # unpaired: one response and its reward a row
REWARD = "reward"
REFERENCE_REWARDS = "reference_rewards"
REFERENCE_LOGPS = "reference_logps"
PROMPT_FEATURES = "prompt_features"  # numbers that tell prompts apart, for pooled calibration
REFERENCE_COMPUTED = "reference_computed"  # record of how, the same in every row

# written by the sample stage, in the order of RESPONSES
RESPONSE_IDS = "response_ids"  # token ids as drawn, so that nothing is tokenised twice
FINISHED = "finished"  # False where the draw ran into the length limit
SAMPLER_LOGPS = "sampler_logps"  # nats per response, from the sampler's own forward passes
SAMPLED_FROM = "sampled_from"  # model, template and sampler settings, the same in every row
# those by which a model itself is drawn from: only over such draws is the mean log-ratio the KL
UNCHANGED_SAMPLER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
POLICY_LOGPS = "policy_logps"  # nats per response, from the training forward path

# written by the relabel stage
CALIBRATED_REWARDS = "calibrated_rewards"
TRANSFORMED_REWARDS = "transformed_rewards"
LOG_NORMALISER = "log_normaliser"
DRAW_REWARDS = "draw_rewards"  # of all draws, where only some of them are kept as RESPONSES
EFFECTIVE_SAMPLE_SIZE = "effective_sample_size"  # of weighted calibration, in draws
BETA = "beta"
PROCEDURE = "procedure"
TRANSFORMATION = "transformation"
ANCHOR = "anchor"  # of the loss that labels by rank are meant for

# rewards of the draws that responses are compared with: the first that there is, `compared_with`
COMPARED_WITH = (REFERENCE_REWARDS, DRAW_REWARDS, REWARDS)

# pairs and groups
WEIGHT = "weight"  # of the row in the loss; 1 where there is no such column

# pairs
CHOSEN = "chosen"
REJECTED = "rejected"
MARGIN = "margin"
CHOSEN_IDS = "chosen_token_ids"  # not chosen_ids: TRL keeps its own tokens there
REJECTED_IDS = "rejected_token_ids"
CHOSEN_FINISHED = "chosen_finished"
REJECTED_FINISHED = "rejected_finished"

# lists with one entry for each of RESPONSES
PER_RESPONSE = (
    RESPONSES,
    REWARDS,
    RESPONSE_IDS,
    FINISHED,
    SAMPLER_LOGPS,
    POLICY_LOGPS,
    REFERENCE_LOGPS,
    CALIBRATED_REWARDS,
    TRANSFORMED_REWARDS,
)

# for people
MEANINGS = {
    PROMPT: "what the model was asked: text or messages",
    RESPONSES: "responses to the prompt",
    REWARDS: "reward of each response",
    REFERENCE_REWARDS: "rewards of draws of the reference policy to the same prompt",
    REFERENCE_LOGPS: "log-probability of each response under the reference policy, nats",
    RESPONSE_IDS: "tokens of each response, as drawn",
    FINISHED: "whether each response ended before the length limit",
    SAMPLER_LOGPS: "log-probability of each response under the sampler, nats",
    SAMPLED_FROM: "model, chat template and sampler that drew the responses",
    CALIBRATED_REWARDS: "share of the reference policy's responses that each one beats",
    TRANSFORMED_REWARDS: "calibrated rewards, transformed for the procedure",
    LOG_NORMALISER: "logarithm of the mean of exp(transformed reward / beta)",
    DRAW_REWARDS: "rewards of all draws, of which the responses are some",
    ANCHOR: "weight of the group mean in the squared loss that the labels are for",
    EFFECTIVE_SAMPLE_SIZE: "what weighted draws are worth, in draws",
    BETA: "strength of the KL penalty",
    PROCEDURE: "how the trained policy will be used",
    TRANSFORMATION: "transformation of the calibrated rewards",
    WEIGHT: "weight of the row in the loss",
    CHOSEN: "response with the larger transformed reward",
    REJECTED: "response with the smaller transformed reward",
    MARGIN: "difference of the transformed rewards",
}


def compared_with(found: Container[str]) -> str:
    """Return the column of the rewards that responses are compared with, of the columns found."""
    return next(name for name in COMPARED_WITH if name in found)
