"""What the id of a repository on the Hugging Face hub looks like."""

import re

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository, owner/name; a folder may have it, too."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")
