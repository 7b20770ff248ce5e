"""What came out of a recipe: quality beside the dense model, size and speed."""

from __future__ import annotations

from pydantic import Field

from shoal.recipe import Recipe
from shoal.texts import Text
from shoal.value import Value


class Evaluation(Value):
    """Perplexity on one text beside the dense model's on the same tokens.

    `kl` is the mean divergence in nats per token of the compressed model from the dense one, over the dense
    model's top tokens and one bucket for the rest. `log_ratio` is log(perplexity / dense_perplexity): its
    standard error is of the paired difference and so much smaller than those of the two perplexities.
    """

    text: Text
    dense_perplexity: float
    dense_standard_error: float
    perplexity: float
    standard_error: float
    log_ratio: float
    log_ratio_standard_error: float
    kl: float
    kl_standard_error: float
    top1_agreement: float


class TaskScore(Value):
    """A model's score in a task, beside the dense model's on the same examples where one was measured.

    Standard errors are None where the task's metric has none; that of `difference` (score − dense score) is of the
    paired difference, None where the metric is no mean over examples.
    """

    task: str
    metric: str
    num_examples: int
    score: float
    standard_error: float | None = None
    dense_score: float | None = None
    dense_standard_error: float | None = None
    difference_standard_error: float | None = None

    @property
    def difference(self) -> float | None:
        """How far the score is from the dense model's."""
        return None if self.dense_score is None else self.score - self.dense_score


class Size(Value):
    """What a model takes: parameters, bytes on disk, KV-cache bytes per token.

    Zeros of a sparse model are not among `num_parameters`, but are among `num_bytes`: no format without them loads in
    transformers 5 or vLLM. `num_bitmask_bytes` is what such a format would take (values that are not zero, and a bit for
    each place of a sparse matrix); None for models that are not sparse.
    """

    num_parameters: int
    num_bytes: int
    kv_bytes_per_token: int
    num_bitmask_bytes: int | None = None


class Speed(Value):
    """Median tokens per second, batch of one, measured in turns with the dense model."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Point(Value):
    """What came out of a recipe: a point of the size/quality plane."""

    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    tasks: tuple[TaskScore, ...] = ()
    size: Size
    dense_size: Size
    speed: Speed | None = None
    dense_speed: Speed | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    device: str = "cpu"
    artefact: str | None = None
    artefact_sha256: str | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity on the first evaluation text: the one that ranks."""
        return self.evaluations[0].perplexity

    @property
    def num_parameters(self) -> int:
        """Parameters of the compressed model."""
        return self.size.num_parameters
