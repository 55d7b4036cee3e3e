"""Worlds made by rule: pictures, clips, sounds and pages that show known meanings, and texts that say them."""

from laboratory.worlds.write import Sizes, write

__all__ = ["Sizes", "write"]
