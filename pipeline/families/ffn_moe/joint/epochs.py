"""Where the epochs of a training end."""

from ....config.fit import FitConfig


class Epochs:
    """Passes over the training tokens, counted from 1; each ends with the step that comes nearest
    to its last row."""

    def __init__(self, opts: FitConfig, context_tokens: int, epoch_tokens: int):
        self.steps = opts.resolve_steps(context_tokens, epoch_tokens)
        self.step_tokens = opts.batch_sequences * context_tokens
        self.epoch_tokens = epoch_tokens

    @property
    def epoch_steps(self) -> float:
        """Steps of an epoch, which need not be a whole number."""
        return self.epoch_tokens / self.step_tokens

    def ends_at(self, step: int) -> bool:
        """Whether an epoch ends after so many steps."""
        return step > 0 and self._end(self._nearest(step)) == step

    def at(self, step: int) -> int:
        """Return the number of the epoch that ends after so many steps, or of the one that is not
        over yet."""
        nearest = self._nearest(step)
        return nearest if step <= self._end(nearest) and nearest > 0 else nearest + 1

    def _nearest(self, step: int) -> int:
        return round(step * self.step_tokens / self.epoch_tokens)

    def _end(self, epoch: int) -> int:
        # As resolve_steps rounds, so that the last of whole epochs ends with the training
        return round(epoch * self.epoch_tokens / self.step_tokens)
