"""A reward anybody can run: VADER sentiment of a response, -1 (negative) to 1 (positive)."""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_ANALYSER = SentimentIntensityAnalyzer()


def compound(prompts: list[object], responses: list[str]) -> list[float]:
    """Score each response by itself; the prompt does not matter."""
    return [float(_ANALYSER.polarity_scores(text)["compound"]) for text in responses]
