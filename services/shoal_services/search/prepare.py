"""What all trials of a search share, measured over the cluster once: shards in, merged `Moments` and targets out.

Every piece is a file of the search's folder, so pieces that exist are not measured again.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import ray
from shoal.checkpoints.device import choose_device
from shoal.checkpoints.hashes import hash_weights
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.moments import Moments
from shoal.linearity.scores import require_calibration, score_blocks, write_scores
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.measure.task_scores import save_results
from shoal.models.shorten import require_shortenable
from shoal.progress import Listener
from shoal.text.corpus import Corpus, load_corpus
from shoal.text.windows import TokenWindows
from transformers import PreTrainedModel

from shoal_services.search.config import SearchConfig
from shoal_services.search.folder import RunFolder
from shoal_services.training.progress_file import ProgressFile, read_progress

# Two shards of fewer windows would hold too few batches to alternate between fit and held-out half.
MIN_SHARD_WINDOWS = 8


@dataclass(frozen=True)
class Piece:
    """Some windows of what the file `whole` of the folder is measured on: work for one worker."""

    whole: str
    index: int
    count: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return f"{self.whole}.{self.index}-of-{self.count}"


def prepare_search(config: SearchConfig, folder: RunFolder, concurrent: int, listen: Listener) -> None:
    """Fills `prepared/` with token windows, moments, scores and the dense model's targets, on `concurrent` workers.

    Raises ValueError for models and texts that cannot be used.
    """
    run = config.run
    work = ray.remote(num_cpus=run.cpus_per_worker, num_gpus=run.gpus_per_worker, max_retries=2)
    payload = config.model_dump(mode="json")
    corpus_file = folder.prepared / "corpus.safetensors"
    if not corpus_file.exists():
        listen("read model and texts", 0, 1)
        _get(work(write_corpus).remote(payload, folder.root))
        listen("read model and texts", 1, 1)
    corpus = Corpus.load(corpus_file)
    wholes = {name: split(config, corpus, name, concurrent * run.most_workers) for name in list_wholes(corpus)}
    wholes = {name: pieces for name, pieces in wholes.items() if not _file(folder, name).exists()}
    missing = [piece for pieces in wholes.values() for piece in pieces if not _file(folder, piece.name).exists()]
    jobs = [work(measure_piece).remote(payload, folder.root, piece) for piece in missing]
    total = sum(piece.high - piece.low for piece in missing)
    _watch(jobs, [folder.prepared / f"progress-{piece.name}.json" for piece in missing], total, listen)
    for name, pieces in wholes.items():
        join(folder, name, pieces, windows_of(corpus, name))
    if not folder.scores.exists():
        listen("score the blocks", 0, 1)
        _get(work(_score_blocks).remote(folder.root))
        listen("score the blocks", 1, 1)
    if config.tasks is not None and not folder.dense_tasks.exists():
        listen("dense model in tasks", 0, 1)
        _get(work(_measure_dense_tasks).remote(payload, folder.root))
        listen("dense model in tasks", 1, 1)


def list_wholes(corpus: Corpus) -> list[str]:
    """Files that are to be there at the end, what takes longest first."""
    distillation = ["distillation"] if corpus.distillation is not None else []
    return ["moments", *distillation, *(f"evaluation.{index}" for index in range(len(corpus.evaluation))), "selection"]


def windows_of(corpus: Corpus, whole: str) -> TokenWindows:
    """What a file is measured on."""
    role, _, index = whole.partition(".")
    if role == "evaluation":
        return corpus.evaluation[int(index)]
    return corpus.calibration if role == "moments" else getattr(corpus, role)


def split(config: SearchConfig, corpus: Corpus, whole: str, num_workers: int) -> list[Piece]:
    """A piece for each worker, as far as there are windows for them.

    The moments of a streamed model come in one: each piece of them is as large as all.
    """
    length = len(windows_of(corpus, whole))
    in_one = config.run.streamed and whole == "moments"
    count = 1 if in_one else max(1, min(num_workers, length // MIN_SHARD_WINDOWS))
    bounds = itertools.pairwise(length * index // count for index in range(count + 1))
    return [Piece(whole, index, count, low, high) for index, (low, high) in enumerate(bounds)]


def join(folder: RunFolder, whole: str, pieces: list[Piece], windows: TokenWindows) -> None:
    """The file of all pieces, which are gone then."""
    files = [_file(folder, piece.name) for piece in pieces]
    if len(files) == 1:
        files[0].rename(_file(folder, whole))
    elif whole == "moments":
        functools.reduce(Moments.__add__, map(Moments.load, files)).save(_file(folder, whole))
    else:
        TeacherTargets.join([TeacherTargets.load(file) for file in files], windows).save(_file(folder, whole))
    for file in files:
        file.unlink(missing_ok=True)


def _file(folder: RunFolder, name: str) -> Path:
    return folder.prepared / f"{name}.safetensors"


def write_corpus(payload: dict, root: Path) -> None:
    """Reads model and texts: token windows, tokenizer and the hash of the weights."""
    config, folder = SearchConfig.model_validate(payload), RunFolder(root)
    model = _load(config)
    if config.space.replaces_blocks:
        require_shortenable(model, None)
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    corpus = load_corpus(
        config.texts, tokenizer, model.config,
        distillation_tokens=int(config.space.highest("distillation_tokens")), distillation_window=config.space.window,
    )  # fmt: skip
    if config.space.replaces_blocks:
        require_calibration(corpus.calibration, model)
    tokenizer.save_pretrained(folder.prepared / "tokenizer")
    (folder.prepared / "weights.sha256").write_text(hash_weights(model))
    corpus.save(folder.prepared / "corpus.safetensors")


def measure_piece(payload: dict, root: Path, piece: Piece) -> None:
    """Measures a piece into a file of its own."""
    config, folder = SearchConfig.model_validate(payload), RunFolder(root)
    whole = windows_of(Corpus.load(folder.prepared / "corpus.safetensors"), piece.whole)
    windows, model = whole.take(piece.low, piece.high), _load(config)
    progress = ProgressFile(folder.prepared / f"progress-{piece.name}.json")

    def listen(done: int) -> None:
        progress(piece.whole, done, len(windows))

    if piece.whole == "moments":
        aside = folder.prepared / f"{piece.name}.part"
        moments = measure_moments(model, windows, text_sha256=whole.sha256, save_to=aside, on_progress=listen)
        moments.save(_file(folder, piece.name))
        aside.unlink(missing_ok=True)
    else:
        wanted = config.space.temperatures if piece.whole == "distillation" else (1.0,)
        measure_targets(model, windows, temperatures=wanted, on_progress=listen).save(_file(folder, piece.name))


def _score_blocks(root: Path) -> None:
    """On a worker: of a large model, this takes an accelerator's products in float64."""
    folder = RunFolder(root)
    write_scores(folder.scores, score_blocks(Moments.load(_file(folder, "moments")), choose_device()))


def _measure_dense_tasks(payload: dict, root: Path) -> None:
    from shoal.measure.tasks import load_tasks, measure_tasks

    config, folder = SearchConfig.model_validate(payload), RunFolder(root)
    assert config.tasks is not None
    tokenizer = load_tokenizer(str(folder.prepared / "tokenizer"))
    tasks = load_tasks(config.tasks.names)
    model = _load(config)
    save_results(folder.dense_tasks, measure_tasks(model, tokenizer, tasks, limit=config.tasks.limit))


def _load(config: SearchConfig) -> PreTrainedModel:
    """The dense model, kept by a worker process from one task to the next."""
    return _load_once(config.model, config.revision, config.dtype, config.run.streamed)


@functools.lru_cache(maxsize=1)
def _load_once(name: str, revision: str | None, dtype: str | None, streamed: bool) -> PreTrainedModel:
    return load_model(name, revision=revision, dtype=dtype, streamed=streamed)


def _watch(jobs: list[ray.ObjectRef], progress_files: list[Path], total: int, listen: Listener) -> None:
    """Waits for the jobs and reports their windows together."""
    waiting = list(jobs)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=0.5)
        for job in done:
            _get(job)
        known = [progress for file in progress_files if (progress := read_progress(file))]
        listen("measure the dense model", sum(done for _, done, _ in known), total)
    for file in progress_files:
        file.unlink(missing_ok=True)


def _get(job: ray.ObjectRef) -> object:
    """A task's result; its own error where it raised one."""
    try:
        return ray.get(job)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise error.cause from error
        raise
