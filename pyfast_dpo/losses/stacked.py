"""A preference loss on stacked log-probs: rows 0..P-1 chosen, P..2P-1 rejected."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pyfast_dpo.losses.arguments import one_constant
from pyfast_dpo.losses.pairs import PreferenceLoss, preference_loss
from pyfast_dpo.losses.table import (
    LossType,
    PairTerm,
    check_pair_options,
    couples_batch,
    takes_averages,
    takes_only_averages,
)
from pyfast_dpo.ops.checks import check_per_sequence
from pyfast_dpo.ops.dispatch import Impl
from pyfast_dpo.ops.dtypes import statistics_dtype


class StackedLoss(NamedTuple):
    """`preference_loss` with its options, checked once, before any work on logits or hidden states."""

    loss_type: LossType
    beta: float
    label_smoothing: float
    options: dict[str, Any]  # the others of `preference_loss`, but the margins
    margins: Tensor | None  # [P]
    terms: tuple[PairTerm, ...]
    impl: Impl

    @classmethod
    def checked(
        cls,
        function: str,
        pairs: int,
        like: Tensor,
        loss_type: LossType,
        beta: float,
        label_smoothing: float,
        options: dict[str, Any],
        impl: Impl,
    ) -> StackedLoss:
        """The loss of that many pairs, whose margins must lie beside `like`; errors name the function."""
        terms = check_pair_options(function, loss_type, beta, label_smoothing, **options)
        rest = dict(options)
        margins = rest.pop("margins", None)
        check_per_sequence(function, pairs, like, margins=margins)
        if "bco_shift" in rest:
            rest["bco_shift"] = one_constant(
                function,
                "bco_shift",
                rest["bco_shift"],
                like.new_empty(0, dtype=statistics_dtype(like.dtype)),
            )
        return cls(loss_type, beta, label_smoothing, rest, margins, tuple(terms), impl)

    @property
    def couples_batch(self) -> bool:
        """A pair's loss depends on the other pairs."""
        return couples_batch(self.loss_type)

    def takes_averages(self, average: bool | None) -> bool:
        """Whether the log-probs are averages over the tokens; by default where every loss is one of averages."""
        return takes_only_averages(self.terms) if average is None else average

    def takes_lengths(self, average: bool | None) -> bool:
        """Whether sums come with their numbers of tokens: some losses are of averages, others of sums."""
        return (
            average is None and takes_averages(self.terms) and not takes_only_averages(self.terms)
        )

    def of(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor | None,
        lengths: Tensor | None,
        pairs: slice = slice(None),
    ) -> PreferenceLoss:
        """Losses of some of the pairs: policy_logps `[2n]` of these, reference_logps and lengths `[2P]` of all."""

        def both(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if values is None:
                return None, None
            chosen, rejected = values.reshape(2, -1)
            return chosen[pairs], rejected[pairs]

        chosen, rejected = policy_logps.reshape(2, -1)
        chosen_reference, rejected_reference = both(reference_logps)
        chosen_lengths, rejected_lengths = both(lengths)
        return preference_loss(
            chosen,
            rejected,
            chosen_reference,
            rejected_reference,
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            margins=None if self.margins is None else self.margins[pairs],
            impl=self.impl,
            **self.options,
        )
