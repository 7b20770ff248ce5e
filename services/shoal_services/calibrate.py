"""What all trials of a search share, measured over the cluster once: shards in, merged `Moments` and targets out.

Every piece is a file of the search's folder, so pieces that exist are not measured again.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import ray
from shoal.corpus import Corpus, load_corpus
from shoal.models import hash_weights, load_model, load_tokenizer
from shoal.moments import Moments, measure_moments
from shoal.prepare import Listener
from shoal.task_scores import save_results
from shoal.teacher import measure_targets

from shoal_services.config import SearchConfig
from shoal_services.folder import ProgressFile, RunFolder, read_progress

# Two shards of fewer windows would hold too few batches to alternate between fit and held-out half.
MIN_SHARD_WINDOWS = 8


def prepare_search(config: SearchConfig, folder: RunFolder, concurrent: int, listen: Listener) -> None:
    """Fills `prepared/` with token windows, moments and the dense model's targets, on `concurrent` workers.

    Raises ValueError for models and texts that cannot be used.
    """
    run = config.run
    work = ray.remote(num_cpus=run.cpus_per_worker, num_gpus=run.gpus_per_worker, max_retries=2)
    payload = config.model_dump(mode="json")
    corpus_file = folder.prepared / "corpus.safetensors"
    if not corpus_file.exists():
        listen("read model and texts", 0, 1)
        _get(work(_write_corpus).remote(payload, folder.root))
        listen("read model and texts", 1, 1)
    corpus = Corpus.load(corpus_file)
    pieces = _list_pieces(corpus, concurrent * run.most_workers)
    shards = [name for name in pieces if name.startswith("shard.")]
    if (folder.prepared / "moments.safetensors").exists():
        pieces = {name: span for name, span in pieces.items() if name not in shards}
    missing = {name: span for name, span in pieces.items() if not _piece_file(folder, name).exists()}
    jobs = [work(_measure_piece).remote(payload, folder.root, name, span) for name, span in missing.items()]
    total = sum(high - low for _, low, high in missing.values())
    _watch(jobs, [folder.prepared / f"progress-{name}.json" for name in missing], total, listen)
    _merge_shards(folder, shards)
    if config.tasks is not None and not folder.dense_tasks.exists():
        listen("dense model in tasks", 0, 1)
        _get(work(_measure_dense_tasks).remote(payload, folder.root))
        listen("dense model in tasks", 1, 1)


def _list_pieces(corpus: Corpus, num_shards: int) -> dict[str, tuple[str, int, int]]:
    """Pieces of work by name: the role and the range of its windows."""
    count = len(corpus.calibration)
    num_shards = max(1, min(num_shards, count // MIN_SHARD_WINDOWS))
    bounds = [count * i // num_shards for i in range(num_shards + 1)]
    pieces = {
        f"shard.{i}-of-{num_shards}": ("calibration", low, high) for i, (low, high) in enumerate(itertools.pairwise(bounds))
    }
    if corpus.distillation is not None:
        pieces["distillation"] = ("distillation", 0, len(corpus.distillation))
    pieces |= {f"evaluation.{i}": (f"evaluation.{i}", 0, len(w)) for i, w in enumerate(corpus.evaluation)}
    return pieces | {"selection": ("selection", 0, len(corpus.selection))}


def _piece_file(folder: RunFolder, name: str) -> Path:
    return folder.prepared / f"{name}.safetensors"


def _merge_shards(folder: RunFolder, names: list[str]) -> None:
    merged_file = folder.prepared / "moments.safetensors"
    if not merged_file.exists():
        shards = [Moments.load(_piece_file(folder, name)) for name in names]
        functools.reduce(Moments.__add__, shards).save(merged_file)
    for name in names:
        _piece_file(folder, name).unlink(missing_ok=True)


def _write_corpus(payload: dict, root: Path) -> None:
    config, folder = SearchConfig.model_validate(payload), RunFolder(root)
    model = _load(config.model, config.revision, config.dtype)
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    corpus = load_corpus(
        config.texts, tokenizer, model.config,
        distillation_tokens=int(config.space.highest("distillation_tokens")), distillation_window=config.space.window,
    )  # fmt: skip
    tokenizer.save_pretrained(folder.prepared / "tokenizer")
    (folder.prepared / "weights.sha256").write_text(hash_weights(model))
    corpus.save(folder.prepared / "corpus.safetensors")


def _measure_piece(payload: dict, root: Path, name: str, span: tuple[str, int, int]) -> None:
    config, folder = SearchConfig.model_validate(payload), RunFolder(root)
    corpus = Corpus.load(folder.prepared / "corpus.safetensors")
    role, low, high = span
    whole = corpus.evaluation[int(role.partition(".")[2])] if role.startswith("evaluation.") else getattr(corpus, role)
    windows, model = whole.take(low, high), _load(config.model, config.revision, config.dtype)
    progress = ProgressFile(folder.prepared / f"progress-{name}.json")

    def listen(done: int) -> None:
        progress(role, done, len(windows))

    if role == "calibration":
        aside = folder.prepared / f"{name}.part"
        measure_moments(model, windows, text_sha256=whole.sha256, save_to=aside, on_progress=listen)
        aside.rename(_piece_file(folder, name))
    else:
        wanted = config.space.temperatures if role == "distillation" else (1.0,)
        measure_targets(model, windows, temperatures=wanted, on_progress=listen).save(_piece_file(folder, name))


def _measure_dense_tasks(payload: dict, root: Path) -> None:
    from shoal.tasks import load_tasks, measure_tasks

    config, folder = SearchConfig.model_validate(payload), RunFolder(root)
    assert config.tasks is not None
    tokenizer = load_tokenizer(str(folder.prepared / "tokenizer"))
    tasks = load_tasks(config.tasks.names)
    model = _load(config.model, config.revision, config.dtype)
    save_results(folder.dense_tasks, measure_tasks(model, tokenizer, tasks, limit=config.tasks.limit))


@functools.lru_cache(maxsize=1)
def _load(name: str, revision: str | None, dtype: str | None):
    """The dense model, kept by a worker process from one task to the next."""
    return load_model(name, revision=revision, dtype=dtype)


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
