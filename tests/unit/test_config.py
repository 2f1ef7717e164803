"""Training settings: defaults that differ from transformers' own, and conflicts by name."""

from __future__ import annotations

import pytest
import torch

from ctrl_dpo import CTRLDPOConfig


def test_defaults(tmp_path):
    config = CTRLDPOConfig(str(tmp_path))
    assert (config.loss, config.anchor, config.optim) == ("squared", 0.0, "adamw_torch")
    assert not config.logging_nan_inf_filter
    assert not config.remove_unused_columns
    assert CTRLDPOConfig(str(tmp_path), load_in_8bit=True).optim == "adamw_8bit"
    assert CTRLDPOConfig(str(tmp_path), optim="sgd", load_in_8bit=True).optim == "sgd"
    assert CTRLDPOConfig(str(tmp_path), procedure="best-of-4".replace("-", "_")).procedure
    assert config.use_cpu is not torch.accelerator.is_available()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of .*; got 'hinge'"),
        ({"model_dtype": "int4"}, "model_dtype must be one of .*; got 'int4'"),
        ({"beta": 0.0}, "beta must be finite and > 0; got 0.0"),
        ({"beta": float("nan")}, "beta must be finite and > 0; got nan"),
        ({"target_kl": -1.0}, "target_kl must be finite and > 0; got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and > 0; got nan"),
        ({"learning_rate": 1e30}, "learning_rate must be <= 1; got 1e.30"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite and > 0; got inf"),
        ({"anchor": float("nan")}, "anchor must be finite and >= 0; got nan"),
        ({"anchor": float("inf")}, "anchor must be finite and >= 0; got inf"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be a number; got nan"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint must be False; got True"),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor must be 0.0; got 0.1.*soft_label",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False; got True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None; got 5.0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False; got True.*per_pass"),
        ({"average_tokens_across_devices": False}, "average_tokens_.* must be True; got False"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be False; got True"),
        ({"include_for_metrics": ["loss"]}, r"include_for_metrics must be \[\]; got \['loss'\]"),
        ({"bf16_full_eval": True}, "bf16_full_eval must be False; got True.*model_dtype"),
        ({"fp16_full_eval": True}, "fp16_full_eval must be False; got True.*model_dtype"),
        ({"length_column_name": "n"}, "length_column_name must be 'length'; got 'n'"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "train_sampling_strategy must be one of .*; got 'batch_rebalance'",
        ),
        ({"debug": "underflow_overflow"}, "debug must be empty; got .*UNDERFLOW_OVERFLOW"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches of accelerator_config must be False; got True",
        ),
        ({"max_response_length": 0}, "max_response_length must be an integer >= 1; got 0"),
        ({"anchor": -0.1}, "anchor must be finite and >= 0; got -0.1"),
        ({"anchor": 0.5, "loss": "softmax"}, "anchor must be 0 unless .*; got loss='softmax'"),
        ({"anchor": 1.0, "transformation": "raw"}, "anchor must be 0 where .*; got .*'raw'"),
        (
            {"anchor": 1.0, "accept_other_labels": True, "beta": 1.0},
            "anchor must be 0 .* accept_other_labels=True",
        ),
        ({"accept_other_labels": True}, "beta must be given with accept_other_labels; got None"),
        ({"calibration": "none"}, "calibration must be one of .*; got 'none'"),
        ({"transformation": "optmal"}, "transformation must be identity, .*; got 'optmal'"),
        ({"transformation": "exponential:0"}, "rate must be a number other than 0 .*; got 0.0"),
        ({"beta": 1.0, "target_kl": 1.0}, "beta and target_kl exclude each other; got 1.0 and 1.0"),
        ({"loss": "dpo"}, "beta must be given for loss='dpo'; got None"),
        (
            {"loss": "dpo", "beta": 1.0, "transformation": "identity"},
            "transformation must be left out for loss='dpo', .* order of the rewards; got 'ident",
        ),
        (
            {"loss": "ipo", "beta": 1.0, "calibration": "pooled"},
            "calibration must be left out for loss='ipo', .*; got 'pooled'",
        ),
        ({"procedure": "best_of_none"}, "got 'best_of_none'"),
    ],
)
def test_conflicts_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CTRLDPOConfig(str(tmp_path), **settings)


def test_an_anchor_that_is_text_is_named(tmp_path):
    with pytest.raises(TypeError, match="anchor must be a number >= 0; got '1'"):
        CTRLDPOConfig(str(tmp_path), anchor="1")


def test_transformations_are_named_as_datasets_name_them(tmp_path):
    texts = {None: None, "raw": "raw", " optimal": "optimal", "exponential:5": "exponential:5.0"}
    for text, wanted in texts.items():
        assert CTRLDPOConfig(str(tmp_path), transformation=text).transformation == wanted
