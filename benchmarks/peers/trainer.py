"""Transformers' Trainer, one process."""

from __future__ import annotations

import tempfile

import harness


def main() -> None:
    given = harness.arguments()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    recorder = harness.Recorder(given.report)
    losses: list[float] = []

    class Record(TrainerCallback):
        def on_train_begin(self, *_, **__):
            recorder.start()

        def on_step_end(self, *_, **__):
            recorder.step(float("nan"))

        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    tuned = {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused"}
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=given.batch,
            max_steps=given.steps,
            learning_rate=harness.LR,
            lr_scheduler_type="constant",
            adam_beta1=harness.BETAS[0],
            adam_beta2=harness.BETAS[1],
            weight_decay=harness.WEIGHT_DECAY,
            max_grad_norm=harness.MAX_NORM,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **(tuned if given.tuned else {}),
        )
        model = harness.load_model(given)
        Trainer(model, options, train_dataset=harness.Dataset(given), callbacks=[Record()]).train()
    recorder.finish(losses)


if __name__ == "__main__":
    main()
