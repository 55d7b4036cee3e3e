"""What a run gives back in Python: its numbers, and where its files are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath

if TYPE_CHECKING:
    from lco_jax.embedder import OmniEmbedder


class Results(dict[str, Any]):
    """The content of a run's results.json (steps, first_loss, last_loss, before, after, …).

    Empty if SIGTERM ended the run early; the same call resumes. output: the run's folder. adapter,
    merged: the folders of the PEFT adapter and of the merged model, or None where the run wrote
    none. base: the checkpoint that was tuned.
    """

    def __init__(self, numbers: Mapping[str, Any], output: AnyPath, base: str):
        super().__init__(numbers)
        self.output, self.base = output, base
        self.adapter, self.merged = (self._folder(name) for name in ("adapter", "merged"))

    def _folder(self, name: str) -> AnyPath | None:
        folder = self.output / name
        return folder if self and folder.is_dir() else None

    def embedder(self, **options: Any) -> "OmniEmbedder":
        """The tuned model. options: those of `OmniEmbedder.from_pretrained`.

        Raises if the run wrote neither an adapter nor a merged model.
        """
        from lco_jax.embedder import OmniEmbedder  # heavy, and not needed for the numbers

        if self.merged is not None:
            return OmniEmbedder.from_pretrained(self.merged, **options)
        if self.adapter is not None:
            return OmniEmbedder.from_pretrained(self.base, self.adapter, **options)
        advice = "set export.merged, or run lco convert on it"
        raise LcoError(f"{self.output} holds no adapter and no merged model; {advice}")
