from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_facts() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def best_cpu_capability() -> str: ...
def cpu_vendor() -> str: ...
def head_panel_rows() -> int: ...
def pair_loss_names() -> list[str]: ...
def unpaired_loss_names() -> list[str]: ...
def sequence_logps(logits: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[Any]: ...
def pair_loss(
    policy_chosen: NDArray[Any],
    policy_rejected: NDArray[Any],
    reference_chosen: NDArray[Any] | None,
    reference_rejected: NDArray[Any] | None,
    chosen_lengths: NDArray[Any] | None,
    rejected_lengths: NDArray[Any] | None,
    margins: NDArray[Any] | None,
    shift: NDArray[Any] | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    discopop_tau: float,
    margin: float,
    divergence: str,
    divergence_alpha: float,
    average_first: bool,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def unpaired_loss(
    policy: NDArray[Any],
    reference: NDArray[Any] | None,
    is_desirable: NDArray[np.bool_],
    kl: float,
    loss: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def policy_loss_names() -> list[str]: ...
def ppo_loss(
    logps: Any, old: Any, advantages: Any, epsilon: float, /
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def gae(
    rewards: Any, values: Any, dones: Any, last_value: float, gamma: float, lam: float, /
) -> NDArray[Any]: ...
