"""Worlds made by rule: pictures, clips, sounds and pages that show known meanings, and texts that
say them.
"""

from laboratory.worlds.world import Sizes, texts, write

__all__ = ["Sizes", "texts", "write"]
