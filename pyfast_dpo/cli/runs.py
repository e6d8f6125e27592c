"""What the runs of the commands share: the adapter, the table as they go, what they leave and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pyfast_dpo.evaluation.curves import plot_curves
from pyfast_dpo.evaluation.displacement import chosen_falling
from pyfast_dpo.ops.extras import require

if TYPE_CHECKING:
    from pyfast_dpo.trainers.policy import PolicyTrainer
    from pyfast_dpo.trainers.progress import ProgressTable


def lora_config(rank: int, alpha: int | None = None, **options: Any) -> Any:
    """A LoRA adapter, by default on every linear layer but the head, at twice its rank."""
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return require("peft", "--lora").LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, **options)


def add_table(trainer: PolicyTrainer) -> ProgressTable:
    """Replaces the Trainer's printing by the table."""
    from transformers.trainer_callback import PrinterCallback

    from pyfast_dpo.trainers.progress import ProgressTable

    table = ProgressTable()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(table)
    return table


def finish(trainer: PolicyTrainer, report: dict[str, Any], *, title: str) -> None:
    """Saves the model with its tokenizer, `metrics.json` and `curves.png` to the output folder, and says where
    everything lies."""
    trainer.save_model()  # by all processes, which gather sharded weights
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir or ".")
    history = trainer.state.log_history
    metrics, curves = folder / "metrics.json", folder / "curves.png"
    metrics.write_text(json.dumps({**report, "history": history}, indent=1))
    adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    saved = [("adapter" if adapter else "model", folder), ("metrics", metrics)]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        plot_curves(history, curves, title=title)
        saved.append(("curves", curves))
        steps = trainer.state.global_step
        print(f"loss: first {losses[0]:.7f}, last {losses[-1]:.4f}, over {steps} steps")
    warning = (
        chosen_falling(history, cast(Any, trainer.args).beta)
        if history and "rewards/chosen" in history[0]
        else None
    )
    if warning:
        print(f"warning: {warning}")
    saved += [("checkpoint", checkpoint) for checkpoint in whole_checkpoints(folder)]
    print("saved, with the tokenizer:")
    for what, path in saved:
        print(f"  {what:<12}{path}")


def whole_checkpoints(folder: str | Path | None) -> list[Path]:
    """The checkpoints of an output folder from which a run can go on, the newest last."""
    from pyfast_dpo.trainers.checkpoints import checkpoints_of, what_is_lacking

    found = checkpoints_of(Path(folder or "."))
    return [checkpoint for checkpoint in reversed(found) if what_is_lacking(checkpoint) is None]
