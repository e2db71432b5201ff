"""Transformers' Trainer, in one process or under torchrun. Its fused AdamW is its own default.

python benchmarks/peers/trainer.py --setting DIR --steps 12 [--bf16 --compile]
torchrun --standalone --nproc-per-node 2 benchmarks/peers/trainer.py …
"""

from __future__ import annotations

import tempfile

from common import BETAS, LR, MAX_NORM, WEIGHT_DECAY, Rows, Stopwatch, arguments, load_model


def main() -> None:
    given = arguments()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    watch = Stopwatch()

    class Watching(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            watch.start()

        def on_step_end(self, *_: object, **__: object) -> None:
            watch.mark()

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:  # once a step; the last log is a summary of the run
                watch.loss(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=load_model(given),
            args=TrainingArguments(
                output_dir=output,
                use_cpu=True,
                # the task
                max_steps=given.steps,
                per_device_train_batch_size=given.rows // given.world,
                learning_rate=LR,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=MAX_NORM,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,  # shift_labels is no named argument of the model
                # the setting
                bf16=given.bf16,
                torch_compile=given.compile,
                # nothing but training
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Rows(given),
            callbacks=[Watching()],
        )
        trainer.train()
        assert trainer.args.world_size == given.world
    watch.report(averaged=True)


if __name__ == "__main__":
    main()
