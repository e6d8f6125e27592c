"""Weights for servers: a LoRA adapter as a folder that they read."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfast_dpo.rollout.engine import RolloutError
from pyfast_dpo.rollout.http_client import HTTPClient, Refused


def lora_adapter(function: str, model: Any) -> str:
    """The name of the one active LoRA adapter of a PEFT model, which must hold all that is trained.

    Raises:
        ValueError: a model without adapters, another kind, several at once; trained weights outside of it, which
            would stay behind; weights of which this process holds a part.
    """
    if not hasattr(model, "get_base_model"):
        raise ValueError(
            f"{function}: model must be a PEFT model with a LoRA adapter, got {type(model).__name__}; the weights of a "
            "whole model do not go through a folder at every step: train with LoRA (peft_config), or with "
            "TransformersEngine, or save the model and start the servers with it"
        )
    active = list(model.base_model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"{function}: model must have one active adapter, got {active}")
    kind = model.peft_config[active[0]].peft_type
    if kind != "LORA":
        raise ValueError(
            f"{function}: servers load LoRA adapters, got {getattr(kind, 'value', kind)}"
        )
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    outside = [name for name in trained if ".lora_" not in name]
    if outside:
        raise ValueError(
            f"{function}: {len(outside)} trained weights are not part of the LoRA adapter, so that the servers would go "
            f"on with old ones, such as {outside[0]}; leave modules_to_save and bias out, and freeze the rest"
        )
    # FSDP2 and ZeRO-3 leave a part, or nothing, in each process.
    if any(hasattr(each, "full_tensor") or each.numel() == 0 for each in trained.values()):
        raise ValueError(
            f"{function}: the adapter is divided among processes; train it undivided, with DDP"
        )
    return active[0]


class ServedAdapter:
    """The adapter that the servers have: one at a time, each new one under a new name and in a new folder.

    Args:
        routes: of the servers, with a place for "load" and "unload".
        folder: where the folders are made; None: the temporary folder of this machine.
    """

    def __init__(
        self,
        client: HTTPClient,
        urls: Sequence[str],
        routes: str,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self.name: str | None = None
        self._client, self._urls, self._routes, self._parent = client, urls, routes, folder
        self._root: tempfile.TemporaryDirectory[str] | None = None  # goes when the process ends
        self._serial = 0

    def exchange(self, model: Any, adapter: str, version: int) -> None:
        """Loads an adapter into all servers, in place of the one before.

        Raises:
            RolloutError: a server did not load it; the one before is still there.
        """
        if self._root is None:
            self._root = tempfile.TemporaryDirectory(
                prefix="pyfast_dpo-", dir=self._parent, ignore_cleanup_errors=True
            )
            os.chmod(self._root.name, 0o755)  # servers may be other users'
        self._serial += 1  # a version may come twice, with other weights
        name = f"{Path(self._root.name).name}-{self._serial}-v{version}"
        folder = Path(self._root.name).absolute() / name
        # The embedding is frozen; "auto" would ask the Hub whether it has grown.
        model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
        # PEFT puts all but "default" one folder deeper.
        path = str(folder if adapter == "default" else folder / adapter)
        # In place, so that a second try after a lost answer is no mistake.
        body = {"lora_name": name, "lora_path": path, "load_inplace": True}
        loaded: list[str] = []
        try:
            for url in self._urls:
                self._client.send([url], self._routes.format("load"), body)
                loaded.append(url)
        except RolloutError:
            self._unload(name, loaded)
            raise
        if self.name is not None:
            self._unload(self.name, self._urls)
        self.name = name

    def close(self) -> None:
        """Out of the servers; the folder is removed."""
        if self._root is not None:
            if self.name is not None:
                self._unload(self.name, self._urls)
            self._root.cleanup()
        self._root = self.name = None

    def _unload(self, name: str, urls: Sequence[str]) -> None:
        """What fails here costs a server memory, not the run."""
        for url in urls:
            try:
                self._client.send([url], self._routes.format("unload"), {"lora_name": name})
            except Refused:
                pass  # a server that has begun anew does not know it
            except RolloutError as error:
                warnings.warn(f"{error}; the adapter {name} stays loaded there", stacklevel=4)
        if self._root is not None:
            shutil.rmtree(Path(self._root.name) / name, ignore_errors=True)
