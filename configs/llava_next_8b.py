"""LLaVA-NeXT over Llama 3 8B on all-NLI: the paper's text-only recipe, or `:reference` for the released code's."""

from ml_collections import ConfigDict

from configs import qwen2_5_omni_3b


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from the Omni 3B's."""
    config = qwen2_5_omni_3b.get_config(recipe)
    config.name = "llava_next_8b"
    config.model.path = "llava-hf/llama3-llava-next-8b-hf"
    return config
