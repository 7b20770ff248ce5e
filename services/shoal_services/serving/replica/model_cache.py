"""Many models in one process: those asked for last are loaded, and make room for others. The long tail lives here."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from weakref import WeakValueDictionary

from ray import serve

from shoal_services.serving.engine.generation import Call, EngineClosed, EngineFailed, Piece, Prompt
from shoal_services.serving.replica.channel import Reply
from shoal_services.serving.replica.variant import Variant


class ModelCache:
    """A Serve deployment that answers for every shared variant, by Serve's multiplexed model id."""

    def __init__(self, limits: dict[str, Any]):
        self.limits = limits
        self.models: dict[str, dict[str, Any]] = {}
        self._loaded: WeakValueDictionary[str, Variant] = WeakValueDictionary()

    def reconfigure(self, models: dict[str, dict[str, Any]]) -> None:
        """Model id → {name, place, variant}: what can be asked for."""
        self.models = models

    async def check(self, model_id: str) -> None:
        """Raises ValueError for a model that could not be loaded if it were asked for, as far as its files tell."""
        from shoal.checkpoints.load import check_model

        await asyncio.to_thread(check_model, self.models[model_id]["place"])

    async def load(self, model_id: str) -> Variant:
        """A variant by its id. Raises `EngineFailed` if it does not start, which is no fault of the request's."""
        model = self.models[model_id]
        try:
            variant = await asyncio.to_thread(Variant, model["name"], model["place"], model["variant"], self.limits)
        except Exception as error:
            logging.getLogger("ray.serve").exception(f"variant {model['name']!r} does not start from {model['place']!r}")
            raise EngineFailed("the model cannot be loaded") from error
        self._loaded[model_id] = variant
        return variant

    async def generate(self, call: Call, reply: Reply | None = None) -> Piece:
        """As `Variant.generate`, after loading if need be."""
        while True:
            try:
                return await (await self._find()).generate(call, reply)
            except EngineClosed:  # it was found, and then made room for another
                continue

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> dict[str, Any]:
        """As `Variant.tokenize`, after loading if need be."""
        return await (await self._find()).tokenize(prompt, add_special_tokens)

    def check_health(self) -> None:
        """Raises once an engine has failed: Serve then starts another replica."""
        for variant in list(self._loaded.values()):
            variant.check_health()

    async def _find(self) -> Variant:
        return await self.load(serve.get_multiplexed_model_id())


def define_model_cache(max_loaded: int) -> type[ModelCache]:
    """A cache of that many models at once in each replica (Serve wants the number where the method is defined)."""
    return type(
        "ModelCache", (ModelCache,), {"load": serve.multiplexed(max_num_models_per_replica=max_loaded)(ModelCache.load)}
    )
