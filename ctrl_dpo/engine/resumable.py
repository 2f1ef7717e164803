"""A ``transformers.Trainer`` that can be stopped at any point and resumed to the same bits.

The stock Trainer writes checkpoints in place, resumes from partial ones and under other settings
without a word, and forgets what it had summed for the next log row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from ctrl_dpo.data.disk import exclusive
from ctrl_dpo.data.folders import write_atomically
from ctrl_dpo.engine import checkpoints
from ctrl_dpo.engine.metrics import RunningMeans
from ctrl_dpo.engine.processes import on_main
from ctrl_dpo.engine.run_identity import check_same_run, run_identity
from ctrl_dpo.engine.stopping import StopSignals, check_step, exit_by, first_not_finite

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
STATE = "trainer_state.json"


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are atomic, verified, and hold all that decides what follows.

    Parameters
    ----------
    facts : mapping of str to Any
        What identifies the run besides its settings, rows and adapter.
    means : mapping of str to RunningMeans
        Sums for the next log row, by part; they belong to a checkpoint.
    **arguments : Any
        Of ``transformers.Trainer``.
    """

    def __init__(
        self, *, facts: Mapping[str, Any], means: Mapping[str, RunningMeans], **arguments: Any
    ) -> None:
        self._facts = facts
        self._means = means
        self._run: dict[str, Any] | None = None
        self._scratch: Path | None = None
        self._source: Path | None = None
        self._stop_by = 0
        self._saves_late = False
        self._is_cut_short = False
        self._signals = StopSignals()
        self._has_logged = False
        super().__init__(**arguments)
        self._bad_loss = torch.zeros((), device=self.args.device)
        self.add_callback(_Hooks(self))

    # ---- starting, resuming, stopping ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Parameters
        ----------
        resume_from_checkpoint : str or bool, optional
            True takes the newest complete checkpoint of ``output_dir``.
        *args, **kwargs : Any
            As of ``transformers.Trainer.train``.

        Returns
        -------
        TrainOutput
            Its mean loss and metrics are those of the whole run, resumed or not.

        Raises
        ------
        ValueError
            If the checkpoint is damaged, of another run or of weights only, or ``output_dir`` is in
            use.
        FloatingPointError
            If loss, gradient norm or weights are not finite.

        Notes
        -----
        SIGTERM and SIGINT stop after the current step, save a checkpoint (unless ``save_strategy``
        is ``"no"``), and end the process with exit code 143 and 130 (``KeyboardInterrupt``).
        """
        with ExitStack() as held:
            on_main(lambda: held.enter_context(exclusive(self.args.output_dir)))
            chosen = on_main(lambda: self._choose(resume_from_checkpoint))
            self._source = None if chosen is None else Path(chosen)
            if chosen is not None:
                self.args.eval_on_start = False  # the start of the run is behind it
            held.enter_context(self._signals)
            result = super().train(chosen, *args, **kwargs)
        stop_by = self._stop_by or self._signals.received
        if stop_by:
            exit_by(stop_by)
        return TrainOutput(result.global_step, result.metrics["train_loss"], result.metrics)

    def _choose(self, asked: str | bool | None) -> str | None:
        """Find and verify the checkpoint to resume from; remove what an interrupted save left."""
        run, run_dir = self.run, Path(self.args.output_dir)
        checkpoints.clear_scratch(run_dir)
        if asked is None or asked is False:
            return None
        folder = checkpoints.newest_complete(run_dir) if asked is True else Path(str(asked))
        if folder is None:
            raise ValueError(
                f"output_dir must hold a checkpoint to resume from; got none in {str(run_dir)!r}."
            )
        checkpoints.check_complete(folder)
        checkpoints.check_resumable(folder)
        changes = check_same_run(
            checkpoints.read_run(folder), run, str(folder), self.args.allow_changed
        )
        if changes:
            logger.warning(
                "%s is resumed by another run: %s. Optimiser and schedule go on with the "
                "checkpoint's settings.",
                folder,
                ", ".join(changes),
            )
        logger.info("resuming from %s", folder)
        return str(folder)

    @property
    def run(self) -> dict[str, Any]:
        """Identity of this run, see :func:`ctrl_dpo.engine.run_identity.run_identity`."""
        if self._run is None:
            configs = getattr(self.model, "peft_config", {})
            adapter = next(iter(configs.values())).to_dict() if configs else {}
            facts = {"processes": self.args.world_size, **self._facts}
            self._run = run_identity(self.args, self.train_dataset, adapter, facts)
        return self._run

    def _run_epoch(self, **arguments: Any) -> None:
        """Train for an epoch, unless the checkpoint was of the last step already."""
        if self.state.global_step >= self.state.max_steps or self._had_stopped_early():
            self._load_rng_state(str(self._source))
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _load_callback_state(self) -> None:
        """Restore callbacks too, each in its place: some act on what others decided before them."""
        given = self.callback_handler.callbacks.copy()
        kinds = [type(callback).__name__ for callback in given]
        stored = self.state.stateful_callbacks
        for kind in set(kinds) & set(stored):
            if isinstance(stored[kind], list):  # every save appends, the first ones are restored
                stored[kind] = stored[kind][-kinds.count(kind) :]
        super()._load_callback_state()
        restored: dict[str, list[TrainerCallback]] = {kind: [] for kind in kinds}
        for callback in self.callback_handler.callbacks:
            restored[type(callback).__name__].append(callback)
        self.callback_handler.callbacks = [restored[kind].pop(0) for kind in kinds]
        for old, new in zip(given, self.callback_handler.callbacks, strict=True):
            if new is not old and new.state()["args"] != old.state()["args"]:
                logger.warning(
                    "%s goes on with the checkpoint's %s instead of %s; "
                    "restore_callback_states_from_checkpoint=False starts it anew.",
                    type(new).__name__,
                    new.state()["args"],
                    old.state()["args"],
                )

    def _had_stopped_early(self) -> bool:
        """Tell whether early stopping had ended the run that the checkpoint is of."""
        stops = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return self._source is not None and any(
            0 < stop.early_stopping_patience <= stop.early_stopping_patience_counter
            for stop in stops
        )

    # ---- guards ----

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Make one forward and backward pass, and note a loss that is not finite."""
        loss: torch.Tensor = super().training_step(model, *args, **kwargs)
        # noted on the device: whether to stop is decided once a step, by all processes together
        self._bad_loss = torch.where(torch.isfinite(loss), self._bad_loss, loss.float())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm, or stop before the update on every process."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # under float16 an infinite gradient is the scaler's ordinary cue to skip the step
        skips = norm is None or getattr(self.accelerator, "scaler", None) is not None
        seen = [float(self._bad_loss), 0.0 if skips else float(norm), self._signals.received]
        table = self.accelerator.gather(torch.tensor([seen], device=self.args.device))
        self._stop_by = int(table[:, 2].max())
        check_step(table[:, :2], self.state.global_step)
        return norm

    def _check_weights(self) -> None:
        """Raise on every process rather than replace good checkpoints by a bad one."""
        names = gather_object([first_not_finite(self.model.named_parameters())])
        bad = next((name for name in names if name is not None), None)
        if bad is not None:
            raise FloatingPointError(
                f"weights must be finite; got {bad!r} at step {self.state.global_step}. No "
                "checkpoint was written, and the last one is kept. Lower learning_rate."
            )

    # ---- writing ----

    def _get_output_dir(self, trial: Any) -> str:
        """Return where checkpoints go: during a save, the scratch folder."""
        return str(self._scratch or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint once it has its name."""
        if self._scratch is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, then rename it."""
        self._check_weights()
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self._scratch = final.parent / checkpoints.SCRATCH
        try:
            on_main(lambda: checkpoints.clear_scratch(final.parent))
            super()._save_checkpoint(model, trial)
            part = self._scratch / final.name
            torch.save(self._sums(), part / self._sums_name())
            self.accelerator.wait_for_everyone()
            on_main(lambda: self._publish(part, final))
        except Exception as error:  # torch and safetensors raise errors of their own on a full disk
            raise OSError(
                f"checkpoint must be written to {str(final)!r}; got {error}. Older checkpoints are "
                "untouched. Free disk space, then resume."
            ) from error
        finally:
            self._scratch = None
            checkpoints.clear_scratch(final.parent)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _publish(self, part: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(part):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(part / STATE))
        checkpoints.write_manifest(part, self.run)
        checkpoints.publish(part, final)
        best = self.state.best_model_checkpoint
        keep = {final} | ({Path(best)} if best else set())
        checkpoints.rotate(final.parent, self.args.save_total_limit, keep)

    # ---- what the stock Trainer forgets ----

    def _sums_name(self) -> str:
        return f"running_sums_{self.args.process_index}.pt"

    def _sums(self) -> dict[str, Any]:
        """Collect what the next log row is made of, of this process."""
        return {
            "loss": self._tr_loss.clone(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "means": {part: means.state_dict() for part, means in self._means.items()},
        }

    def restore_sums(self) -> None:
        """Take up the log where the checkpoint left it; a fresh run starts an empty one."""
        self._bad_loss = torch.zeros_like(self._bad_loss)
        self._stop_by = 0
        if self._source is None:
            if self.is_world_process_zero() and not self._has_logged:
                self.metrics_path.unlink(missing_ok=True)  # of a run that died before it saved
            return
        path = self._source / self._sums_name()
        if path.is_file():  # not there for a process that the checkpoint's run did not have
            sums = torch.load(path, weights_only=True, map_location=self.args.device.type)
            self._tr_loss = sums["loss"]
            self._total_loss_scalar = sums["total_loss"]
            self._globalstep_last_logged = sums["last_logged"]
            for part, means in self._means.items():
                means.load_state_dict(sums["means"][part])
        if self.is_world_process_zero():
            history = TrainerState.load_from_json(str(self._source / STATE)).log_history
            text = "".join(_line(row) for row in history)
            write_atomically(self.metrics_path, text.encode("utf-8"))

    @property
    def metrics_path(self) -> Path:
        """The log as a file, one JSON object a line."""
        return Path(self.args.output_dir) / METRICS

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a row, and keep it in ``metrics.jsonl``."""
        if "train_loss" in logs:
            # of the whole run, also where this process made only its last steps
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)
        self._has_logged = True
        if self.is_world_process_zero():
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(_line(self.state.log_history[-1]))

    # ---- callbacks ----

    def end_step(self, control: Any) -> None:
        """Stop at a signal, and save what an epoch's end will add to the log not before it."""
        ends_epoch = control.should_training_stop or float(self.state.epoch).is_integer()
        if self._stop_by:
            control.should_save = control.should_save or self.args.save_strategy != "no"
            control.should_training_stop = True
        self._is_cut_short = bool(self._stop_by) and not ends_epoch
        self._saves_late = ends_epoch and control.should_save
        control.should_save = control.should_save and not ends_epoch

    def end_epoch(self, control: Any) -> None:
        """Save what waited for the epoch's end; an epoch that was cut short ends nothing."""
        if self._is_cut_short:
            control.should_save = control.should_evaluate = control.should_log = False
        control.should_save = control.should_save or self._saves_late
        self._saves_late = False


class _Hooks(TrainerCallback):
    """Calls of the training loop that have no method of their own."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_sums()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_epoch(control)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({"step": row["step"], **row}) + "\n"
