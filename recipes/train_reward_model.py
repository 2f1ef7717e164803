"""Train a reward model on preference pairs, and measure it on pairs that it has not seen.

    python recipes/train_reward_model.py MODEL PAIRS --output runs/reward --half 0
    ctrl-dpo score draws --reward runs/reward --output scored

MODEL is any causal language model; PAIRS any layout of pairs that `ctrl-dpo` reads, as a file or by
hub name. `--half 0` trains on one half of the dialogues and is measured on the other, `--half 1`
the reverse: two models that share no pair, the second to judge what was trained with the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from ctrl_dpo.data.folders import read_rows, write_atomically
from ctrl_dpo.data.layouts import read_groups
from ctrl_dpo.data.messages import prompt_key
from ctrl_dpo.engine.models import fast_dtype, load_tokenizer

MEASURED = "reward_model.json"
# no system message and no control tokens: half the tokens of a short dialogue
SHORT_TEMPLATE = (
    "{% for m in messages %}{{ 'Human: ' if m['role'] == 'user' else 'Assistant: ' }}"
    "{{ m['content'] }}{{ '\n' }}{% endfor %}"
)


class PairTrainer(Trainer):
    """Bradley-Terry: the loss of a pair is -log sigmoid(r(chosen) - r(rejected))."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the pairs of a batch."""
        chosen, rejected = model(**inputs).logits.float().view(-1, 2).unbind(1)
        loss = -F.logsigmoid(chosen - rejected).mean()
        return (loss, {"margins": chosen - rejected}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return loss and margins of an evaluation batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, found = self.compute_loss(model, self._prepare_inputs(inputs), True)
        # every pair is right by its margin's sign: a label for each, so that Trainer gathers them
        return loss, found["margins"], torch.ones_like(found["margins"])


def pair_tokens(tokenizer: Any, group: Any, longest: int, response: int) -> list[list[int]] | None:
    """Tokenise chosen and rejected as `ctrl-dpo score` will, or None where they do not fit.

    Responses are cut to what a policy will draw; of a long dialogue the first turns are left out.
    """
    cut = [
        tokenizer(r, add_special_tokens=False)["input_ids"][:response] for r in group["responses"]
    ]
    texts = [tokenizer.decode(ids) for ids in cut]
    prompt = list(group["prompt"])
    while prompt and texts[0] != texts[1]:
        dialogues = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
        ids = [tokenizer.apply_chat_template(d)["input_ids"] for d in dialogues]
        if max(map(len, ids)) <= longest:
            return ids
        prompt = prompt[2:]
    return None


def half_of(prompt: Any) -> int:
    """Put a dialogue into one half by its first turn, so that no conversation is in both."""
    return hashlib.sha256(prompt_key(prompt[:1]).encode()).digest()[0] % 2


def read_pairs(
    tokenizer: Any, args: argparse.Namespace
) -> tuple[list[Any], list[Any], dict[str, int]]:
    """Return the pairs of this half and of the other, and what was left out."""
    groups, report = read_groups(read_rows(args.pairs), same_prompt="keep", invalid="drop")
    halves: tuple[list[Any], list[Any]] = ([], [])
    dropped = len(report.dropped)
    for group in groups:
        ids = pair_tokens(tokenizer, group, args.max_length, args.max_response_length)
        if ids is None:
            dropped += 1
        else:
            halves[half_of(group["prompt"]) != args.half].append({"pair": ids})
    return *halves, {"pairs": len(groups), "dropped": dropped}


def collate(rows: list[Any], pad: int) -> dict[str, torch.Tensor]:
    """Pad the sequences of a batch on the right: chosen and rejected of each pair in turn."""
    sequences = [torch.tensor(ids) for row in rows for ids in row["pair"]]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return {"input_ids": padded, "attention_mask": mask}


def load(args: argparse.Namespace, pad: int) -> Any:
    """Load the backbone in float32 with a new head; optionally only its first layers."""
    torch.manual_seed(args.seed)  # the head's start
    options = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=torch.float32, **options
    )
    model.config.pad_token_id = pad
    return model


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", help="causal language model, folder or hub name")
    add("pairs", help="preference pairs, file or hub name")
    add("--output", required=True, help="folder of the reward model")
    add("--half", type=int, choices=(0, 1), default=0)
    add("--seed", type=int, default=0)
    add("--layers", type=int, help="keep only so many layers of the backbone")
    add("--epochs", type=float, default=2.0)
    add("--learning-rate", type=float, default=1e-4)
    add("--batch-size", type=int, default=16, help="pairs an update")
    add("--micro-batch-size", type=int, default=4, help="pairs a forward pass")
    add("--short-template", action="store_true", help="turns as `Human:` and `Assistant:`")
    add("--max-length", type=int, default=256, help="tokens of dialogue and response")
    add("--max-response-length", type=int, default=64, help="tokens")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tokenizer = load_tokenizer(args.model)
    if args.short_template:
        tokenizer.chat_template = SHORT_TEMPLATE
    train, held_out, counts = read_pairs(tokenizer, args)
    trainer = PairTrainer(
        model=load(args, tokenizer.pad_token_id),
        args=TrainingArguments(
            args.output,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            # few pairs a forward pass: dialogues differ in length, and padding costs like text
            per_device_train_batch_size=args.micro_batch_size,
            per_device_eval_batch_size=args.micro_batch_size,
            gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.01,
            # of activations only: weights, updates and the head's sum stay float32
            bf16=fast_dtype() == "bfloat16",
            train_sampling_strategy="random",
            logging_nan_inf_filter=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=False,
            seed=args.seed,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
    )
    trained = trainer.train()
    margins = trainer.predict(held_out).predictions
    accuracy = float((margins > 0).mean() + 0.5 * (margins == 0).mean())
    error = (accuracy * (1 - accuracy) / len(held_out)) ** 0.5
    print(f"{accuracy:.3f} +- {error:.3f} of {len(held_out)} held-out pairs ranked right")
    measured = {"settings": vars(args), **counts, "train_pairs": len(train)}
    measured |= {"held_out_pairs": len(held_out), "accuracy": accuracy, "standard_error": error}
    measured["seconds"] = trained.metrics["train_runtime"]
    trainer.save_model()
    text = json.dumps(measured, indent=1) + "\n"
    write_atomically(Path(args.output) / MEASURED, text.encode())


if __name__ == "__main__":
    main()
