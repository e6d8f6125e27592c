"""The model card: what was trained, from what and how, without asking the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCardData
from torch import nn

from pyfast_dpo.trainers.checkpoints import UNFINISHED, CheckpointingTrainer

OPTIONS = (  # that the card shows
    "loss_type", "beta", "num_generations", "max_completion_length", "temperature", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_length", "seed",
)  # fmt: skip
PACKAGES = ("pyfast_dpo", "transformers", "torch", "datasets", "peft", "accelerate")


class CardTrainer(CheckpointingTrainer):
    """A `Trainer` that describes its models in a `README.md` beside them.

    Attributes:
        paper: of the method: title and address.
    """

    _tag_names: ClassVar[tuple[str, ...]] = ("pyfast_dpo",)
    paper: ClassVar[tuple[str, str]]
    _told: dict[str, Any] | None = None  # in the last call of create_model_card

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | Iterable[str] | None = None,
        *,
        dataset: str | list[str] | None = None,
        finetuned_from: str | None = None,
        **others: Any,
    ) -> None:
        """Writes `README.md` into `args.output_dir`.

        Args:
            model_name: the title; by default the name of `args.output_dir`.
            dataset_name, dataset: of the training data, one name or several (TRL's and transformers' keyword).
            tags: added to those of the trainer.
            finetuned_from: by default the name of the model that was trained, unless it is a folder.
            others: further entries of the card's header, such as `language` and `license`; None leaves one out.
        """
        self._told = {
            "model_name": model_name,
            "datasets": [*_several(dataset_name), *_several(dataset)] or None,
            "tags": sorted({*self._tag_names, *_several(tags)}),
            "base_model": finetuned_from or self._base_model_name(),
            **{name: value for name, value in others.items() if value is not None},
        }
        self._write_card(Path(str(self.args.output_dir)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a model card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self._write_card(Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._write_card(Path(str(self.args.output_dir)))

    def _write_card(self, folder: Path) -> None:
        if not self.is_world_process_zero():
            return
        told = self._told or {
            "tags": sorted(self._tag_names),
            "base_model": self._base_model_name(),
        }
        data = ModelCardData(
            **{**told, "model_name": told.get("model_name") or folder.absolute().name},
            library_name="peft" if hasattr(self.model, "peft_config") else "transformers",
        )
        card, unfinished = folder / "README.md", folder / f"{UNFINISHED}.md"
        with self._writing(card, unfinished):
            folder.mkdir(parents=True, exist_ok=True)
            text = f"---\n{data.to_yaml()}\n---\n\n{self._card_text(data)}"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(card)

    def _base_model_name(self) -> str | None:
        config = getattr(self.model, "config", None)
        name = getattr(config, "_name_or_path", None)
        return name if name and not os.path.isdir(name) else None

    def _card_text(self, data: ModelCardData) -> str:
        method, address = self.paper
        base = data.base_model
        start = f"[{base}](https://huggingface.co/{base})" if base else "a model"
        trained_on = f" on {', '.join(data.datasets)}" if data.datasets else ""
        options = "\n".join(
            f"| `{name}` | `{getattr(self.args, name)}` |"
            for name in OPTIONS
            if hasattr(self.args, name)
        )
        versions = "\n".join(f"- {name} {version}" for name, version in _versions())
        return (
            f"# {data.model_name}\n\n"
            f"Trained from {start}{trained_on} by `{type(self).__name__}` of pyfast_dpo: [{method}]({address}).\n\n"
            f"## Training\n\n| option | value |\n|---|---|\n{options}\n\n"
            f"## Versions\n\n{versions}\n"
        )


def _several(names: str | Iterable[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            pass
    return found
