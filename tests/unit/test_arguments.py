"""Training settings: YAML file, overrides, and what is refused before anything is loaded."""

from __future__ import annotations

import pytest

from ctrl_dpo.arguments import AdapterArguments, changed_words, parse_arguments


@pytest.fixture
def write(tmp_path):
    def make(text: str):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return path

    return make


def test_the_command_line_is_stronger_than_the_file(write, tmp_path):
    path = write("learning_rate: 1.0e-4\nlora_r: 4\nloss: softmax\nbf16: false\n")
    words = ["--output_dir", str(tmp_path), "--learning_rate=3e-4", "--max_steps", "7"]
    adapter, args = parse_arguments(path, words)
    assert (args.learning_rate, args.max_steps, args.loss) == (3e-4, 7, "softmax")
    assert (adapter.lora_r, adapter.lora_alpha) == (4, 32)


def test_lists_mappings_and_nothing(write, tmp_path):
    path = write(
        f"output_dir: {tmp_path}\nlora_target_modules: [q_proj, v_proj]\nbeta: null\n"
        "lr_scheduler_kwargs:\n  num_cycles: 2\nlr_scheduler_type: cosine_with_restarts\n"
    )
    adapter, args = parse_arguments(path)
    assert adapter.lora_target_modules == ["q_proj", "v_proj"]
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.beta is None


def test_the_adapter_is_what_it_says():
    config = AdapterArguments(lora_r=3, lora_dropout=0.1).peft_config()
    assert (config.r, config.lora_dropout, config.target_modules) == (3, 0.1, "all-linear")
    named = AdapterArguments(lora_target_modules=["q_proj"]).peft_config()
    assert named.target_modules == {"q_proj"}
    assert AdapterArguments(lora_r=0).peft_config() is None


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("lerning_rate: 1", ValueError, "got 'lerning_rate'. Did you mean 'learning_rate'"),
        ("qqqq: 1", ValueError, "config key must be a known setting; got 'qqqq'.$"),
        ("loss: dpo\nloss: ipo", ValueError, "name each key once; got 'loss' twice"),
        ("a: &x 1\nb: *x", ValueError, "must not use YAML aliases; got one at line 2"),
        ("- 1", TypeError, r"mapping of keys to values; got \[1\]"),
        ("a: [", ValueError, "config must be YAML; got .*train.yaml"),
        ("x: " + "y" * 2**20, ValueError, "config must be under 1048576 bytes; got 1048579"),
        ("loss: dpo", ValueError, "beta must be given for loss='dpo'; got None"),
    ],
)
def test_bad_files_are_named(write, text, error, message, tmp_path):
    with pytest.raises(error, match=message):
        parse_arguments(write(text), ["--output_dir", str(tmp_path)])


def test_changed_words_give_the_settings_again(tmp_path):
    place = ["--output_dir", str(tmp_path)]
    words = ["--loss", "softmax", "--beta", "0.5", "--lora_target_modules", "q_proj", "v_proj"]
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--load_in_8bit", "true", *place]
    adapter, args = parse_arguments(None, words)
    names = ("loss", "beta", "lr_scheduler_kwargs", "load_in_8bit", "optim", "model_dtype", "seed")
    names += ("accelerator_config", "gradient_checkpointing", "share_prompt")
    settings = {name: args.to_dict()[name] for name in names} | vars(adapter)
    found = changed_words(settings)
    again, parsed = parse_arguments(None, [*found, *place])
    assert {name: parsed.to_dict()[name] for name in names} | vars(again) == settings
    given = {word for word in found if word.startswith("--")}
    # what the device decides is given too
    assert {"--model_dtype", "--optim", "--loss", "--beta"} < given
    assert given.isdisjoint({"--seed", "--share_prompt", "--lora_r", "--accelerator_config"})
