"""The public losses: what each sees, which options go with it, and the check of them all.

The mathematics is in `csrc/common/losses_*.h` and, independently, in `oracle.py`. A name here is one of
those formulas together with what it is fed: log-ratios or the policy alone, sums or averages, sorted or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyfast_dpo.ops.checks import check_beta, check_choice, check_finite, check_label_smoothing

LossType = str | Sequence[str]

REVERSE_KL, JENSEN_SHANNON, ALPHA = "reverse_kl", "js_divergence", "alpha_divergence"
DIVERGENCES = (REVERSE_KL, "forward_kl", JENSEN_SHANNON, ALPHA)

# Every option that belongs to some losses only, with its default, which stands for "not given".
OPTIONS: dict[str, object] = {
    "label_smoothing": 0.0,
    "f_divergence_type": REVERSE_KL,
    "margins": None,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "alphapo_alpha": 0.25,
    "cpo_alpha": 1.0,
    "bco_shift": None,
}
# Values that say "without it", which is what a loss without the option does anyway.
NEUTRAL: dict[str, object] = {"simpo_gamma": 0.0, "alphapo_alpha": 0.0, "cpo_alpha": 0.0}


class PairLossSpec(NamedTuple):
    formula: str  # name in csrc/common/losses_pair.h and in reference.PAIR_FORMULAS
    options: frozenset[str]
    reference: bool = True  # sees log-ratios; else the policy's log-probs
    averages: str | None = None  # "logps": of averages over the tokens; "scores": divides after phi
    sorts: str | None = None  # "pairs" or "responses": couples the whole batch


def _options(*names: str) -> frozenset[str]:
    assert set(names) <= set(OPTIONS)
    return frozenset(names)


_DIVERGENCE, _SMOOTH = "f_divergence_type", "label_smoothing"

PAIR_LOSSES: dict[str, PairLossSpec] = {
    "sigmoid": PairLossSpec("sigmoid", _options(_SMOOTH, _DIVERGENCE, "margins")),
    "robust": PairLossSpec("robust", _options(_SMOOTH, _DIVERGENCE, "margins")),
    "hinge": PairLossSpec("hinge", _options(_DIVERGENCE, "margins")),
    "ipo": PairLossSpec("ipo", _options(_DIVERGENCE), averages="scores"),
    "exo_pair": PairLossSpec("exo_pair", _options(_SMOOTH, _DIVERGENCE, "margins")),
    "nca_pair": PairLossSpec("nca_pair", _options()),
    "bco_pair": PairLossSpec("bco_pair", _options("bco_shift")),
    "sppo_hard": PairLossSpec("sppo_hard", _options()),
    "aot": PairLossSpec("sigmoid", _options(_SMOOTH), sorts="pairs"),
    "aot_unpaired": PairLossSpec("sigmoid", _options(_SMOOTH), sorts="responses"),
    "apo_zero": PairLossSpec("apo_zero", _options()),
    "apo_down": PairLossSpec("apo_down", _options()),
    "discopop": PairLossSpec("discopop", _options(_DIVERGENCE, "margins", "discopop_tau")),
    "sigmoid_norm": PairLossSpec(
        "sigmoid", _options(_SMOOTH, _DIVERGENCE, "margins"), averages="scores"
    ),
    "sft": PairLossSpec("sft", _options(), reference=False, averages="logps"),
    "cpo": PairLossSpec("sigmoid", _options(_SMOOTH, "margins", "cpo_alpha"), reference=False),
    "simpo": PairLossSpec(
        "sigmoid",
        _options(_SMOOTH, "margins", "simpo_gamma"),
        reference=False,
        averages="logps",
    ),
    "alphapo": PairLossSpec(
        "sigmoid",
        _options(_SMOOTH, "margins", "simpo_gamma", "alphapo_alpha"),
        reference=False,
        averages="logps",
    ),
    "orpo": PairLossSpec("orpo", _options(), reference=False, averages="logps"),
}
PAIR_LOSS_NAMES = tuple(PAIR_LOSSES)
# the keyword arguments of `preference_loss` that the functions on logits hand on
LOSS_OPTIONS = {*OPTIONS, "loss_weights", "f_alpha_divergence_coef", "rpo_alpha"} - {_SMOOTH}


class UnpairedLossSpec(NamedTuple):
    formula: str  # name in csrc/common/losses_unpaired.h and in reference.UNPAIRED_FORMULAS
    constant: str | None  # the argument that it needs


UNPAIRED_LOSSES: dict[str, UnpairedLossSpec] = {
    "kto": UnpairedLossSpec("kto", "kl"),
    "apo_zero_unpaired": UnpairedLossSpec("kto", None),  # KTO around 0
    "bco": UnpairedLossSpec("bco", "bco_shift"),
}
UNPAIRED_LOSS_NAMES = tuple(UNPAIRED_LOSSES)


class PairTerm(NamedTuple):
    """One loss of a weighted sum, with its options resolved."""

    spec: PairLossSpec
    weight: float
    beta: float
    label_smoothing: float
    discopop_tau: float
    margin: float  # SimPO's gamma
    divergence: str
    divergence_alpha: float

    @property
    def average_first(self) -> bool:
        return self.spec.averages == "logps"

    def formula_options(self) -> tuple[str, float, float, float, float, str, float, bool]:
        """The last arguments of the operator `pair_loss`."""
        return (
            self.spec.formula,
            self.beta,
            self.label_smoothing,
            self.discopop_tau,
            self.margin,
            self.divergence,
            self.divergence_alpha,
            self.average_first,
        )


def loss_names(loss_type: LossType) -> tuple[str, ...]:
    return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)


def needs_reference(loss_type: LossType) -> bool:
    """Whether any of the losses sees the reference model."""
    return any(PAIR_LOSSES[name].reference for name in loss_names(loss_type))


def takes_averages(terms: Sequence[PairTerm]) -> bool:
    """Whether any loss of the sum is defined on log-probs averaged over the tokens, so that it needs lengths."""
    return any(term.spec.averages for term in terms)


def takes_only_averages(terms: Sequence[PairTerm]) -> bool:
    """Whether every loss of the sum is the same on averages as on sums and lengths."""
    return all(
        term.average_first or (term.spec.averages and term.divergence == REVERSE_KL)
        for term in terms
    )


def couples_batch(loss_type: LossType) -> bool:
    """Whether a pair's loss depends on the other pairs of the batch, as where log-ratios are sorted."""
    return any(PAIR_LOSSES[name].sorts for name in loss_names(loss_type))


def check_pair_options(
    function: str,
    loss_type: LossType,
    beta: float,
    label_smoothing: float = 0.0,
    *,
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = REVERSE_KL,
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    alphapo_alpha: float = 0.25,
    cpo_alpha: float = 1.0,
    rpo_alpha: float = 0.0,
    margins: object = None,
    bco_shift: object = None,
) -> tuple[PairTerm, ...]:
    """Checks the options of `preference_loss` and returns the terms of the sum that they mean.

    An option that no loss of the sum uses, unless it is at its default or says "without it" (`NEUTRAL`), and a
    divergence that one of them cannot take, are refused: what would be ignored is an error. `margins` and
    `bco_shift` count as given when they are not None.

    Args:
        function: the caller's name, for the messages.
        Others: as in `preference_loss`.

    Raises:
        TypeError, ValueError: an unknown loss, a value out of its range, options that do not go together.
    """
    names = _checked_names(function, loss_type)
    weights = _checked_weights(function, names, loss_weights)
    check_beta(function, beta)
    check_label_smoothing(function, label_smoothing)
    check_choice(function, "f_divergence_type", f_divergence_type, DIVERGENCES)
    for option, value in (
        ("discopop_tau", discopop_tau),
        ("f_alpha_divergence_coef", f_alpha_divergence_coef),
        ("simpo_gamma", simpo_gamma),
        ("alphapo_alpha", alphapo_alpha),
        ("cpo_alpha", cpo_alpha),
        ("rpo_alpha", rpo_alpha),
    ):
        check_finite(function, option, value)
    if discopop_tau <= 0:
        raise ValueError(f"{function}: discopop_tau must be positive, got {discopop_tau}")
    given = {
        "label_smoothing": label_smoothing,
        "f_divergence_type": f_divergence_type,
        "margins": margins,
        "discopop_tau": discopop_tau,
        "simpo_gamma": simpo_gamma,
        "alphapo_alpha": alphapo_alpha,
        "cpo_alpha": cpo_alpha,
        "bco_shift": bco_shift,
    }
    _check_options_are_used(function, names, given)
    # alpha = 1 is the reverse KL divergence.
    neutral = f_alpha_divergence_coef == 0.5 or (
        f_alpha_divergence_coef == 1 and f_divergence_type == REVERSE_KL
    )
    if not neutral and f_divergence_type != ALPHA:
        raise ValueError(
            f"{function}: f_alpha_divergence_coef is for f_divergence_type {ALPHA!r}, "
            f"got {f_alpha_divergence_coef} with {f_divergence_type!r}"
        )
    if "exo_pair" in names and label_smoothing == 0:
        raise ValueError(
            f"{function}: loss_type 'exo_pair' needs label_smoothing > 0 (its authors take 1e-3), got 0"
        )
    divergence, divergence_alpha = f_divergence_type, float(f_alpha_divergence_coef)
    if f_divergence_type == "forward_kl":
        divergence, divergence_alpha = ALPHA, 0.0
    terms = []
    for name, weight in zip(names, weights, strict=True):
        spec = PAIR_LOSSES[name]
        term = PairTerm(
            spec,
            weight,
            float(beta),
            float(label_smoothing) if _SMOOTH in spec.options else 0.0,
            float(discopop_tau),
            float(simpo_gamma) if "simpo_gamma" in spec.options else 0.0,
            divergence if _DIVERGENCE in spec.options else REVERSE_KL,
            divergence_alpha,
        )
        if name == "alphapo":  # its reward is the score of an alpha divergence
            term = term._replace(divergence=ALPHA, divergence_alpha=1.0 - alphapo_alpha)
        if term.divergence == ALPHA and term.divergence_alpha == 1:
            term = term._replace(divergence=REVERSE_KL)
        terms.append(term)
        if name == "cpo" and cpo_alpha:
            terms.append(_sft(weight * cpo_alpha, beta))
    if rpo_alpha:
        terms.append(_sft(rpo_alpha, beta))
    return tuple(terms)


def _sft(weight: float, beta: float) -> PairTerm:
    return PairTerm(PAIR_LOSSES["sft"], float(weight), float(beta), 0.0, 0.05, 0.0, REVERSE_KL, 0.5)


def _checked_names(function: str, loss_type: LossType) -> tuple[str, ...]:
    if isinstance(loss_type, (list, tuple)):
        if not loss_type:
            raise ValueError(
                f"{function}: loss_type must name at least one loss, got {loss_type!r}"
            )
        for name in loss_type:
            check_choice(function, "loss_type", name, PAIR_LOSS_NAMES)
        return tuple(loss_type)
    check_choice(function, "loss_type", loss_type, PAIR_LOSS_NAMES)
    assert isinstance(loss_type, str)
    return (loss_type,)


def _checked_weights(
    function: str, names: tuple[str, ...], loss_weights: Sequence[float] | None
) -> tuple[float, ...]:
    if loss_weights is None:
        return (1.0,) * len(names)
    if not isinstance(loss_weights, (list, tuple)) or len(loss_weights) != len(names):
        raise ValueError(
            f"{function}: loss_weights must be {len(names)} numbers, one for each loss of "
            f"{list(names)}, got {loss_weights!r}"
        )
    for weight in loss_weights:
        check_finite(function, "loss_weights", weight)
    return tuple(float(weight) for weight in loss_weights)


def _check_options_are_used(
    function: str, names: tuple[str, ...], given: dict[str, object]
) -> None:
    shown = repr(names[0]) if len(names) == 1 else list(names)
    for option, value in given.items():
        if value is None or (OPTIONS[option] is not None and value == OPTIONS[option]):
            continue
        if option in NEUTRAL and value == NEUTRAL[option]:
            continue
        takers = [name for name, spec in PAIR_LOSSES.items() if option in spec.options]
        what = option if OPTIONS[option] is None else repr(value)
        if not set(names) & set(takers):
            raise ValueError(
                f"{function}: {option} is defined for the losses {takers}, got {what} with {shown}"
            )
        if option == _DIVERGENCE:
            without = [n for n in names if PAIR_LOSSES[n].reference and n not in takers]
            if without:
                raise ValueError(
                    f"{function}: {option} is defined for the losses {takers}, got {what} with {without[0]!r}"
                )


def check_unpaired_constants(
    function: str, loss_type: str, kl: object = None, bco_shift: object = None
) -> None:
    """`kl` and `bco_shift` count as given when they are not None."""
    check_choice(function, "loss_type", loss_type, UNPAIRED_LOSS_NAMES)
    constant = UNPAIRED_LOSSES[loss_type].constant
    for option, value in (("kl", kl), ("bco_shift", bco_shift)):
        if value is not None and option != constant:
            owners = [name for name, spec in UNPAIRED_LOSSES.items() if spec.constant == option]
            raise ValueError(
                f"{function}: {option} is defined for the losses {owners}, got it with {loss_type!r}"
            )
    if constant == "kl" and kl is None:
        raise ValueError(f"{function}: loss_type {loss_type!r} needs kl, see kto_kl")
