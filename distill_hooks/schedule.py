"""The loss weights of DearKD's two stages, by epoch."""
from typing import NamedTuple, Optional


class StageWeights(NamedTuple):
    """Loss weights of an epoch (Eq. 6), and its stage (1 or 2)."""
    stage: int
    alpha: float
    beta: float

    @property
    def uses_features(self) -> bool:
        """Whether the loss needs the teacher's feature maps."""
        return self.beta > 0.

    @property
    def uses_labels(self) -> bool:
        """Whether the loss needs the teacher's labels."""
        return self.alpha < 1.


class TwoStageSchedule:
    """Loss weights of the two stages, by epoch (section 3.2, appendix C).

    Stage I distills with Eq. 6. Stage II is 'anneal', Eq. 6 with beta = 0 and alpha rising linearly to 1 (the paper's
    300 epochs), or 'ce', cross-entropy alone (Eq. 7, the paper's 1000 epochs). Our choices: stage I defaults to 5/6 of
    the epochs; alpha is 0.5 and beta is 10 (by the ablation in RESULTS.md, for features of standard deviation 1);
    cool-down epochs belong to stage II.

    Args:
        epochs: Epochs of the run, without cool-down.
        stage1_epochs: Length of stage I, 0 to `epochs`.
        stage2: 'anneal' or 'ce'.
        alpha: Weight of the cross-entropy in stage I, in [0, 1].
        beta: Weight of the hidden loss in stage I; 0 disables it.
        cooldown_epochs: Epochs after `epochs`, appended by the learning-rate schedule.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
            self,
            epochs: int,
            stage1_epochs: Optional[int] = None,
            stage2: str = 'anneal',
            alpha: float = 0.5,
            beta: float = 10.0,
            cooldown_epochs: int = 0,
    ) -> None:
        if stage1_epochs is None:
            stage1_epochs = round(5 * epochs / 6)
        if not 0 <= stage1_epochs <= epochs:
            raise ValueError(
                f'Stage I is {stage1_epochs} epochs long, but the run has {epochs}.'
                f' Set --dearkd-stage1-epochs from 0 to {epochs} (default: {round(5 * epochs / 6)}).')
        if stage2 not in ('anneal', 'ce'):
            raise ValueError(f"Unknown stage II {stage2!r}, expected 'anneal' or 'ce'.")
        if not 0. <= alpha <= 1.:
            raise ValueError(f'alpha of Eq. 6 is {alpha}, expected a weight in [0, 1].')
        if not beta >= 0.:
            raise ValueError(f'beta of Eq. 6 is {beta}, expected a weight of 0 or more.')
        self.stage1_epochs = stage1_epochs
        self.total_epochs = epochs + cooldown_epochs
        self.stage2 = stage2
        self.alpha = alpha
        self.beta = beta

    @property
    def uses_features(self) -> bool:
        """Whether at least one epoch has a hidden loss."""
        return self.beta > 0. and self.stage1_epochs > 0

    def __call__(self, epoch: int) -> StageWeights:
        """Return the weights of an epoch, counted from 0."""
        if epoch < self.stage1_epochs:
            return StageWeights(1, self.alpha, self.beta)
        if self.stage2 == 'ce':
            return StageWeights(2, 1., 0.)
        done = (epoch - self.stage1_epochs + 1) / max(1, self.total_epochs - self.stage1_epochs)
        return StageWeights(2, self.alpha + (1. - self.alpha) * min(1., done), 0.)

    def __repr__(self) -> str:
        return (f'stage I: {self.stage1_epochs} epochs (alpha={self.alpha:g}, beta={self.beta:g}), '
                f'stage II: {self.total_epochs - self.stage1_epochs} epochs ({self.stage2})')
