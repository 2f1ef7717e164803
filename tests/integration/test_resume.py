"""Resumed runs are bitwise those that were not stopped: weights, optimiser, random state, log."""

from __future__ import annotations

import json
import logging
import random  # noqa: TID251 - its state is a part of a checkpoint
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, relabel
from ctrl_dpo.data.disk import exclusive
from ctrl_dpo.engine.checkpoints import list_checkpoints

GROUPS = {
    "prompt": [f"question {i}" for i in range(6)],
    "responses": [[f"{'abc'[j]}{i}" * (1 + (i + j) % 3) for j in range(3)] for i in range(6)],
    "rewards": [[float((i + 2 * j) % 5) for j in range(3)] for i in range(6)],
}
LABELS = {"procedure": "single_draw", "transformation": "identity", "beta": 0.2}
TIMES = ("runtime", "per_second")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return relabel(Dataset.from_dict(GROUPS), **LABELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One layer, wide enough for an adapter whose optimiser states are held in 8 bits."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=1, hidden_size=64).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def make(output, data, model=None, callbacks=None, dropout=0.2, eval_dataset=None, **settings):
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 1,
        "max_steps": 9,
        "save_steps": 1,
        "logging_steps": 3,
        "model_dtype": "float32",
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = CTRLDPOConfig(str(output), **defaults | settings)
    layers = ["q_proj", "down_proj"]
    lora = LoraConfig(r=64, lora_dropout=dropout, target_modules=layers, task_type="CAUSAL_LM")
    if model is None:
        model = tiny_llama(num_hidden_layers=1)
    return CTRLDPOTrainer(
        model,
        args,
        data,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        peft_config=lora,
        callbacks=callbacks,
    )


def state(trainer) -> dict:
    """Return all that a run leaves, without times."""
    lines = trainer.metrics_path.read_text().splitlines()
    rows = [
        {name: value for name, value in json.loads(line).items() if not name.endswith(TIMES)}
        for line in lines
    ]
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "optimiser": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "random": [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],  # noqa: NPY002
        "log": rows,
    }


def different(one, other, path="") -> list[str]:
    """Return the places where two nested states differ in a bit."""
    if isinstance(one, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [p for k in keys for p in different(one.get(k), other.get(k), f"{path}/{k}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [p for i, (a, b) in pairs for p in different(a, b, f"{path}/{i}")]
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        return [] if same and torch.equal(one, other) else [path]
    return [] if np.array_equal(one, other) else [path]


KINDS = {
    "float32 adamw": {},
    "8-bit adamw_8bit": {"load_in_8bit": True},
    "float32 adamw, evaluated": {"eval_strategy": "steps", "eval_steps": 2},
}
LOSSES = {
    "anchored": {"loss": "squared", "anchor": 0.5},
    "softmax": {"loss": "softmax"},
}
# 6 batches an epoch; every log row is of 3 updates, so that most checkpoints lie between two
POINTS = {1: {"mid": 4, "end": 6, "later": 7, "done": 9}, 4: {"mid": 1, "end": 2, "later": 5}}
RUNS = [
    pytest.param((kind, loss, accumulation), id=f"{kind}, {loss}, accumulation {accumulation}")
    for kind in KINDS
    for loss in LOSSES
    for accumulation in POINTS
    if "evaluated" not in kind or loss == "anchored"
]


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory, data, folder):
    """An uninterrupted run, its state, and how to make another."""
    kind, loss, accumulation = request.param
    output = tmp_path_factory.mktemp("whole")
    settings = KINDS[kind] | LOSSES[loss] | {"gradient_accumulation_steps": accumulation}
    settings |= {"max_steps": 9 if accumulation == 1 else 6, "reference_cache": str(output / "r")}
    evaluated = data if "evaluated" in kind else None

    def again(place):
        model = str(folder) if "8-bit" in kind else None
        return make(place, data, model, eval_dataset=evaluated, **settings)

    trainer = again(output)
    trainer.train()
    return output, state(trainer), again, POINTS[accumulation]


def test_resuming_anywhere_is_not_stopping(whole, tmp_path):
    output, expected, again, points = whole
    assert len(expected["log"]) >= 3
    for name, step in points.items():
        trainer = again(tmp_path / name)
        assert different(expected["weights"], dict(trainer.model.named_parameters())) != []
        result = trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
        assert different(expected, state(trainer)) == [], name
        assert result.global_step == max(points["later"], trainer.args.max_steps)
        assert result.training_loss == expected["log"][-1]["train_loss"]


def test_the_8_bit_optimiser_of_these_runs_holds_8_bits(folder, data, tmp_path):
    trainer = make(tmp_path, data, str(folder), load_in_8bit=True, max_steps=2)
    trainer.train()
    states = trainer.optimizer.state_dict()["state"]
    flat = [s.get("__bnb_optimizer_quant_state__", s) for s in states.values()]
    assert torch.uint8 in {moments["state1"].dtype for moments in flat}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_rows_of_an_epochs_end_are_in_its_checkpoint(strategy, data, tmp_path):
    """A checkpoint of an epoch's last step is written after the epoch's own log and evaluation."""
    settings = {"logging_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 8}
    settings |= {"save_strategy": strategy, "save_steps": 6, "eval_dataset": data}
    one = make(tmp_path / "whole", data, **settings)
    one.train()
    other = make(tmp_path / "resumed", data, **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert different(state(one), state(other)) == []
    assert [row["step"] for row in state(other)["log"] if "eval_loss" in row] == [6, 8]


EARLY = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
EARLY |= {"metric_for_best_model": "rewards/margins", "greater_is_better": False}


@pytest.fixture(scope="module")
def stopped_early(data, tmp_path_factory):
    """Margins grow from the first evaluation on, which early stopping takes for worse."""
    output = tmp_path_factory.mktemp("early")
    stop = EarlyStoppingCallback(early_stopping_patience=3)
    trainer = make(output, data, callbacks=[stop], eval_dataset=data, **EARLY)
    trainer.train()
    assert trainer.state.global_step == 4
    return output, state(trainer)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_stops_early_where_the_whole_one_does(step, stopped_early, data, tmp_path):
    output, expected = stopped_early
    stop = EarlyStoppingCallback(early_stopping_patience=3)
    trainer = make(tmp_path, data, callbacks=[stop], eval_dataset=data, **EARLY)
    result = trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
    assert result.global_step == 4
    assert different(expected, state(trainer)) == []


def test_a_callbacks_own_settings_are_the_checkpoints_aloud(stopped_early, data, tmp_path, caplog):
    for restored, steps in ((True, 4), (False, 8)):
        # anew, the fourth step of no improvement after step 4 is the eighth
        settings = EARLY | {"restore_callback_states_from_checkpoint": restored}
        stop = EarlyStoppingCallback(early_stopping_patience=4)
        trainer = make(tmp_path, data, callbacks=[stop], eval_dataset=data, **settings)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            result = trainer.train(resume_from_checkpoint=str(stopped_early[0] / "checkpoint-4"))
        assert result.global_step == steps
        told = "EarlyStoppingCallback goes on with the checkpoint's {'early_stopping_patience': 3"
        assert (told in caplog.text) is restored


class Counting(TrainerCallback, ExportableState):
    """Count steps."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_a_restored_callback_keeps_its_place(data, tmp_path, caplog):
    one = make(tmp_path / "one", data, callbacks=[Counting()], max_steps=3)
    one.train()
    kinds = [type(callback) for callback in one.callback_handler.callbacks]
    other = make(tmp_path / "other", data, callbacks=[Counting()], max_steps=3)
    with caplog.at_level(logging.WARNING):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert [type(callback) for callback in other.callback_handler.callbacks] == kinds
    (counting,) = (c for c in other.callback_handler.callbacks if isinstance(c, Counting))
    assert counting.steps == 3
    assert different(state(one), state(other)) == []
    assert caplog.text == ""


class Between(TrainerCallback):
    """Stand between two of another class."""


def test_several_callbacks_of_a_class_keep_places_and_states(data, tmp_path, caplog):
    def callbacks():
        stops = [EarlyStoppingCallback(3), EarlyStoppingCallback(7)]
        return [Counting(), Between(), stops[0], Counting(), stops[1], Between()]

    one = make(tmp_path / "one", data, callbacks=callbacks(), eval_dataset=data, **EARLY)
    one.train()
    assert one.state.global_step == 4
    kinds = [type(callback) for callback in one.callback_handler.callbacks]
    other = make(tmp_path / "other", data, callbacks=callbacks(), eval_dataset=data, **EARLY)
    with caplog.at_level(logging.WARNING):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert other.state.global_step == 4
    found = other.callback_handler.callbacks
    assert [type(callback) for callback in found] == kinds
    assert [c.steps for c in found if isinstance(c, Counting)] == [4, 4]
    stops = [c for c in found if isinstance(c, EarlyStoppingCallback)]
    assert [stop.early_stopping_patience for stop in stops] == [3, 7]
    assert "goes on with" not in caplog.text


def test_weights_alone_are_not_resumed(data, tmp_path):
    make(tmp_path, data, max_steps=2, save_only_model=True).train()
    trainer = make(tmp_path, data, max_steps=2, save_only_model=True, allow_changed=True)
    for chosen in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match="got .*without optimizer.pt, scheduler.pt, rng_state"):
            trainer.train(resume_from_checkpoint=chosen)


class At(TrainerCallback):
    """Do something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.mark.parametrize(
    ("number", "stop", "strategy", "step"),
    [
        (signal.SIGTERM, SystemExit, "steps", 2),
        (signal.SIGTERM, SystemExit, "epoch", 5),
        (signal.SIGINT, KeyboardInterrupt, "epoch", 2),
    ],
)
def test_a_signal_saves_once_and_stops(number, stop, strategy, step, data, tmp_path):
    settings = {"save_strategy": strategy, "save_steps": 100, "eval_strategy": "epoch"}
    settings |= {"eval_dataset": data, "reference_cache": str(tmp_path / "r")}
    whole = make(tmp_path / "whole", data, **settings)
    whole.train()
    at = At(step, lambda: signal.raise_signal(number))
    stopped = make(tmp_path / "stopped", data, callbacks=[at], **settings)
    before = signal.getsignal(number)
    with pytest.raises(stop) as error:
        stopped.train()
    assert error.value.args == ((143,) if number == signal.SIGTERM else ())
    assert signal.getsignal(number) == before
    found = list_checkpoints(tmp_path / "stopped")
    assert [path.name for path in found] == [f"checkpoint-{step + 1}"]
    resumed = make(tmp_path / "stopped", data, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert different(state(whole), state(resumed)) == []


def test_a_signal_respects_that_nothing_is_to_be_saved(data, tmp_path):
    at = At(1, lambda: signal.raise_signal(signal.SIGTERM))
    trainer = make(tmp_path, data, callbacks=[at], save_strategy="no")
    with pytest.raises(SystemExit, match="143"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("limit", [400, 2_000, 10_000, 30_000, 60_000])
def test_a_full_disk_costs_no_checkpoint(limit, data, tmp_path):
    """No file of the second save may be longer than ``limit`` bytes: the system refuses it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at = At(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    trainer = make(tmp_path, data, callbacks=[at], max_steps=3)
    try:
        with pytest.raises(OSError, match="checkpoint must be written to .*checkpoint-2.*; got"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / ".saving").exists()
    resumed = make(tmp_path, data, max_steps=3)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3


def test_rotation_counts_steps_and_complete_checkpoints_only(data, tmp_path):
    (tmp_path / "checkpoint-99").mkdir()  # of a crash of some other program
    trainer = make(tmp_path, data, max_steps=4, save_total_limit=2)
    trainer.train()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-99"]


def test_the_best_checkpoint_is_found_and_kept(data, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": data, "max_steps": 3}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 1}
    settings |= {"metric_for_best_model": "eval_loss", "learning_rate": 0.5}
    trainer = make(tmp_path, data, **settings)
    trainer.train()
    losses = {r["step"]: r["eval_loss"] for r in state(trainer)["log"] if "eval_loss" in r}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}").is_dir()


def test_one_process_per_output_folder(data, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys\nfrom ctrl_dpo.data.disk import exclusive\n"
        "with exclusive(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="must not be in use; got .* another process"):
            make(tmp_path, data, max_steps=1).train()
        other.kill()
        other.wait()
        with exclusive(tmp_path), exclusive(tmp_path):
            make(tmp_path, data, max_steps=1).train()


def test_a_fresh_run_starts_a_fresh_log(data, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    trainer = make(tmp_path, data, max_steps=3)
    trainer.train()
    assert [row["step"] for row in state(trainer)["log"]] == [3, 3]


CHANGES = {
    "seed": ({"seed": 1}, "seed 1 instead of 42"),
    "batch": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 2 instead of 1"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2"),
    "rate": ({"learning_rate": 2e-2}, "learning_rate 0.02 instead of 0.01"),
    "schedule": ({"lr_scheduler_type": "constant"}, "lr_scheduler_type 'constant'"),
    "length": ({"max_steps": 5}, "max_steps 5 instead of 2"),
    "loss": ({"loss": "softmax"}, "loss 'softmax' instead of 'squared'"),
    "anchor": ({"anchor": 1.0}, "anchor 1.0 instead of 0.0"),
    "optimiser": ({"optim": "sgd"}, "optim 'sgd' instead of 'adamw_torch'"),
    "clipping": ({"max_grad_norm": 0.1}, "max_grad_norm 0.1 instead of 1.0"),
    "dropout": ({"dropout": 0.0}, "adapter.lora_dropout 0.0 instead of 0.2"),
}


@pytest.fixture(scope="module")
def short(tmp_path_factory, data):
    output = tmp_path_factory.mktemp("short")
    make(output, data, max_steps=2).train()
    return output


@pytest.mark.parametrize("change", CHANGES)
def test_another_runs_checkpoint_is_refused_by_name(change, short, data, tmp_path):
    settings, message = CHANGES[change]
    trainer = make(tmp_path, data, **{"max_steps": 2} | settings)
    with pytest.raises(ValueError, match=f"run must be that of .*checkpoint-1.*{message}.*allow_c"):
        trainer.train(resume_from_checkpoint=str(short / "checkpoint-1"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"beta": 0.3}, "beta 0.3 instead of 0.2"),
        ({"procedure": "best_of_2"}, "procedure of the data .'best_of_2'. instead of"),
        ({"transformation": "optimal"}, "transformation of the data .'optimal.* instead of"),
        ({"rewards": [[3.0, 1.0, 2.0]] * 6}, "train_dataset '.*' instead of"),
    ],
)
def test_other_data_is_refused_by_name(labels, message, short, tmp_path):
    rewards = labels.get("rewards", GROUPS["rewards"])
    options = LABELS | {k: v for k, v in labels.items() if k != "rewards"}
    other = relabel(Dataset.from_dict(GROUPS | {"rewards": rewards}), **options)
    trainer = make(tmp_path, other, max_steps=2)
    with pytest.raises(ValueError, match=f"run must be that of .*{message}"):
        trainer.train(resume_from_checkpoint=str(short / "checkpoint-1"))


def test_another_model_and_another_version_are_refused_by_name(short, data, tmp_path, monkeypatch):
    other = tiny_llama(seed=1, num_hidden_layers=1)
    trainer = make(tmp_path, data, other, max_steps=2)
    with pytest.raises(ValueError, match="model 'tensors:.*instead of.*reference_model 'tensors"):
        trainer.train(resume_from_checkpoint=str(short / "checkpoint-1"))
    versions = "ctrl_dpo.engine.run_identity.installed_versions"
    monkeypatch.setattr(versions, lambda: {"torch": "1.0"})
    trainer = make(tmp_path, data, max_steps=2)
    with pytest.raises(ValueError, match="version of torch '1.0' instead of"):
        trainer.train(resume_from_checkpoint=str(short / "checkpoint-1"))


def test_a_change_is_allowed_aloud(short, data, tmp_path, caplog):
    trainer = make(tmp_path, data, max_steps=4, seed=1, allow_changed=True)
    with caplog.at_level(logging.WARNING):
        result = trainer.train(resume_from_checkpoint=str(short / "checkpoint-1"))
    assert result.global_step == 4
    assert "seed 1 instead of 42" in caplog.text
    assert "max_steps 4 instead of 2" in caplog.text


def test_places_and_logging_may_change(short, data, tmp_path):
    settings = {"logging_steps": 1, "save_steps": 50, "run_name": "other", "save_total_limit": 3}
    trainer = make(tmp_path, data, max_steps=2, **settings)
    assert trainer.train(resume_from_checkpoint=str(short / "checkpoint-1")).global_step == 2


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(short, data, tmp_path, caplog):
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    (tmp_path / "run" / "checkpoint-7").mkdir()
    trainer = make(tmp_path / "run", data, max_steps=2)
    with pytest.raises(ValueError, match="must be complete; got .* where optimizer.pt is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-7 is damaged: manifest.json is missing" in caplog.text
    assert "checkpoint-2 is damaged: optimizer.pt is missing" in caplog.text
    assert "checkpoint-1 is used instead" in caplog.text
    expected = torch.load(short / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert different(expected, trainer.optimizer.state_dict()) == []
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-7"]


def test_nothing_to_resume_from_is_an_error(data, tmp_path):
    trainer = make(tmp_path, data, max_steps=1)
    with pytest.raises(ValueError, match="output_dir must hold a checkpoint .*; got none"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="got .*absent.*, where there is no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "absent"))


# ---- numbers that are not finite ----


def spoil(trainer, value):
    def action():
        weight = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
        weight.data[0, 0] = value

    return action


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value, data, tmp_path):
    at = At(2, lambda: spoil(trainer, value)())
    trainer = make(tmp_path, data, callbacks=[at], gradient_accumulation_steps=2)
    with pytest.raises(FloatingPointError, match="loss must be finite; got nan at step 2"):
        trainer.train()
    assert trainer.state.global_step == 2
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-1", "checkpoint-2"]
    weights = [p for n, p in trainer.model.named_parameters() if "lora" in n]
    assert sum(int((~torch.isfinite(p)).sum()) for p in weights) == 1  # the one put there
    resumed = make(tmp_path, data, gradient_accumulation_steps=2)
    assert resumed.train(resume_from_checkpoint=True).global_step == 9


def test_a_gradient_that_is_not_finite_stops_before_the_update(data, tmp_path):
    def poison():
        weight = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
        weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer = make(tmp_path, data, callbacks=[At(1, poison)])
    with pytest.raises(FloatingPointError, match="grad_norm must be finite; got (nan|inf) at step"):
        trainer.train()
    weights = [p for n, p in trainer.model.named_parameters() if "lora" in n]
    assert all(bool(torch.isfinite(p).all()) for p in weights)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path):
    class AfterTheUpdate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                spoil(trainer, float("inf"))()

    trainer = make(tmp_path, data, callbacks=[AfterTheUpdate()], save_total_limit=1)
    with pytest.raises(FloatingPointError, match="weights must be finite; got '.*lora_B.*' at st"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
