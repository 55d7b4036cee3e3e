"""The processor of a checkpoint that is open."""

from collections.abc import Iterable

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.data.content import chosen_modalities
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor


def processor_of(
    checkpoint: Checkpoint,
    modalities: Iterable[str] | None,
    media: MediaConfig | None,
    video_positions: str,
) -> Processor:
    """What makes a checkpoint's inputs. modalities: those that will come; None: all it takes."""
    chosen = chosen_modalities(modalities, checkpoint.backbone.modalities)
    context = checkpoint.config.max_position_embeddings
    return Processor(checkpoint.folder, context, media, video_positions, chosen)
